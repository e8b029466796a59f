"""What an analysis finds: numbers of every delta, and what they say against a merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.wording import clipped, listed, quoted
from paramdelta.engine.progress import NonFinite
from paramdelta.engine.sums import Measured
from paramdelta.insight.norms import sum_of, total
from paramdelta.insight.notice import Notice
from paramdelta.insight.summary import Row, Tensor, described, grouped, pairs, summed_up, tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paramdelta.engine.progress import Outcome
    from paramdelta.engine.sums import DeltaSums
    from paramdelta.planning.dissection import Dissection
    from paramdelta.planning.plan import Plan

FAR_DELTA: Final = 0.5
"""A delta of half the base's own norm is hardly training: two models that share nothing are √2 of it apart, and what
post-training changes is a few hundredths."""

FAR_SHIFT: Final = 1.0
"""The same of a shift: pre-training that goes on for long changes more."""

STRANGE: Final = 0.5
"""The cosine between base and new base below which they are two models: of strangers it is 0, of relatives nearly 1."""

STANDS_OUT: Final = 8.0
"""How many times the median change of rows of a vocabulary makes a block of them stand out."""


@dataclass(frozen=True, slots=True)
class DeltaAnalysis:
    """What one delta, post - base, comes to beside the shift of its base, new base - base.

    Attributes:
        tensors: a row for each, with ``name``, ``layer``, ``module``, ``dtype``, ``shape`` and the numbers of
            `paramdelta.insight.norms.describe`; ``elements`` is how many of them are measured, ``infinities`` and
            ``nans`` are new ones in the output.
        groups: a row for each kind of module in each layer, and ``total`` all together: as one vector, and with the
            means over tensors in ``mean``.
    """

    post: str
    base: str
    new_base: str
    alpha: float
    tensors: list[Row]
    groups: list[Row]
    total: Row


@dataclass(frozen=True, slots=True)
class Analysis:
    """What an analysis found, and what it took.

    Attributes:
        pairs: of each two deltas (``first``, ``second``: places in ``deltas``) the ``cosine`` of the angle between
            them, and that in each of ``layers``.
        bytes_read: bytes of tensor data.
        seconds: wall-clock time, planning included.
        peak_rss_bytes: the most RAM that the process held, as the system reports it.
    """

    deltas: tuple[DeltaAnalysis, ...]
    pairs: list[Row]
    warnings: tuple[Notice, ...]
    bytes_read: int
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "deltas": [{field: getattr(delta, field) for field in DeltaAnalysis.__slots__} for delta in self.deltas],
            "pairs": self.pairs,
            "warnings": [warning._asdict() for warning in self.warnings],
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def analyse(plan: Plan, dissection: Dissection, outcome: Outcome, *, seconds: float, peak_rss_bytes: int) -> Analysis:
    """Return what a run over a dissected plan has found.

    Args:
        plan: the one that was dissected.
    """
    measured, nonfinite = _whole(plan, dissection, outcome)
    tensors = tensors_of(plan, measured, nonfinite)
    deltas = tuple(
        DeltaAnalysis(
            delta.post,
            delta.base,
            plan.recipe.new_base,
            delta.alpha,
            [_named(tensor) | described(tensor, k) for tensor in tensors],
            grouped(tensors, k),
            summed_up(tensors, k),
        )
        for k, delta in enumerate(plan.recipe.deltas)
    )
    blocks = _blocks_of(plan, dissection, outcome)
    return Analysis(
        deltas,
        pairs(tensors, len(deltas)),
        tuple(warned for k in range(len(deltas)) for warned in _warnings(plan, tensors, blocks, k)),
        plan.bytes_read,
        seconds,
        peak_rss_bytes,
    )


def _whole(plan: Plan, dissection: Dissection, outcome: Outcome) -> tuple[dict[str, Measured], dict[str, NonFinite]]:
    """Return what is known of blocks of rows, by tensors of the plan."""
    pieces: dict[str, list[Measured]] = {}
    for name, found in outcome.measured.items():
        pieces.setdefault(plan.operations[dissection.blocks[name].operation].name, []).append(found)
    counts: dict[str, NonFinite] = {}
    for name, more in outcome.nonfinite.items():
        whole = plan.operations[dissection.blocks[name].operation].name
        counts[whole] = counts.get(whole, NonFinite(0, 0)).plus(more)
    return {name: _together(found) for name, found in pieces.items()}, counts


def _together(pieces: Sequence[Measured]) -> Measured:
    if len(pieces) == 1:
        return pieces[0]
    deltas = tuple(total(rows) for rows in zip(*(piece.deltas for piece in pieces), strict=True))
    products = tuple(sum_of(numbers) for numbers in zip(*(piece.products for piece in pieces), strict=True))
    return Measured(deltas, products)


Blocks = dict[str, list[tuple[range, tuple["DeltaSums", ...]]]]
"""By tensor: its blocks of rows, in order, and what each delta comes to in them."""


def _blocks_of(plan: Plan, dissection: Dissection, outcome: Outcome) -> Blocks:
    found: Blocks = {}
    for name, measured in outcome.measured.items():
        block = dissection.blocks[name]
        found.setdefault(plan.operations[block.operation].name, []).append((block.rows, measured.deltas))
    return {name: sorted(blocks, key=lambda each: each[0].start) for name, blocks in found.items() if len(blocks) > 1}


def _named(tensor: Tensor) -> Row:
    operation = tensor.operation
    return {
        "name": operation.name,
        **tensor.role._asdict(),
        "dtype": operation.dtype,
        "shape": list(operation.shape),
    }


def _warnings(plan: Plan, tensors: Sequence[Tensor], blocks: Blocks, k: int) -> Iterator[Notice]:
    """Yield what speaks against delta ``k``; all of it is free of scale."""
    delta = plan.recipe.deltas[k]
    post, base, new_base = (quoted(clipped(path)) for path in (delta.post, delta.base, plan.recipe.new_base))
    if not tensors:
        yield Notice("no-delta", "no tensor has a delta: nothing is merged")
        return
    whole = summed_up(tensors, k)
    if whole["changed"] == 0 and whole["left_out"] == 0:
        yield Notice("post-equals-base", f"{post} has the weights of {base}: there is no delta")
    else:
        yield from _of_layers(tensors, k, post)
    if whole["base_shift_norm"] == 0.0 and whole["base_norm"] and whole["left_out"] == 0:
        yield Notice("new-base-equals-base", f"{new_base} has the weights of {base}: with alpha 1 that gives {post}")
    if whole["infinities"] or whole["nans"]:
        counts = f"{whole['infinities']:,} infinities and {whole['nans']:,} NaNs"
        yield Notice("nonfinite", f"the output would have {counts} that are not simply copied: a merge stops at them")
    yield from _of_lineage(tensors, k, (post, base, new_base))
    for name, rows in blocks.items():
        yield from _of_rows(name, [(each, sums[k]) for each, sums in rows])


def _of_lineage(tensors: Sequence[Tensor], k: int, names: tuple[str, str, str]) -> Iterator[Notice]:
    """Yield where checkpoints are not relatives: told by matrices, since norms are alike in all models.

    Vocabularies count only where there is nothing else: new tokens change much, and say nothing of lineage.
    """
    post, base, new_base = names
    matrices = [tensor for tensor in tensors if len(tensor.operation.shape) > 1]
    matrices = [tensor for tensor in matrices if tensor.role.module not in {"embedding", "head"}] or matrices
    if not matrices:
        return
    whole = summed_up(matrices, k)
    reasons = []
    if (whole["relative_delta"] or 0.0) > FAR_DELTA:
        reasons.append(
            f"{post} is {whole['relative_delta']:.2f} times the norm of {base} away from it: it was probably"
            " trained from another model"
        )
    if whole["base_cosine"] is not None and whole["base_cosine"] < STRANGE:
        reasons.append(f"the cosine of {base} and {new_base} is {whole['base_cosine']:.2f}: they share no weights")
    elif (whole["relative_shift"] or 0.0) > FAR_SHIFT:
        reasons.append(f"{new_base} is {whole['relative_shift']:.2f} times the norm of {base} away from it")
    if reasons:
        yield Notice("wrong-lineage", f"{'; '.join(reasons)}. Of unrelated models the sum is noise")


def _of_layers(tensors: Sequence[Tensor], k: int, post: str) -> Iterator[Notice]:
    layers: dict[int, int] = {}
    for tensor in tensors:
        if tensor.role.layer is not None:
            layer, sums = tensor.role.layer, tensor.measured.deltas[k]
            layers[layer] = layers.get(layer, 0) + sums.changed + sums.left_out
    still = [str(layer) for layer in sorted(layers) if layers[layer] == 0]
    if still and len(still) < len(layers):
        yield Notice("layer-untouched", f"{post} has changed nothing in layer {listed(still)}, but in others it has")


def _of_rows(name: str, blocks: Sequence[tuple[range, DeltaSums]]) -> Iterator[Notice]:
    """Yield which blocks of rows of a vocabulary have changed far more than most."""
    changes = [math.sqrt(sums.squares / len(rows)) for rows, sums in blocks]
    usual = median(changes)
    found = [(rows, change) for (rows, _), change in zip(blocks, changes, strict=True) if change > STANDS_OUT * usual]
    if found and usual == 0.0:
        shown = [f"{rows.start} to {rows.stop - 1}" for rows, _ in found]
        yield Notice(
            "vocabulary-rows",
            f"of {quoted(clipped(name))} only these rows have changed: {listed(shown)}. Their tokens are new, or"
            " another vocabulary's",
        )
    elif found:
        shown = [f"{rows.start} to {rows.stop - 1} ({change / usual:.0f} times)" for rows, change in found]
        yield Notice(
            "vocabulary-rows",
            f"rows of {quoted(clipped(name))} have changed far more than the median of all: {listed(shown)}. Their"
            " tokens are new, or another vocabulary's",
        )
