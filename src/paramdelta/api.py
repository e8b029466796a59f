"""Plan, merge, sweep, inspect, score: a recipe in, a result out. The one place where the parts meet.

What needs numba is imported when a merge begins, so that planning and inspecting start at once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from paramdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from paramdelta.engine import budget as budgets
from paramdelta.engine.inputs import require_backend
from paramdelta.engine.location import free_space
from paramdelta.engine.output import OutputDirectory
from paramdelta.engine.receipt import is_complete
from paramdelta.errors import CancelledError, OutputError, ParamDeltaError, RecipeError
from paramdelta.merging import KEPT_BY_ANALYSIS, Conduct, budget_of, carry_out, carry_out_one, require_settings
from paramdelta.planning.dissection import dissect
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.recipe import Recipe, checked_path
from paramdelta.planning.units import format_size, parse_size
from paramdelta.planning.variants import by_alpha
from paramdelta.planning.warnings import PlanWarning
from paramdelta.results import MergeResult, SweepResult, Verification
from paramdelta.storage import process
from paramdelta.storage.remote.stopping import ended_by

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from paramdelta.engine.failure import Failure
    from paramdelta.engine.progress import Progress
    from paramdelta.insight.analysis import Analysis
    from paramdelta.insight.score_table import Table
    from paramdelta.insight.scores import TransferReport
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.policies import Policies


def inspect(path: str | os.PathLike[str]) -> Checkpoint:
    """Return what a checkpoint is, from its headers alone.

    Raises:
        CheckpointError: it is missing, damaged, or not a checkpoint.
    """
    return open_checkpoint(path)


def plan(
    post: str | os.PathLike[str],
    base: str | os.PathLike[str],
    new_base: str | os.PathLike[str],
    *,
    alpha: float = 1.0,
    alphas: Mapping[str, float] | None = None,
    policies: Policies | None = None,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Return what ``merge`` with the same arguments would do, from headers alone.

    Args:
        post: path of Θ_post: a directory, an index, or one ``.safetensors`` file.
        base: path of Θ_base, from which post was trained.
        new_base: path of Θ'_base.
        alpha: coefficient of the delta ``post - base``.
        alphas: other coefficients by pattern of tensor names (``*`` and ``?`` as in a shell); the last match counts.
        policies: what to do where the checkpoints do not fit each other; by default that is an error.
        dtype: float dtype of the output (``bf16``, ``f16``, ``f32``, ``f64``); the new base's own by default.
        shard_size: most tensor data in one output file (``"5GB"``); the new base's own shards by default.
        trust_remote_code: take the checkpoints' own Python files along, which loaders may run.

    Raises:
        RecipeError: an argument does not parse.
        CheckpointError: an input is missing, damaged or not supported.
        MismatchError: the checkpoints do not fit each other; lists all differences at once.
    """
    return make_plan(
        Recipe.of(
            post,
            base,
            new_base,
            alpha=alpha,
            alphas=alphas,
            policies=policies,
            dtype=dtype,
            shard_size=shard_size,
            trust_remote_code=trust_remote_code,
        )
    )


def merge(
    post: str | os.PathLike[str],
    base: str | os.PathLike[str],
    new_base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    alpha: float = 1.0,
    alphas: Mapping[str, float] | None = None,
    policies: Policies | None = None,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    trust_remote_code: bool = False,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> MergeResult:
    """Write ``new_base + alpha * (post - base)`` to the directory ``output``.

    With ``alpha`` 1 every element is the exact ``post - base + new_base``, rounded once, to nearest, ties to even. See
    `plan` for the first arguments.

    Args:
        output: a directory that does not exist, or is empty.
        memory: most RAM that the whole process may hold (``"512MB"``, or bytes); chosen for the machine by default.
        workers: number of worker threads; chosen for the machine by default. No byte of the output depends on it.
        io: how inputs are read: ``auto``, ``mmap``, ``pread`` or ``direct``.
        overwrite: replace what an earlier merge wrote to ``output``.
        allow_nonfinite: publish a result in which elements became infinite or NaN.
        on_warning: called with each of the plan's warnings, before any tensor is read.
        on_progress: called from this thread after every window.
        cancelled: set it, from any thread, to stop the merge.

    Raises:
        RecipeError: an argument does not parse.
        CheckpointError: an input is missing, damaged or not supported.
        MismatchError: the checkpoints do not fit each other.
        OutputError: the output exists, is an input, is locked by another run, or cannot be written.
        InputChangedError: an input changed while it was read.
        NonFiniteError: the result holds new infinities or NaNs.
        BudgetError: ``memory`` is below what works.
        CancelledError: ``cancelled`` was set.
    """
    recipe = Recipe.of(
        post,
        base,
        new_base,
        alpha=alpha,
        alphas=alphas,
        policies=policies,
        dtype=dtype,
        shard_size=shard_size,
        trust_remote_code=trust_remote_code,
    )
    return merge_recipe(
        recipe,
        output,
        memory=memory,
        workers=workers,
        io=io,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        on_warning=on_warning,
        on_progress=on_progress,
        cancelled=cancelled,
    )


def merge_recipe(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> MergeResult:
    """Carry out any recipe, with one delta or several. Arguments and errors as `merge`."""
    how = Conduct.of(memory, workers, io, overwrite, allow_nonfinite, on_warning, on_progress, cancelled)
    return carry_out_one(recipe, checked_path(output, "output"), how)


def sweep(
    post: str | os.PathLike[str],
    base: str | os.PathLike[str],
    new_base: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    coefficients: Iterable[float],
    *,
    alphas: Mapping[str, float] | None = None,
    policies: Policies | None = None,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    trust_remote_code: bool = False,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> SweepResult:
    """Write ``new_base + alpha * (post - base)`` for several alphas, and read every input once.

    Each output is what `merge` writes with that alpha, and lies in ``directory`` as ``alpha-0.5``, ``alpha-1``, …: the
    shortest decimal that means this very number.

    Args:
        coefficients: the alphas; each once.
        alphas: as in `merge`, the same in all outputs; so are all other arguments.

    Raises:
        RecipeError: as `merge`, and all others too, where what is wrong concerns all outputs or none can be begun.
            What keeps a single one from being published is in the result.
    """
    recipe = Recipe.of(
        post,
        base,
        new_base,
        alphas=alphas,
        policies=policies,
        dtype=dtype,
        shard_size=shard_size,
        trust_remote_code=trust_remote_code,
    )
    return sweep_recipes(
        by_alpha(recipe, coefficients, checked_path(directory, "output")),
        memory=memory,
        workers=workers,
        io=io,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        on_warning=on_warning,
        on_progress=on_progress,
        cancelled=cancelled,
    )


def sweep_recipes(
    recipes: Mapping[str, Recipe],
    *,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> SweepResult:
    """Carry out recipes that differ in coefficients alone in one pass. Other arguments and errors as `sweep`.

    Args:
        recipes: by the directory that each one's output is written to.
    """
    how = Conduct.of(memory, workers, io, overwrite, allow_nonfinite, on_warning, on_progress, cancelled)
    return carry_out(recipes, how)


def analyze(
    post: str | os.PathLike[str],
    base: str | os.PathLike[str],
    new_base: str | os.PathLike[str],
    *,
    policies: Policies | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> Analysis:
    """Return what the delta ``post - base`` comes to, beside what has become of its base: norms, angles, counts.

    All three are read as in `merge`, and the same arithmetic is done; nothing is written.

    Args:
        policies: what to do where the checkpoints do not fit each other; by default that is an error.
        memory: most RAM that the whole process may hold, as in `merge`; so are all other arguments.

    Raises:
        RecipeError: an argument does not parse.
        CheckpointError: an input is missing, damaged or not supported.
        MismatchError: the checkpoints do not fit each other.
        InputChangedError: an input changed while it was read.
        BudgetError: ``memory`` is below what works.
        CancelledError: ``cancelled`` was set.
    """
    recipe = Recipe.of(post, base, new_base, policies=policies)
    return analyze_recipe(recipe, memory=memory, workers=workers, io=io, on_progress=on_progress, cancelled=cancelled)


def analyze_recipe(
    recipe: Recipe,
    *,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> Analysis:
    """Return what the deltas of any recipe come to, and the angles between them. Arguments and errors as `analyze`."""
    started = time.perf_counter()
    require_settings(io, workers)
    most = None if memory is None else parse_size(memory, "memory")
    with ended_by(cancelled):
        made = make_plan(recipe)
    if on_warning is not None:
        for warning in made.warnings:
            on_warning(warning)
    process.raise_open_file_limit()
    dissection = dissect(made)
    budget = budget_of([dissection.plan], most, workers, io, cancelled, KEPT_BY_ANALYSIS)
    require_backend(made.files, io)
    from paramdelta.engine import pipeline
    from paramdelta.engine.discard import Discard
    from paramdelta.insight.analysis import analyse

    outcome = pipeline.run(dissection.plan, budget, io, Discard(), on_progress, cancelled)
    seconds = time.perf_counter() - started
    return analyse(made, dissection, outcome, seconds=seconds, peak_rss_bytes=process.peak_rss())


def verify(
    output: str | os.PathLike[str],
    *,
    recompute: bool = False,
    sample: float | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> Verification:
    """Read a finished output again and check it against its receipt: digests, headers, index, sidecars.

    What is wrong is in the result; once something is, an error of the recomputation is only one thing more.

    Args:
        output: the directory that a merge has written.
        recompute: also compute every element again, from the inputs that ``recipe.yaml`` names.
        sample: recompute a random share of the tensors only, more than 0 and at most 1; implies ``recompute``.
        memory: most RAM that the process may hold, as in `merge`; it bounds the recomputation, which holds most.
        workers: number of threads; chosen for the machine by default.
        io: how files are read: ``auto``, ``mmap``, ``pread`` or ``direct``.
        on_progress: called from this thread every now and then.
        cancelled: set it, from any thread, to stop.

    Raises:
        CheckpointError: there is no receipt, or it cannot be read; or an input is missing.
        MismatchError: the inputs do not make an output of this layout any more.
        VerificationError: not everything was read, though nothing said why.
        BudgetError: ``memory`` is below what works, or the system gives no more.
        CancelledError: ``cancelled`` was set.
    """
    from paramdelta.engine.failure import Failure
    from paramdelta.engine.verify import check

    started = time.perf_counter()
    require_settings(io, workers)
    if sample is not None and not 0 < sample <= 1:
        raise RecipeError(f"sample: must be more than 0 and at most 1, not {sample}")
    most = None if memory is None else parse_size(memory, "memory")
    path = Path(checked_path(output, "output"))
    process.raise_open_file_limit()
    checked = check(path, workers or budgets.default_workers(), io, on_progress, cancelled)
    failures, recomputed = list(checked.failures), 0
    if recompute or sample is not None:
        try:
            found, recomputed = _compute_again(path, sample, most, workers, io, on_progress, cancelled)
            failures += found
        except CancelledError:
            raise
        except ParamDeltaError as error:
            if not failures:
                raise
            failures.append(Failure.of(error, path, "not computed again: "))
    return Verification(
        output=str(path),
        ok=not failures,
        shards=checked.shards,
        bytes_read=checked.bytes_read,
        recomputed=recomputed,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=process.peak_rss(),
        failures=tuple(failures),
        strangers=checked.strangers,
    )


def _compute_again(
    path: Path,
    sample: float | None,
    memory: int | None,
    workers: int | None,
    io: str,
    on_progress: Callable[[Progress], None] | None,
    cancelled: threading.Event | None,
) -> tuple[list[Failure], int]:
    """Return where an output is not what the inputs of its recipe give, and how many tensors were computed."""
    from paramdelta.engine import recompute as again
    from paramdelta.planning.recipe_file import read_recipes

    with ended_by(cancelled):
        made = make_plan(read_recipes(path / "recipe.yaml")[0].recipe)
    again.require_same_layout(made, path)
    work = again.whole(made) if sample is None else again.sample(made, sample, time.time_ns())
    budget = budget_of([work.plan], memory, workers, io, cancelled)
    failures = again.recompute(work, path, budget, io, on_progress, cancelled)
    return failures, sum(len(shard.begins) for shard in work.plan.shards)


def score(
    table: str | os.PathLike[str] | Table,
    *,
    min_gain: float | None = None,
    plot: str | os.PathLike[str] | None = None,
) -> TransferReport:
    """Return how much of post-training a merge carries over, from a table of benchmark scores.

    Args:
        table: path of a CSV file with the columns ``benchmark``, ``new_base``, ``merged`` and ``reference``, and
            ``group`` and ``seed`` where there are several; or what it holds.
        min_gain: the gain from new base to reference, up or down, in points, below which a benchmark is left out of the
            mean share that is recovered; by default one hundredth of the largest score in the table.
        plot: also draw a chart to this file, which is replaced: ``.svg``, ``.png`` or ``.pdf``. Needs matplotlib.

    Raises:
        CheckpointError: the table is missing or cannot be read.
        RecipeError: it does not parse, or an argument does not.
        OutputError: the chart cannot be written, or matplotlib is needed and not installed.
    """
    from paramdelta.insight.score_plot import checked_plot, write_plot
    from paramdelta.insight.score_table import Table, read_table
    from paramdelta.insight.scores import transfer_report

    path = None if plot is None else checked_plot(plot)
    report = transfer_report(table if isinstance(table, Table) else read_table(table), min_gain)
    if path is not None:
        write_plot(report, path)
    return report


def estimate_memory(plan: Plan) -> int:
    """Return the bytes of RAM that a merge holds at most by default on this machine."""
    kernels = 32_000_000  # interpreter and machine code, as measured
    used = kernels + _manifest_bytes(plan)
    return budgets.decide(None, None, budgets.Shape.of(plan.operations), used, used).memory


def _manifest_bytes(plan: Plan) -> int:
    return 2_000 * len(plan.operations)


def warnings_for(
    plan: Plan,
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    memory_bytes: int | None = None,
) -> list[PlanWarning]:
    """Return the plan's own warnings and those of this machine: a refused or unfinished output, too little disk or RAM.

    Args:
        output: where the output would go; by default only the current directory's disk is looked at.
        overwrite: whether the merge would replace what an earlier one wrote there.
        memory_bytes: what `estimate_memory` says, where that is known already.
    """
    warnings = list(plan.warnings)
    missing: Sequence[OutputShard] = plan.shards
    place = Path(output if output is not None else ".")
    if output is not None and (overwrite or not is_complete(place, plan)):
        directory = OutputDirectory(place, plan, overwrite=overwrite)
        try:
            directory.look()
        except OutputError as error:
            warnings.append(PlanWarning("output", " ".join(str(error).split())))
        missing = directory.staging.missing()
        if len(missing) < len(plan.shards):
            done = f"{len(plan.shards) - len(missing)} of {len(plan.shards)} shards are finished"
            warnings.append(PlanWarning("unfinished", f"{done} and kept: a merge goes on from there"))
    size, free = sum(shard.size for shard in missing), free_space(place)
    if free < size:
        warnings.append(PlanWarning("disk", f"the output takes {format_size(size)}, {format_size(free)} are free"))
    needed = estimate_memory(plan) if memory_bytes is None else memory_bytes
    available = budgets.available_memory()
    if available < needed:
        warnings.append(
            PlanWarning(
                "memory",
                f"the merge holds {format_size(needed)} of RAM, {format_size(available)} are available",
            )
        )
    return warnings
