"""Merges carried out: those that differ in coefficients alone share one pass over their inputs.

What ends the pass ends it for all of them, and the finished shards of each are kept. What concerns one output alone
once all are made, like infinities in it, keeps that one from being published and no other. A single merge is the case
of one.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from paramdelta.engine import budget as budgets
from paramdelta.engine.inputs import largest_window, require_backend, usual_workers
from paramdelta.engine.output import OutputDirectory, begin_together
from paramdelta.engine.receipt import compose_receipt, is_complete, losses_of
from paramdelta.engine.staging import kept_text, sweep
from paramdelta.errors import CancelledError, InputChangedError, NonFiniteError, ParamDeltaError, RecipeError
from paramdelta.insight.summary import statistics_of
from paramdelta.planning.recipe import checked_path
from paramdelta.planning.units import parse_size
from paramdelta.planning.variants import make_plans, refuse_others
from paramdelta.results import SweepResult, already_complete, bytes_read_for, nonfinite_error, published
from paramdelta.storage import process
from paramdelta.storage.remote.stopping import ended_by
from paramdelta.storage.source import IO_CHOICES

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from paramdelta.engine.budget import Budget
    from paramdelta.engine.feed import Variant
    from paramdelta.engine.progress import Outcome, Progress
    from paramdelta.planning.plan import Plan
    from paramdelta.planning.recipe import Recipe
    from paramdelta.planning.warnings import PlanWarning
    from paramdelta.results import MergeResult

KEPT_BY_MERGE: Final = 1_000
"""Bytes for what is counted of each delta of a tensor until an output is published, as measured."""

KEPT_BY_ANALYSIS: Final = 4_500
"""The same until an analysis is written: rows as plain data, and as text."""


@dataclass(frozen=True, slots=True)
class Conduct:
    """How merges are carried out, and whom to tell: what the public ``merge`` takes beside a recipe and an output."""

    memory: int | None
    workers: int | None
    io: str
    overwrite: bool
    allow_nonfinite: bool
    on_warning: Callable[[PlanWarning], None] | None
    on_progress: Callable[[Progress], None] | None
    cancelled: threading.Event | None

    @classmethod
    def of(cls, memory: str | int | None, workers: int | None, io: str, *rest: Any) -> Self:
        """Return what the arguments of the public ``merge`` say. Raises RecipeError where one does not parse."""
        require_settings(io, workers)
        return cls(None if memory is None else parse_size(memory, "memory"), workers, io, *rest)


def carry_out(wanted: Mapping[str, Recipe], how: Conduct) -> SweepResult:
    """Carry out recipes that differ in coefficients alone, each to its output. Outputs that are there stay.

    Raises:
        ParamDeltaError: of any kind, for what ends them all.
    """
    with ended_by(how.cancelled):
        return _carry_out(wanted, how)


def carry_out_one(recipe: Recipe, output: str, how: Conduct) -> MergeResult:
    """Carry out one recipe; raise what keeps its output from being there. Otherwise as `carry_out`."""
    [made] = carry_out({output: recipe}, how).merges.values()
    if isinstance(made, ParamDeltaError):
        raise made
    return made


def _carry_out(wanted: Mapping[str, Recipe], how: Conduct) -> SweepResult:
    started = time.perf_counter()
    paths = [Path(checked_path(output, "output")) for output in wanted]
    if not paths:
        raise RecipeError("alpha: at least one is needed")
    _refuse_twins(paths)
    refuse_others([*wanted.values()], [str(path) for path in paths])
    plans = make_plans([*wanted.values()])
    if how.on_warning is not None:
        for warning in dict.fromkeys(warning for made in plans for warning in made.warnings):
            how.on_warning(warning)
    found: dict[Path, MergeResult | ParamDeltaError] = {}
    for path, made in zip(paths, plans, strict=True):
        if is_complete(path, made) and not how.overwrite:
            sweep(path, made)
            found[path] = already_complete(path, made, started)
    missing = {path: made for path, made in zip(paths, plans, strict=True) if path not in found}
    bytes_read = 0
    if missing:
        merged, bytes_read = _merge(missing, how, started)
        found |= merged
    return SweepResult(
        merges={str(path): found[path] for path in paths},
        bytes_read=bytes_read,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=process.peak_rss(),
    )


def _refuse_twins(paths: Sequence[Path]) -> None:
    names = {os.path.normcase(os.path.abspath(path)) for path in paths}  # noqa: PTH100 (not there yet)
    if len(names) < len(paths):
        raise RecipeError("two merges have the same output", remedy="Give each an output of its own.")


def _merge(
    plans: Mapping[Path, Plan], how: Conduct, started: float
) -> tuple[dict[Path, MergeResult | ParamDeltaError], int]:
    """Make outputs in one pass; return what each came to, and how many bytes were read for them."""
    process.raise_open_file_limit()
    first = next(iter(plans.values()))
    directories = [OutputDirectory(path, plan, overwrite=how.overwrite) for path, plan in plans.items()]
    try:
        with contextlib.ExitStack() as held:
            for directory in directories:
                held.enter_context(directory)
            stop_if(how.cancelled)
            budget = budget_of([*plans.values()], how.memory, how.workers, how.io, how.cancelled)
            stop_if(how.cancelled)
            require_backend(first.files, how.io)
            begin_together(directories)
            from paramdelta.engine import feed, pipeline

            resumed = [tuple(directory.staging.finished.values()) for directory in directories]
            variants = [*map(feed.Variant, plans.values(), directories, resumed)]
            outcomes = pipeline.run_together(variants, budget, how.io, how.on_progress, how.cancelled)
            made = {
                directory.path: _publish(directory, variant, outcome, how, budget, started)
                for directory, variant, outcome in zip(directories, variants, outcomes, strict=True)
            }
    except ParamDeltaError as error:
        _tell_what_is_kept(error, directories)
        raise
    return made, bytes_read_for(first, resumed)


def _publish(
    directory: OutputDirectory, variant: Variant, outcome: Outcome, how: Conduct, budget: Budget, started: float
) -> MergeResult | ParamDeltaError:
    """Publish an output that is made; return its result, or why it is not there."""
    plan = variant.plan
    try:
        if outcome.nonfinite and not how.allow_nonfinite:
            raise nonfinite_error(plan, outcome)
        documents = _documents(plan, directory.path, losses_of(outcome))
        statistics = statistics_of(plan, outcome)
        receipt = compose_receipt(plan, outcome, documents, directory.sidecar_digests, statistics)
        directory.publish(receipt, documents)
    except ParamDeltaError as error:
        _tell_what_is_kept(error, [directory])
        return error
    return published(directory.path, plan, started, outcome, budget, variant.done, statistics["total"])


def _tell_what_is_kept(error: ParamDeltaError, directories: Sequence[OutputDirectory]) -> None:
    needs = {NonFiniteError: "--allow-nonfinite", InputChangedError: "the inputs as they were"}
    kept = kept_text([directory.staging for directory in directories], needs.get(type(error)))
    error.remedy = " ".join(filter(None, (error.remedy, kept))) or None


def require_settings(io: str, workers: int | None) -> None:
    """Raise RecipeError where one is none that there is."""
    if io not in IO_CHOICES:
        raise RecipeError(f"io: {io!r} is none of {', '.join(IO_CHOICES)}")
    if workers is not None and workers < 1:
        raise RecipeError(f"workers: must be at least 1, not {workers}")


def stop_if(cancelled: threading.Event | None) -> None:
    """Raise CancelledError where the run is to stop."""
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("stopped on request")


def budget_of(
    plans: Sequence[Plan],
    memory: int | None,
    workers: int | None,
    io: str,
    cancelled: threading.Event | None = None,
    kept: int = KEPT_BY_MERGE,
) -> budgets.Budget:
    """Return the budget of plans that are carried out together, once all is in memory whose size is not ours to choose.

    Args:
        kept: bytes that are kept of each delta of a tensor until the end.

    Raises:
        BudgetError: the memory is too small.
        CancelledError: the run was cancelled.
    """
    from paramdelta.engine import kernels

    combinations = {
        (tuple(operand.dtype for operand in part.operands), part.alphas, operation.dtype)
        for plan in plans
        for operation in plan.operations
        for part in operation.parts
        if not operation.is_scaled
    }
    summed = [each for each in combinations if each[0] != each[2:]]  # bytes that are only copied need no loop
    scaled = any(operation.is_scaled for operation in plans[0].operations)
    for prepare in kernels.preparations(summed, scaled=scaled):
        stop_if(cancelled)
        prepare()
    counted = kept * len(plans[0].operations) * len(plans[0].recipe.deltas) * len(plans)
    used = psutil.Process().memory_info().rss + counted
    shape, largest = budgets.Shape.of(plans[0].operations, len(plans)), largest_window(plans[0], io)
    return budgets.decide(memory, workers, shape, used, process.peak_rss(), largest, usual_workers(plans[0]))


def _documents(plan: Plan, path: Path, losses: dict[str, Any] | None) -> dict[str, bytes]:
    from paramdelta.planning.card import model_card
    from paramdelta.planning.recipe_file import write_recipe

    recipe = write_recipe(plan.pinned_recipe, path)
    lost = None if losses is None else float(losses["relative_error"])
    return {"recipe.yaml": recipe.encode(), "README.md": model_card(plan, lost).encode()}
