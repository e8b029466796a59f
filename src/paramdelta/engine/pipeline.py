"""Windows through workers: read, fuse, write, each in its place, in any order, within the budget.

Every worker takes the next window, reads what it needs, computes it and writes it, in buffers of its own that last for
the whole run; reading, computing and writing overlap because there are more workers than processors. The calling
thread hands out progress, finishes shards, and is where Ctrl-C arrives.
"""

from __future__ import annotations

import ctypes
import math
import queue
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.engine import kernels
from paramdelta.engine.digests import Digester
from paramdelta.engine.exchange import Exchange
from paramdelta.engine.inputs import Inputs, check_identity, files_of, last_uses
from paramdelta.engine.kernels import Band, Places
from paramdelta.engine.progress import FinishedShard, NonFinite, Outcome, Progress, Requantised
from paramdelta.engine.windows import Batch, Segment, Step, Window, batches, carried, cut, scale_rows, segments
from paramdelta.errors import BudgetError, CancelledError
from paramdelta.storage.memory import Buffer
from paramdelta.storage.platform import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from paramdelta.engine.budget import Budget
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.parts import Operand
    from paramdelta.planning.plan import Plan
    from paramdelta.storage.sink import Sink
    from paramdelta.storage.source import Loan

_POLL_SECONDS: Final = 0.2


class Target(Protocol):
    """Where the shards go."""

    def create(self, shard: OutputShard) -> Sink:
        """Return a sink for a shard."""

    def completed(self, finished: FinishedShard, /) -> None:
        """Take note that a shard lies on stable storage."""


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
        io: ``auto``, ``mmap``, ``pread`` or ``direct``.
        done: shards that an earlier run has finished.
        target: where the shards go.
        on_progress: called from this thread, after every window.
        cancelled: set it, from any thread, to stop the run.

    Raises:
        InputChangedError: an input is not what it was when the plan was made.
        CheckpointError: an input cannot be read.
        OutputError: the output cannot be written.
        CancelledError: the run was cancelled.
    """
    inputs = Inputs(plan.files, io)
    done = tuple(done)
    feed = _Feed(plan, budget, target, frozenset(shard.number for shard in done))
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    workers: list[_Worker] = []
    completion = _Completion(plan, inputs, feed, target, done)
    try:
        _start(workers, plan, budget, inputs, feed, events)
        for written in _written_windows(events, len(workers), cancelled):
            completion.add(written)
            if on_progress is not None:
                on_progress(completion.progress)
    finally:
        feed.stop()
        _close_behind(workers, inputs, feed)
    finished = sorted(completion.finished, key=lambda shard: shard.number)
    return Outcome(tuple(finished), tuple(sorted(inputs.backends)))


def _start(
    workers: list[_Worker],
    plan: Plan,
    budget: Budget,
    inputs: Inputs,
    feed: _Feed,
    events: queue.SimpleQueue[_Event],
) -> None:
    """Start the budget's workers, each added to ``workers`` before it runs: none is ever forgotten."""
    try:
        for number in range(budget.workers):
            workers.append(_Worker(number, plan, budget, inputs, feed, events))
            workers[-1].start()
    except (OSError, RuntimeError, MemoryError) as error:  # no address space, or no more threads
        raise BudgetError(
            f"only {number} of {budget.workers} workers could be started: {error}",
            remedy="Use fewer --workers, or raise the limits of this process (ulimit -v, ulimit -u).",
        ) from error


def _close_behind(workers: Sequence[_Worker], inputs: Inputs, feed: _Feed) -> None:
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


class _Written(NamedTuple):
    """A window that is written, and how many infinities and NaNs are new in it, by operation."""

    window: Window
    nonfinite: dict[int, NDArray[np.int64]]


_Event = _Written | BaseException | None  # or what ended a worker, or its quiet end


def _written_windows(
    events: queue.SimpleQueue[_Event], running: int, cancelled: threading.Event | None
) -> Iterator[_Written]:
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

    def __init__(self, plan: Plan, inputs: Inputs, feed: _Feed, target: Target, done: Sequence[FinishedShard]) -> None:
        self._plan, self._inputs, self._feed, self._target = plan, inputs, feed, target
        sizes = [shard.size for shard in plan.shards]
        numbers = {shard.number for shard in done}
        self._missing = [0 if number in numbers else size for number, size in enumerate(sizes)]
        self._ended_files = last_uses(plan)
        self._complete_up_to = 0
        self._nonfinite: dict[int, NDArray[np.int64]] = {}
        self.finished = list(done)
        resumed = sum(sizes) - sum(self._missing)
        self.progress = Progress(resumed, sum(sizes), len(done), len(sizes), resumed)

    def add(self, written: _Written) -> None:
        """Take note of a written window. Raises as `run`."""
        window = written.window
        for place, counts in written.nonfinite.items():
            self._nonfinite[place] = self._nonfinite.get(place, 0) + counts
        size = window.end - window.begin
        self._missing[window.shard] -= size
        shards_done = self.progress.shards_done
        if self._missing[window.shard] == 0:
            self._finish(window.shard)
            shards_done += 1
        self.progress = replace(self.progress, done=self.progress.done + size, shards_done=shards_done)

    def _finish(self, number: int) -> None:
        shard = self._plan.shards[number]
        self._feed.take_sink(number).finish()
        for place in files_of(self._plan, shard):
            check_identity(self._plan.files[place])
        finished = self._sum_up(number)
        self.finished.append(finished)
        self._target.completed(finished)
        while self._complete_up_to < len(self._missing) and self._missing[self._complete_up_to] == 0:
            self._inputs.close(self._ended_files[self._complete_up_to])
            self._complete_up_to += 1

    def _sum_up(self, number: int) -> FinishedShard:
        operations, places = self._plan.operations, self._plan.shards[number].operations
        return FinishedShard(
            number,
            self._feed.digesters.pop(number).result(),
            {
                operations[place].name: NonFinite(*(int(count) for count in self._nonfinite.pop(place)))
                for place in places
                if place in self._nonfinite
            },
            tuple(self._sum_bands(place) for place in places if operations[place].blocks is not None),
        )

    def _sum_bands(self, place: int) -> Requantised:
        """Return what a tensor lost, and forget its scales: they are written."""
        operation = self._plan.operations[place]
        count = -(-operation.elements // operation.grain) if operation.elements else 0
        losses = self._feed.losses.pop(place, np.full((count, 2), np.nan))
        cut = np.flatnonzero(np.isnan(losses[:, 0])).tolist()  # rows whose scales a boundary cuts
        for number, band in zip(cut, self._feed.bands.take((place, number) for number in cut), strict=True):
            losses[number] = band.error, band.size
        return Requantised(operation.name, math.fsum(losses[:, 0].tolist()), math.fsum(losses[:, 1].tolist()))


class _Feed:
    """Hands out windows in order, to any thread; opens each shard's sink with its first window.

    Attributes:
        bands: what came of each row of blocks, by operation and number: the scales are written by a later window.
        losses: by operation, shape (rows of blocks, 2): error and size of those whose scales are written, else NaN.
        edges: bytes at the begin of a window that the one before has made, by shard and begin.
        digesters: of each shard that is being written.
    """

    def __init__(self, plan: Plan, budget: Budget, target: Target, done: frozenset[int]) -> None:
        self._lock = threading.Lock()
        self._windows = self._all_windows(plan, budget, target, done)
        self._sinks: dict[int, Sink] = {}
        self._stopped = False
        self.digesters: dict[int, Digester] = {}
        self.bands: Exchange[tuple[int, int], Band] = Exchange()
        self.edges: Exchange[tuple[int, int], bytes] = Exchange()
        self.losses: dict[int, NDArray[np.float64]] = {}

    def _all_windows(
        self, plan: Plan, budget: Budget, target: Target, done: frozenset[int]
    ) -> Iterator[tuple[Window, Sink]]:
        for number, shard in enumerate(plan.shards):
            if number in done:
                continue
            sink = self._sinks[number] = target.create(shard)
            self.digesters[number] = Digester(shard.size)
            for window in cut(number, shard, plan.operations, budget.window_bytes):
                yield window, sink

    def next(self) -> tuple[Window, Sink] | None:
        with self._lock:
            return None if self._stopped else next(self._windows, None)

    def take_sink(self, shard: int) -> Sink:
        return self._sinks.pop(shard)

    def stop(self) -> None:
        """Hand out no more windows. Waits for nobody: to create a file may take long where space is zeroed."""
        self._stopped = True
        self.bands.stop()
        self.edges.stop()

    def abandon(self) -> None:
        """Close the sinks of unfinished shards. No worker may be running."""
        while self._sinks:
            _, sink = self._sinks.popitem()
            with suppress(OSError):  # nothing was promised of it
                sink.abandon()


class _Worker(threading.Thread):
    """Takes windows until there are none: reads, computes and writes each in buffers of its own."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        budget: Budget,
        inputs: Inputs,
        feed: _Feed,
        events: queue.SimpleQueue[_Event],
    ) -> None:
        super().__init__(name=f"paramdelta-{number}", daemon=True)  # a second Ctrl-C waits for nobody
        self._plan, self._inputs, self._feed, self._events = plan, inputs, feed, events
        self._arena = Buffer(budget.arena_bytes)
        self._output = Buffer(budget.window_bytes + 2 * ALIGNMENT)  # slack for elements that a boundary cuts
        self._counters = np.zeros(2, dtype=np.int64)
        self._uncounted = np.zeros(2, dtype=np.int64)
        self._nonfinite: dict[int, NDArray[np.int64]] = {}

    def run(self) -> None:
        """Work until there are no windows left."""
        try:
            kernels.require_strict_floats()
            while (task := self._feed.next()) is not None:
                window, sink = task
                self._fill(window)
                size = window.end - window.begin
                self._feed.digesters[window.shard].add(window.begin, self._output.view[ALIGNMENT : ALIGNMENT + size])
                whole_blocks = -(-size // ALIGNMENT) * ALIGNMENT
                sink.write(window.begin, self._output.view[ALIGNMENT : ALIGNMENT + whole_blocks])
                self._events.put(_Written(window, self._nonfinite))
                self._nonfinite = {}
        except BaseException as error:  # whatever it is, the calling thread raises it
            self._events.put(error)
        else:
            self._events.put(None)

    def _fill(self, window: Window) -> None:
        """Compute a window into the output buffer."""
        shard, operations = self._plan.shards[window.shard], self._plan.operations
        header = shard.header[window.begin : window.end]
        self._output.view[ALIGNMENT : ALIGNMENT + len(header)] = header
        found = segments(window, shard, operations)
        for batch in batches(found, operations, self._inputs.room, self._arena.size):
            loans = self._borrow(batch)
            for step in batch.steps:
                self._compute(step, loans, window.end - window.begin)
            for extent, loan in zip(batch.extents, loans, strict=True):
                self._inputs.source(extent.file).give_back(loan)
        self._hand_on(window, shard)

    def _hand_on(self, window: Window, shard: OutputShard) -> None:
        """Give the next window what this one has made of it, and take what the one before has made of this one."""
        operations, length = self._plan.operations, window.end - window.begin
        beyond = carried(window.end, shard, operations)
        if beyond:
            made = self._output.view[ALIGNMENT + length : ALIGNMENT + length + beyond]
            self._feed.edges.put((window.shard, window.end), bytes(made))
        before = carried(window.begin, shard, operations)
        if before:
            key = (window.shard, window.begin)
            self._output.view[ALIGNMENT : ALIGNMENT + before] = self._feed.edges.wait_for(key)
            self._feed.edges.take([key])

    def _borrow(self, batch: Batch) -> list[Loan]:
        loans = []
        filled = 0
        for extent in batch.extents:
            source = self._inputs.source(extent.file)
            room = source.room(extent.size)
            memory = self._arena.view[filled : filled + room]
            loans.append(source.borrow(extent.offset, extent.size, memory))
            filled += room
        return loans

    def _compute(self, step: Step, loans: list[Loan], size: int) -> None:
        segment = step.segment
        operation = self._plan.operations[segment.operation]
        part = operation.parts[segment.part]
        sources = [loans[extent].address + begin for extent, begin in step.operands]
        output = self._output.address + ALIGNMENT + segment.position
        if not part.operands:
            self._write_scales(segment, size)
        elif operation.is_scaled:
            self._compute_scaled(step, loans, output)
        elif not part.alphas and part.operands[0].dtype == operation.dtype:
            ctypes.memmove(output, sources[0], segment.elements * operation.itemsize)
        else:
            kernels.fuse(
                np.array(sources, dtype=np.uint64),
                tuple(operand.dtype for operand in part.operands),
                part.alphas,
                output,
                operation.dtype,
                segment.elements,
                self._counters if segment.counted else self._uncounted,
            )
        if self._counters.any():
            self._nonfinite[segment.operation] = self._nonfinite.get(segment.operation, 0) + self._counters
            self._counters = np.zeros(2, dtype=np.int64)

    def _compute_scaled(self, step: Step, loans: list[Loan], output: int) -> None:
        segment = step.segment
        operation = self._plan.operations[segment.operation]
        part = operation.parts[segment.part]
        columns = operation.shape[-1]
        places = _places(step, loans, part.operands, columns)
        if operation.blocks is None:
            elements = range(segment.first, segment.first + segment.elements)
            counters = self._counters if segment.counted else self._uncounted
            kernels.fuse_scaled(
                part.operands, part.alphas, places, columns, elements, output, operation.dtype, counters
            )
            return
        rows = range(segment.first // columns, (segment.first + segment.elements) // columns)
        scale_dtype = self._plan.operations[segment.operation + 1].dtype
        band = kernels.requantise(
            part.operands, part.alphas, places, columns, rows, output, operation.blocks, scale_dtype, self._counters
        )
        self._feed.bands.put((segment.operation, rows.start // operation.blocks.rows), band)

    def _write_scales(self, segment: Segment, size: int) -> None:
        """Write scales that the operation before this one has found, once all of these rows of blocks are done.

        Args:
            size: bytes of the window.
        """
        operation = self._plan.operations[segment.operation]
        row = operation.shape[1] * operation.itemsize
        begin, end = (at * operation.itemsize for at in (segment.first, segment.first + segment.elements))
        numbers = range(begin // row, -(-end // row))
        place = segment.operation - 1  # scales follow their weight
        scales = b"".join(self._feed.bands.wait_for((place, number)).scales for number in numbers)
        at = ALIGNMENT + segment.position
        skipped = numbers.start * row
        self._output.view[at : at + end - begin] = scales[begin - skipped : end - skipped]
        if segment.counted:
            self._forget_bands(place, range(-(-begin // row), min(end, begin + size - segment.position) // row))

    def _forget_bands(self, place: int, written: range) -> None:
        """Keep nothing but the losses of rows of blocks whose scales no other window writes, not even in part."""
        weight = self._plan.operations[place]
        losses = self._feed.losses.setdefault(place, np.full((-(-weight.elements // weight.grain), 2), np.nan))
        bands = self._feed.bands.take((place, number) for number in written)
        for number, band in zip(written, bands, strict=True):
            losses[number] = band.error, band.size


def _places(step: Step, loans: list[Loan], operands: Sequence[Operand], columns: int) -> Places:
    """Return where the operands' matrices would begin in memory, and their scales."""
    first = step.segment.first
    matrices, scales = [], []
    for operand, (extent, begin), of_scale in zip(operands, step.operands, step.scales, strict=True):
        matrices.append(loans[extent].address + begin - first * DTYPES[operand.dtype].bits // 8)
        if operand.scale is None or of_scale is None:
            scales.append(0)
        else:
            rows = scale_rows(step.segment, operand.scale, columns)
            scales.append(loans[of_scale[0]].address + of_scale[1] - rows.start * operand.scale.row_bytes)
    return Places(tuple(matrices), tuple(scales))
