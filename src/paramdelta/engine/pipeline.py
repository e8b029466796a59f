"""Windows through workers: read, fuse, write, each in its place, in any order, within the budget.

Every worker takes the next window, reads what it needs, computes it and writes it, in buffers of its own that last for
the whole run; reading, computing and writing overlap because there are more workers than processors. A run may make
several outputs that differ in coefficients alone: each window is read once, and made for every output that lacks it.
The calling thread hands out progress, finishes shards, and is where Ctrl-C arrives.
"""

from __future__ import annotations

import math
import queue
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from paramdelta.engine.feed import Feed, Lane, Variant
from paramdelta.engine.inputs import Inputs, check_identity, files_of, last_uses
from paramdelta.engine.progress import FinishedShard, NonFinite, Outcome, Progress, Requantised
from paramdelta.engine.worker import Event, Worker, Written
from paramdelta.errors import BudgetError, CancelledError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from paramdelta.engine.budget import Budget
    from paramdelta.engine.sums import Sums
    from paramdelta.engine.target import Target
    from paramdelta.planning.plan import Plan

_POLL_SECONDS: Final = 0.2


def run(
    plan: Plan,
    budget: Budget,
    io: str,
    target: Target,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
    done: Iterable[FinishedShard] = (),
) -> Outcome:
    """Carry a plan out.

    Args:
        target: where the shards go.
        done: shards that an earlier run has finished.

    Other arguments and errors as `run_together`.
    """
    [outcome] = run_together([Variant(plan, target, tuple(done))], budget, io, on_progress, cancelled)
    return outcome


def run_together(
    variants: Sequence[Variant],
    budget: Budget,
    io: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> list[Outcome]:
    """Carry out plans that differ in coefficients alone, and read no byte more than once for all of them.

    Args:
        variants: at least one; what ends the run for one of them ends it for all.
        budget: for as many outputs.
        io: ``auto``, ``mmap``, ``pread`` or ``direct``.
        on_progress: called from this thread, after every window.
        cancelled: set it, from any thread, to stop the run.

    Raises:
        InputChangedError: an input is not what it was when the plan was made.
        CheckpointError: an input cannot be read.
        OutputError: the output cannot be written.
        CancelledError: the run was cancelled.
    """
    plan = variants[0].plan
    inputs = Inputs(plan.files, io)
    lanes = [Lane(number, variant) for number, variant in enumerate(variants)]
    feed = Feed(lanes, budget)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    workers: list[Worker] = []
    completion = _Completion(lanes, inputs)
    try:
        _start(workers, len(lanes), budget, inputs, feed, events)
        for written in _written_windows(events, len(workers), cancelled):
            completion.add(written)
            if on_progress is not None:
                on_progress(completion.progress)
    finally:
        feed.stop()
        inputs.interrupt()
        _close_behind(workers, inputs, feed)
    backends = tuple(sorted(inputs.backends))
    return [Outcome(tally.all_finished(), backends) for tally in completion.tallies]


def _start(
    workers: list[Worker],
    outputs: int,
    budget: Budget,
    inputs: Inputs,
    feed: Feed,
    events: queue.SimpleQueue[Event],
) -> None:
    """Start the budget's workers, each added to ``workers`` before it runs: none is ever forgotten."""
    try:
        for number in range(budget.workers):
            workers.append(Worker(number, outputs, budget, inputs, feed, events))
            workers[-1].start()
    except (OSError, RuntimeError, MemoryError) as error:  # no address space, or no more threads
        raise BudgetError(
            f"only {number} of {budget.workers} workers could be started: {error}",
            remedy="Use fewer --workers, or raise the limits of this process (ulimit -v, ulimit -u).",
        ) from error


def _close_behind(workers: Sequence[Worker], inputs: Inputs, feed: Feed) -> None:
    """Close inputs and sinks once no worker uses them. A second Ctrl-C waits for nobody: a thread does it then."""

    def close() -> None:
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        feed.abandon()
        inputs.close()

    try:
        close()
    except KeyboardInterrupt:
        threading.Thread(target=close, name="paramdelta-close", daemon=True).start()
        raise


def _written_windows(
    events: queue.SimpleQueue[Event], running: int, cancelled: threading.Event | None
) -> Iterator[Written]:
    """Yield windows as they are written, until the last worker has ended; raise what went wrong in any of them."""
    while running:
        if cancelled is not None and cancelled.is_set():
            raise CancelledError("stopped on request")
        try:
            event = events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if event is None:
            running -= 1
        elif isinstance(event, BaseException):
            raise event
        else:
            yield event


class _Completion:
    """Counts what is written; finishes each shard after its last window, and closes inputs that are no longer read."""

    def __init__(self, lanes: Sequence[Lane], inputs: Inputs) -> None:
        self._inputs = inputs
        self._ended_files = last_uses(lanes[0].plan)
        self._complete_up_to = 0
        self.tallies = [_Tally(lane) for lane in lanes]
        total = sum(lane.plan.shards[number].size for lane in lanes for number in lane.wanted)
        resumed = total - sum(sum(tally.missing) for tally in self.tallies)
        shards, done = sum(len(lane.wanted) for lane in lanes), sum(len(lane.done) for lane in lanes)
        self.progress = Progress(resumed, total, done, shards, resumed)

    def add(self, written: Written) -> None:
        """Take note of a written window. Raises as `run_together`."""
        is_last = self.tallies[written.lane].add(written)
        if is_last:
            self._close_inputs()
        done = self.progress.done + written.window.end - written.window.begin
        self.progress = replace(self.progress, done=done, shards_done=self.progress.shards_done + is_last)

    def _close_inputs(self) -> None:
        """Close what no later shard reads, once all outputs have all shards up to there."""
        while self._complete_up_to < len(self._ended_files):
            if any(tally.missing[self._complete_up_to] for tally in self.tallies):
                return
            self._inputs.close(self._ended_files[self._complete_up_to])
            self._complete_up_to += 1


class _Tally:
    """What is written of one output, and counted in it.

    Attributes:
        missing: bytes of each shard that are still to be written.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane, self._plan = lane, lane.plan
        self.missing = [shard.size if n in lane.missing else 0 for n, shard in enumerate(lane.plan.shards)]
        self._nonfinite: dict[int, NonFinite] = {}
        self._sums: dict[int, Sums] = {}
        self._finished = list(lane.done)

    def all_finished(self) -> tuple[FinishedShard, ...]:
        """Return the shards that are finished, in order, those of earlier runs too."""
        return tuple(sorted(self._finished, key=lambda shard: shard.number))

    def add(self, written: Written) -> bool:
        """Take note of a written window; return whether its shard is finished now. Raises as `run_together`."""
        window = written.window
        for place, counts in written.nonfinite.items():
            self._nonfinite[place] = self._nonfinite.get(place, NonFinite(0, 0)).plus(counts)
        for place, sums in written.sums.items():
            if place in self._sums:
                self._sums[place].add(sums)
            else:
                self._sums[place] = sums
        self.missing[window.shard] -= window.end - window.begin
        if self.missing[window.shard]:
            return False
        self._finish(window.shard)
        return True

    def _finish(self, number: int) -> None:
        shard = self._plan.shards[number]
        self._lane.take_sink(number).finish()
        for place in files_of(self._plan, shard):
            check_identity(self._plan.files[place])
        finished = self._sum_up(number)
        self._finished.append(finished)
        self._lane.target.completed(finished)

    def _sum_up(self, number: int) -> FinishedShard:
        operations, places = self._plan.operations, self._plan.shards[number].operations
        return FinishedShard(
            number,
            self._lane.digesters.pop(number).result(),
            {operations[place].name: self._nonfinite.pop(place) for place in places if place in self._nonfinite},
            tuple(self._sum_bands(place) for place in places if operations[place].blocks is not None),
            {operations[place].name: self._sums.pop(place).measured for place in places if place in self._sums},
        )

    def _sum_bands(self, place: int) -> Requantised:
        """Return what a tensor lost, and forget its scales: they are written."""
        operation = self._plan.operations[place]
        count = -(-operation.elements // operation.grain) if operation.elements else 0
        losses = self._lane.losses.pop(place, {})
        cut = [number for number in range(count) if number not in losses]  # rows whose scales a boundary cuts
        for number, band in zip(cut, self._lane.bands.take((place, number) for number in cut), strict=True):
            losses[number] = band.error, band.size
        errors, sizes = (math.fsum(sums) for sums in zip(*losses.values(), strict=True)) if losses else (0.0, 0.0)
        return Requantised(operation.name, errors, sizes)
