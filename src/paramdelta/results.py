"""What merges and verifications come to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paramdelta.checkpoint.wording import clipped, printable
from paramdelta.engine.receipt import counts_of, deltas_of, losses_of, nonfinite_of, read_receipt
from paramdelta.errors import NonFiniteError, ParamDeltaError
from paramdelta.storage import process

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paramdelta.engine.budget import Budget
    from paramdelta.engine.failure import Failure
    from paramdelta.engine.progress import FinishedShard, Outcome
    from paramdelta.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did.

    Attributes:
        output: the directory that holds the result.
        tensors: number of tensors, and ``shards`` of files that hold them.
        bytes_read: bytes of tensor data that this run read.
        bytes_written: bytes of tensor data in the output.
        seconds: wall-clock time of the whole merge, planning and final sync included.
        peak_rss_bytes: the most RAM that the process held, as the system reports it.
        io: the backends that read the inputs, comma-separated.
        resumed_shards: shards that an earlier run had already finished.
        nonfinite: new infinities and NaNs by tensor, ``{"infinities": …, "nans": …}``.
        already_complete: nothing was done, since the output was there already.
        requantised: what was lost by writing block-scaled FP8, None where none was written: ``tensors``,
            ``relative_error`` (root of the sum of squared errors over that of squared results, in blocks that were not
            copied), ``worst_tensor`` and its ``worst_relative_error``.
        deltas: of each delta, in all tensors together, ``delta_norm``, ``base_shift_norm``, ``cosine``, … as
            `paramdelta.insight.norms.describe` returns; the receipt has them for each tensor.

    ``workers`` and ``window_bytes`` (bytes of output in one window) are how the budget was used.
    """

    output: str
    tensors: int
    shards: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    io: str
    workers: int
    window_bytes: int
    resumed_shards: int
    nonfinite: dict[str, dict[str, int]]
    already_complete: bool
    requantised: dict[str, Any] | None
    deltas: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What merges in one pass over their inputs did.

    Attributes:
        merges: by output, the result, or the error for which it is not published. The ``bytes_read`` of a result are
            those that were read for it, whether for it alone or not; its ``seconds`` are those of the pass until then.
        bytes_read: bytes of tensor data that this run read, for all of them together.
        seconds: wall-clock time of it all.
        peak_rss_bytes: the most RAM that the process held, as the system reports it.
    """

    merges: dict[str, MergeResult | ParamDeltaError]
    bytes_read: int
    seconds: float
    peak_rss_bytes: int

    @property
    def failures(self) -> dict[str, ParamDeltaError]:
        """Errors by output, of those that are not there."""
        return {path: error for path, error in self.merges.items() if isinstance(error, ParamDeltaError)}


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of verifying an output.

    Attributes:
        ok: whether everything is as it should be; else ``failures`` says what is not.
        shards: number of files with tensors.
        bytes_read: bytes of the output's files that were read for digests.
        recomputed: tensors whose elements were computed again from the inputs.
        strangers: names of files in the output that its receipt does not list, and so nobody can say are right; hidden
            ones and directories do not count.
        seconds: wall-clock time.
        peak_rss_bytes: the most RAM that the process held, as the system reports it.
    """

    output: str
    ok: bool
    shards: int
    bytes_read: int
    recomputed: int
    seconds: float
    peak_rss_bytes: int
    failures: tuple[Failure, ...]
    strangers: tuple[str, ...] = ()


def published(
    path: Path,
    plan: Plan,
    started: float,
    outcome: Outcome,
    budget: Budget,
    resumed: Sequence[FinishedShard],
    deltas: list[dict[str, Any]],
) -> MergeResult:
    """Return the result of a run that published an output."""
    return MergeResult(
        output=str(path),
        tensors=len(plan.operations),
        shards=len(plan.shards),
        bytes_read=bytes_read_for(plan, [resumed]),
        bytes_written=plan.bytes_written,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=process.peak_rss(),
        io=", ".join(outcome.backends),
        workers=budget.workers,
        window_bytes=budget.window_bytes,
        resumed_shards=len(resumed),
        nonfinite=counts_of(outcome),
        already_complete=False,
        requantised=losses_of(outcome),
        deltas=deltas,
    )


def bytes_read_for(plan: Plan, resumed: Sequence[Sequence[FinishedShard]]) -> int:
    """Return the bytes of tensor data that a run has read for outputs which had these shards already.

    Args:
        plan: of any of them.
    """
    done = set.intersection(*({shard.number for shard in shards} for shards in resumed))
    places = (place for n, shard in enumerate(plan.shards) if n not in done for place in shard.operations)
    return sum(plan.operations[place].bytes_read for place in places)


def already_complete(path: Path, plan: Plan, started: float) -> MergeResult:
    """Return the result of a run that found its output finished."""
    receipt = read_receipt(path)
    return MergeResult(
        output=str(path),
        tensors=len(plan.operations),
        shards=len(plan.shards),
        bytes_read=0,
        bytes_written=plan.bytes_written,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=process.peak_rss(),
        io="",
        workers=0,
        window_bytes=0,
        resumed_shards=0,
        nonfinite=nonfinite_of(receipt),
        already_complete=True,
        requantised=receipt.get("requantised") if receipt is not None else None,
        deltas=deltas_of(receipt),
    )


def nonfinite_error(plan: Plan, outcome: Outcome) -> NonFiniteError:
    """Return the error that names tensors in which elements became infinite or NaN."""
    shown = [
        f"  {printable(clipped(name))}: {n.infinities:,} Inf, {n.nans:,} NaN"
        for name, n in list(outcome.nonfinite.items())[:10]
    ]
    more = len(outcome.nonfinite) - len(shown)
    lines = ["elements became infinite or NaN that no input simply passes on:", *shown]
    narrow = {each.dtype for each in plan.operations if each.name in outcome.nonfinite} & {"F16", "F8_E4M3", "F8_E5M2"}
    wider = f" Numbers may be too large for {', '.join(sorted(narrow))}: --dtype bf16 holds them." if narrow else ""
    return NonFiniteError(
        "\n".join([*lines, f"  and {more:,} more tensors"] if more else lines),
        tensor=next(iter(outcome.nonfinite)),
        remedy=f"Nothing was published. Check the inputs, or use --allow-nonfinite to publish such a result.{wider}",
    )
