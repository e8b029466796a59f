"""One thread of a run: takes windows until there are none; reads, computes and writes each in buffers of its own."""

from __future__ import annotations

import ctypes
import threading
from array import array
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.engine import kernels
from paramdelta.engine.kernels import Places
from paramdelta.engine.progress import NonFinite
from paramdelta.engine.sums import Sums, is_measured
from paramdelta.engine.windows import Batch, Segment, Step, Window, batches, carried, scale_rows, segments
from paramdelta.storage.pages import Buffer
from paramdelta.storage.platform import ALIGNMENT

if TYPE_CHECKING:
    import queue
    from collections.abc import Sequence

    from paramdelta.engine.budget import Budget
    from paramdelta.engine.feed import Feed, Lane
    from paramdelta.engine.inputs import Inputs
    from paramdelta.planning.parts import Operand, Part
    from paramdelta.storage.source import Loan


class Written(NamedTuple):
    """A window of one output; by operation, its new infinities and NaNs, and what the deltas in it come to."""

    lane: int
    window: Window
    nonfinite: dict[int, NonFinite]
    sums: dict[int, Sums]


Event = Written | BaseException | None  # or what ended a worker, or its quiet end


class _Made(NamedTuple):
    """What is made of a window for one output: in which buffer, and what is counted on the way."""

    lane: Lane
    output: Buffer
    nonfinite: dict[int, NonFinite]
    sums: dict[int, Sums]


class Worker(threading.Thread):
    """Takes windows until there are none: reads each once; computes and writes it for every output that lacks it."""

    def __init__(
        self,
        number: int,
        outputs: int,
        budget: Budget,
        inputs: Inputs,
        feed: Feed,
        events: queue.SimpleQueue[Event],
    ) -> None:
        super().__init__(name=f"paramdelta-{number}", daemon=True)  # a second Ctrl-C waits for nobody
        self._inputs, self._feed, self._events = inputs, feed, events
        self._arena = Buffer(budget.arena_bytes)
        slack = 2 * ALIGNMENT  # for elements that a boundary cuts
        self._outputs = [Buffer(budget.window_bytes + slack) for _ in range(outputs)]
        self._counters = array("q", (0, 0))
        self._uncounted = array("q", (0, 0))

    def run(self) -> None:
        """Work until there are no windows left."""
        try:
            kernels.require_strict_floats()
            while (task := self._feed.next()) is not None:
                window, lanes = task
                makings = [_Made(lane, output, {}, {}) for lane, output in zip(lanes, self._outputs, strict=False)]
                self._fill(window, makings)
                for made in makings:
                    self._write(window, made)
        except BaseException as error:  # whatever it is, the calling thread raises it
            self._events.put(error)
        else:
            self._events.put(None)

    def _write(self, window: Window, made: _Made) -> None:
        lane, view = made.lane, made.output.view
        size = window.end - window.begin
        lane.digesters[window.shard].add(window.begin, view[ALIGNMENT : ALIGNMENT + size])
        whole_blocks = -(-size // ALIGNMENT) * ALIGNMENT
        lane.sinks[window.shard].write(window.begin, view[ALIGNMENT : ALIGNMENT + whole_blocks])
        self._events.put(Written(lane.number, window, made.nonfinite, made.sums))

    def _fill(self, window: Window, makings: Sequence[_Made]) -> None:
        """Compute a window into the buffer of each output; the outputs differ in nothing but their coefficients."""
        plan = makings[0].lane.plan
        shard, operations = plan.shards[window.shard], plan.operations
        header = shard.header[window.begin : window.end]
        for made in makings:
            made.output.view[ALIGNMENT : ALIGNMENT + len(header)] = header
        found = segments(window, shard, operations)
        for batch in batches(found, operations, self._inputs.room, self._arena.size):
            loans = self._borrow(batch)
            for step in batch.steps:
                for made in makings:
                    self._compute(made, step, loans, window.end - window.begin)
            for extent, loan in zip(batch.extents, loans, strict=True):
                self._inputs.source(extent.file).give_back(loan)
        for made in makings:
            _hand_on(window, made)

    def _borrow(self, batch: Batch) -> list[Loan]:
        loans = []
        filled = 0
        for extent in batch.extents:
            source = self._inputs.source(extent.file)
            room = source.room(extent.size)
            memory = self._arena.view[filled : filled + room]
            loans.append(source.borrow(extent.offset, extent.size, memory))
            filled += room
        for extent, loan in zip(batch.extents, loans, strict=True):
            self._inputs.source(extent.file).await_range(loan)
        return loans

    def _compute(self, made: _Made, step: Step, loans: list[Loan], size: int) -> None:
        segment = step.segment
        operation = made.lane.plan.operations[segment.operation]
        part = operation.parts[segment.part]
        sources = [loans[extent].address + begin for extent, begin in step.operands]
        output = made.output.address + ALIGNMENT + segment.position
        if not part.operands:
            _write_scales(made, segment, size)
        elif operation.is_scaled:
            self._compute_scaled(made, step, loans, output)
        elif not part.alphas and part.operands[0].dtype == operation.dtype:
            ctypes.memmove(output, sources[0], segment.elements * operation.itemsize)
        else:
            kernels.fuse(
                sources,
                tuple(operand.dtype for operand in part.operands),
                part.alphas,
                output,
                operation.dtype,
                segment.elements,
                self._counters if segment.counted else self._uncounted,
                _sums_for(made, segment, part),
            )
        if any(self._counters):
            before = made.nonfinite.get(segment.operation, NonFinite(0, 0))
            made.nonfinite[segment.operation] = before.plus(NonFinite(*self._counters))
            self._counters[0] = self._counters[1] = 0

    def _compute_scaled(self, made: _Made, step: Step, loans: list[Loan], output: int) -> None:
        segment = step.segment
        operation = made.lane.plan.operations[segment.operation]
        part = operation.parts[segment.part]
        columns = operation.shape[-1]
        places = _places(step, loans, part.operands, columns)
        if operation.blocks is None:
            elements = range(segment.first, segment.first + segment.elements)
            counters = self._counters if segment.counted else self._uncounted
            sums = _sums_for(made, segment, part)
            kernels.fuse_scaled(
                part.operands, part.alphas, places, columns, elements, output, operation.dtype, counters, sums
            )
            return
        rows = range(segment.first // columns, (segment.first + segment.elements) // columns)
        scale_dtype = made.lane.plan.operations[segment.operation + 1].dtype
        band = kernels.requantise(
            part.operands,
            part.alphas,
            places,
            columns,
            rows,
            output,
            operation.blocks,
            scale_dtype,
            self._counters,
            _sums_for(made, segment, part),
        )
        made.lane.bands.put((segment.operation, rows.start // operation.blocks.rows), band)


def _hand_on(window: Window, made: _Made) -> None:
    """Give the next window what this one has made of it, and take what the one before has made of this one."""
    lane, view = made.lane, made.output.view
    shard, operations, length = lane.plan.shards[window.shard], lane.plan.operations, window.end - window.begin
    beyond = carried(window.end, shard, operations)
    if beyond:
        lane.edges.put((window.shard, window.end), bytes(view[ALIGNMENT + length : ALIGNMENT + length + beyond]))
    before = carried(window.begin, shard, operations)
    if before:
        key = (window.shard, window.begin)
        view[ALIGNMENT : ALIGNMENT + before] = lane.edges.wait_for(key)
        lane.edges.take([key])


def _sums_for(made: _Made, segment: Segment, part: Part) -> Sums:
    """Return what to add a segment's deltas to; nobody looks at what another window counts."""
    if not segment.counted or not is_measured(made.lane.plan, part):
        return Sums(len(part.alphas))
    if segment.operation not in made.sums:
        made.sums[segment.operation] = Sums(len(part.alphas))
    return made.sums[segment.operation]


def _write_scales(made: _Made, segment: Segment, size: int) -> None:
    """Write scales that the operation before this one has found, once all of these rows of blocks are done.

    Args:
        size: bytes of the window.
    """
    operation = made.lane.plan.operations[segment.operation]
    row = operation.shape[1] * operation.itemsize
    begin, end = (at * operation.itemsize for at in (segment.first, segment.first + segment.elements))
    numbers = range(begin // row, -(-end // row))
    place = segment.operation - 1  # scales follow their weight
    scales = b"".join(made.lane.bands.wait_for((place, number)).scales for number in numbers)
    at = ALIGNMENT + segment.position
    skipped = numbers.start * row
    made.output.view[at : at + end - begin] = scales[begin - skipped : end - skipped]
    if segment.counted:
        _forget_bands(made.lane, place, range(-(-begin // row), min(end, begin + size - segment.position) // row))


def _forget_bands(lane: Lane, place: int, written: range) -> None:
    """Keep nothing but the losses of rows of blocks whose scales no other window writes, not even in part."""
    losses = lane.losses.setdefault(place, {})
    bands = lane.bands.take((place, number) for number in written)
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
