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
    from paramdelta.engine.feed import Feed
    from paramdelta.engine.inputs import Inputs
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.parts import Operand, Part
    from paramdelta.planning.plan import Plan
    from paramdelta.storage.source import Loan


class Written(NamedTuple):
    """A window that is written; by operation, its new infinities and NaNs, and what the deltas in it come to."""

    window: Window
    nonfinite: dict[int, NonFinite]
    sums: dict[int, Sums]


Event = Written | BaseException | None  # or what ended a worker, or its quiet end


class Worker(threading.Thread):
    """Takes windows until there are none: reads, computes and writes each in buffers of its own."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        budget: Budget,
        inputs: Inputs,
        feed: Feed,
        events: queue.SimpleQueue[Event],
    ) -> None:
        super().__init__(name=f"paramdelta-{number}", daemon=True)  # a second Ctrl-C waits for nobody
        self._plan, self._inputs, self._feed, self._events = plan, inputs, feed, events
        self._arena = Buffer(budget.arena_bytes)
        self._output = Buffer(budget.window_bytes + 2 * ALIGNMENT)  # slack for elements that a boundary cuts
        self._counters = array("q", (0, 0))
        self._uncounted = array("q", (0, 0))
        self._nonfinite: dict[int, NonFinite] = {}
        self._sums: dict[int, Sums] = {}

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
                self._events.put(Written(window, self._nonfinite, self._sums))
                self._nonfinite, self._sums = {}, {}
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
                sources,
                tuple(operand.dtype for operand in part.operands),
                part.alphas,
                output,
                operation.dtype,
                segment.elements,
                self._counters if segment.counted else self._uncounted,
                self._sums_for(segment, part),
            )
        if any(self._counters):
            before = self._nonfinite.get(segment.operation, NonFinite(0, 0))
            self._nonfinite[segment.operation] = before.plus(NonFinite(*self._counters))
            self._counters[0] = self._counters[1] = 0

    def _sums_for(self, segment: Segment, part: Part) -> Sums:
        """Return what to add a segment's deltas to; nobody looks at what another window counts."""
        if not segment.counted or not is_measured(self._plan, part):
            return Sums(len(part.alphas))
        if segment.operation not in self._sums:
            self._sums[segment.operation] = Sums(len(part.alphas))
        return self._sums[segment.operation]

    def _compute_scaled(self, step: Step, loans: list[Loan], output: int) -> None:
        segment = step.segment
        operation = self._plan.operations[segment.operation]
        part = operation.parts[segment.part]
        columns = operation.shape[-1]
        places = _places(step, loans, part.operands, columns)
        if operation.blocks is None:
            elements = range(segment.first, segment.first + segment.elements)
            counters = self._counters if segment.counted else self._uncounted
            sums = self._sums_for(segment, part)
            kernels.fuse_scaled(
                part.operands, part.alphas, places, columns, elements, output, operation.dtype, counters, sums
            )
            return
        rows = range(segment.first // columns, (segment.first + segment.elements) // columns)
        scale_dtype = self._plan.operations[segment.operation + 1].dtype
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
            self._sums_for(segment, part),
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
        losses = self._feed.losses.setdefault(place, {})
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
