"""One output that several runs make: some shards each, on as many machines as share its disk; then it is published.

Each run holds locks of its own shards alone, leaves a record of each that is finished, and publishes nothing. `commit`
does that, once all are there; and so does an ordinary merge of the same request, which makes those that are missing.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from paramdelta.checkpoint.discovery import STAGING
from paramdelta.checkpoint.wording import printable
from paramdelta.engine.inputs import require_backend
from paramdelta.engine.journal import RECORD, record_apart
from paramdelta.engine.location import refusals
from paramdelta.engine.output import OutputDirectory
from paramdelta.engine.receipt import is_complete
from paramdelta.engine.shard_locks import ShardLocks, ShardTakenError
from paramdelta.engine.staging import SHARED_RECIPE
from paramdelta.errors import OutputError, RecipeError
from paramdelta.merging import Conduct, budget_of, carry_out_one, stop_if
from paramdelta.planning.plan import make_plan
from paramdelta.planning.recipe import checked_path
from paramdelta.planning.recipe_file import read_recipes, write_recipe
from paramdelta.storage import platform, process
from paramdelta.storage.remote.stopping import ended_by
from paramdelta.storage.sink import FileSink

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Self

    from paramdelta.engine.progress import FinishedShard, Progress
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.plan import Plan
    from paramdelta.planning.recipe import Recipe
    from paramdelta.planning.warnings import PlanWarning
    from paramdelta.results import MergeResult

PATIENCE: Final = 60.0
"""Seconds to wait for the lock of an output: many runs of a job array begin at once, and hold it for a moment each."""


_AGAIN_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class ShardsResult:
    """What a run did that made some of an output's shards.

    Attributes:
        output: the directory that will hold the result.
        made: numbers of the shards that this run made, from 1 on; ``wanted`` of those that it was asked for.
        finished: how many shards are finished now, by whichever run; ``shards`` is how many there are.
        bytes_read: bytes of tensor data that this run read, and ``bytes_written`` that it wrote.
        seconds: wall-clock time.
        peak_rss_bytes: the most RAM that the process held, as the system reports it.
        nonfinite: how many elements of this run's shards became infinite or NaN; whoever publishes decides on them.
        already_complete: nothing was done, since the output is published.
    """

    output: str
    wanted: tuple[int, ...]
    made: tuple[int, ...]
    finished: int
    shards: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss_bytes: int
    nonfinite: int
    already_complete: bool


class SharedOutput:
    """Some shards of an output, while this process makes them.

    Entering takes their locks, and the output's own for a moment.

    Raises:
        OutputError: another run makes one of them or all, or OUT cannot be written.
    """

    def __init__(self, path: Path, plan: Plan, numbers: Iterable[int], patience: float = 0.0) -> None:
        self._path, self._plan, self._patience = path, plan, patience
        self._shards = [plan.shards[number] for number in numbers]
        self._staging = path / STAGING
        self._locks = ShardLocks(self._staging)
        self.finished: dict[str, FinishedShard] = {}

    def __enter__(self) -> Self:
        end = time.monotonic() + self._patience
        while True:
            try:
                self._begin()
            except ShardTakenError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_AGAIN_SECONDS)  # with no lock in hand: others need them
            else:
                return self

    def _begin(self) -> None:
        with OutputDirectory(self._path, self._plan, overwrite=False, patience=PATIENCE) as directory:
            try:
                with refusals(self._path):
                    self._locks.take(shard.name for shard in self._shards)
                    directory.staging.take_stock(overwrite=False)  # now that nobody else can finish one of them
                    self.finished = dict(directory.staging.finished)
                    self._remove_unfinished()
                missing = [shard for shard in self._shards if shard.name not in self.finished]
                directory.begin_some(missing, write_recipe(self._plan.pinned_recipe, None))
            except BaseException:
                self._locks.release()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._remove_unfinished()
        self._locks.release()

    def _remove_unfinished(self) -> None:
        """Remove what is not finished: first, durably, what might say that it is."""
        names = [shard.name for shard in self._shards if shard.name not in self.finished]
        records = [self._staging / f"{name}{RECORD}" for name in names]
        if any(os.path.lexists(record) for record in records):
            for record in records:
                record.unlink(missing_ok=True)
            platform.sync_directory(self._staging)
        for name in names:
            (self._staging / name).unlink(missing_ok=True)

    def create(self, shard: OutputShard) -> FileSink:
        """Return the sink of a shard, in the staging directory."""
        return FileSink(self._staging / shard.name, shard.size)

    def completed(self, finished: FinishedShard, /) -> None:
        """Record a finished shard, durably."""
        with refusals(self._path):
            record_apart(self._staging, finished, self._plan)
        self.finished[self._plan.shards[finished.number].name] = finished


def merge_shards(
    recipe: Recipe,
    output: str | os.PathLike[str],
    shards: Sequence[int],
    *,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    patience: float = 0.0,
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> ShardsResult:
    """Make some of the shards of an output that several runs make, and publish nothing.

    Shards that are finished already are not made again. Other arguments and errors as `paramdelta.merge`.

    Args:
        shards: numbers, from 1 on, in the order in which ``paramdelta plan`` lists them.
        patience: seconds to wait for a shard that another run is making.
    """
    started = time.perf_counter()
    how = Conduct.of(memory, workers, io, False, False, on_warning, on_progress, cancelled)
    path = Path(checked_path(output, "output"))
    with ended_by(cancelled):
        plan = make_plan(recipe)
    wanted = _checked(shards, plan)
    if on_warning is not None:
        for warning in plan.warnings:
            on_warning(warning)
    if is_complete(path, plan):
        return _published_already(path, plan, wanted, started)
    numbers = [number - 1 for number in wanted]
    process.raise_open_file_limit()
    with SharedOutput(path, plan, numbers, patience) as shared:
        budget = budget_of([plan], how.memory, workers, io, cancelled)
        stop_if(cancelled)
        require_backend(plan.files, io)
        from paramdelta.engine import feed, pipeline

        others = frozenset(range(len(plan.shards))) - frozenset(numbers)
        done = tuple(shard for shard in shared.finished.values() if shard.number not in others)
        variant = feed.Variant(plan, shared, done, others)
        [outcome] = pipeline.run_together([variant], budget, io, on_progress, cancelled)
        made = [shard.number for shard in outcome.shards if shard not in done]
    places = (place for number in made for place in plan.shards[number].operations)
    return ShardsResult(
        output=str(path),
        wanted=wanted,
        made=tuple(number + 1 for number in made),
        finished=len(shared.finished),
        shards=len(plan.shards),
        bytes_read=sum(plan.operations[place].bytes_read for place in places),
        bytes_written=sum(plan.shards[number].data_bytes for number in made),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=process.peak_rss(),
        nonfinite=sum(each.infinities + each.nans for each in outcome.nonfinite.values()),
        already_complete=False,
    )


def _checked(shards: Sequence[int], plan: Plan) -> tuple[int, ...]:
    """Return numbers of shards, in order, each once. Raises RecipeError where there is no such shard."""
    wanted = tuple(sorted(set(shards)))
    if not wanted or wanted[0] < 1 or wanted[-1] > len(plan.shards):
        raise RecipeError(
            f"shards: the output has shards 1 to {len(plan.shards)}, not all of {', '.join(map(str, wanted)) or 'none'}"
        )
    return wanted


def _published_already(path: Path, plan: Plan, wanted: tuple[int, ...], started: float) -> ShardsResult:
    number = len(plan.shards)
    spent, peak = time.perf_counter() - started, process.peak_rss()
    return ShardsResult(str(path), wanted, (), number, number, 0, 0, spent, peak, 0, already_complete=True)


def commit(
    output: str | os.PathLike[str],
    *,
    allow_nonfinite: bool = False,
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> MergeResult:
    """Publish an output of which several runs have made the shards, once all are there.

    One that is published already stays as it is.

    Raises:
        OutputError: shards are missing, a run is still making some, or nothing was begun there.
        ParamDeltaError: as `paramdelta.merge`.
    """
    path = Path(checked_path(output, "output"))
    begun, done = path / STAGING / SHARED_RECIPE, path / "recipe.yaml"
    if not begun.is_file() and not done.is_file():
        raise OutputError(
            "holds no shards that paramdelta merge --shards has made",
            file=printable(str(path)),
            remedy="Begin with that; a merge without --shards publishes by itself.",
        )
    recipe = read_recipes(begun if begun.is_file() else done)[0].recipe
    if begun.is_file():
        with ended_by(cancelled):
            _refuse_missing(path, make_plan(recipe))
    how = Conduct(None, None, "auto", False, allow_nonfinite, on_warning, on_progress, cancelled)
    return carry_out_one(recipe, str(path), how)


def _refuse_missing(path: Path, plan: Plan) -> None:
    """Raise OutputError where a shard is not finished, and say which."""
    if is_complete(path, plan):
        return
    numbers = missing_numbers(path, plan)
    if numbers:
        raise OutputError(
            f"{len(numbers)} of {len(plan.shards)} shards are not finished: {ranges_text(numbers)}",
            file=printable(str(path)),
            remedy=f"Make them: the same merge with --shards {ranges_text(numbers)}, or without, which publishes, too.",
        )


def missing_numbers(path: Path, plan: Plan) -> list[int]:
    """Return the numbers, from 1 on, of the shards that are still to be made. Raises OutputError as a merge does."""
    directory = OutputDirectory(path, plan, overwrite=False)
    directory.look()
    missing = directory.staging.missing()
    return [number for number, shard in enumerate(plan.shards, start=1) if shard in missing]


def ranges_text(numbers: Sequence[int]) -> str:
    """Return ascending numbers as one writes them: ``1-3,7``."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1][1:] = [number]
        else:
            pieces.append([number])
    return ",".join("-".join(map(str, piece)) for piece in pieces)
