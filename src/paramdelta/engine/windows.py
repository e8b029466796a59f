"""How output shards fall into windows, windows into segments, and what each window reads. Pure.

A window is an aligned byte range of one output shard, so it may begin or end in the middle of an element. Such an
element is computed for both windows, into the slack around the window's buffer, and counted for the one in which it
begins. A row of blocks of FP8 is too large for that: windows end in the page in which one begins, and what little of
the one before lies in that page is handed from window to window.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.storage.platform import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.parts import Operand, Operation, Scale


class Window(NamedTuple):
    """Bytes [begin, end) of an output shard, by its place in the plan."""

    shard: int
    begin: int
    end: int


class Segment(NamedTuple):
    """The elements of one part of an operation that fall into a window.

    Attributes:
        operation: place in the plan.
        part: which of its parts.
        first: first element of that part.
        elements: how many; where blocks are written, all that are made together.
        position: where they begin, in bytes from the window's begin; negative where an element begins before it.
        counted: whether this window, not the one before it, counts what these elements turn out to be.
    """

    operation: int
    part: int
    first: int
    elements: int
    position: int
    counted: bool


class Extent(NamedTuple):
    """Bytes of an input file that are read together."""

    file: int
    offset: int
    size: int


class Step(NamedTuple):
    """One segment, and for each of its operands the extent that holds it and where in that extent it begins.

    Attributes:
        scales: the same of the scales of each operand, from the first row of scales that the segment needs; None where
            an operand has none.
    """

    segment: Segment
    operands: tuple[tuple[int, int], ...]
    scales: tuple[tuple[int, int] | None, ...]


class Batch(NamedTuple):
    """What a worker reads at once, and the segments that this makes possible."""

    extents: tuple[Extent, ...]
    steps: tuple[Step, ...]


def cut(number: int, shard: OutputShard, operations: Sequence[Operation], window_bytes: int) -> Iterator[Window]:
    """Yield the windows of an output shard, by its place in the plan, its header included."""
    begin = 0
    while begin < shard.size:
        end = min(begin + window_bytes, shard.size)
        if end < shard.size:
            end -= _cut_off(end, shard, operations)
        yield Window(number, begin, end)
        begin = end


def _cut_off(end: int, shard: OutputShard, operations: Sequence[Operation]) -> int:
    """Return by how much a window that would end within a grain of many elements ends earlier."""
    inside, _ = _in_grain(end, shard, operations)
    return inside + (end - inside) % ALIGNMENT


def carried(at: int, shard: OutputShard, operations: Sequence[Operation]) -> int:
    """Return how many bytes from a window's begin on the window before makes: the rest of a grain begun there."""
    return _in_grain(at, shard, operations)[1]


def _in_grain(at: int, shard: OutputShard, operations: Sequence[Operation]) -> tuple[int, int]:
    """Return how many bytes of a grain of many elements lie before and after a byte of the shard, (0, 0) for none."""
    position = at - len(shard.header)
    if not 0 <= position < shard.data_bytes:
        return 0, 0
    number = bisect_right(shard.begins, position) - 1
    operation = operations[shard.first + number]
    size = operation.grain * operation.itemsize
    before = (position - shard.begins[number]) % size
    if operation.blocks is None or before == 0:
        return 0, 0
    return before, min(size - before, shard.begins[number] + operation.nbytes - position)


def segments(window: Window, shard: OutputShard, operations: Sequence[Operation]) -> list[Segment]:
    """Return the segments of a window, in file order; none for what holds the header alone."""
    found: list[Segment] = []
    begin, end = window.begin - len(shard.header), window.end - len(shard.header)
    place = max(0, bisect_right(shard.begins, max(begin, 0)) - 1)
    for number in range(place, len(shard.begins)):
        start = shard.begins[number]
        if start >= end:
            break
        operation = operations[shard.first + number]
        if operation.blocks is not None:
            found += _grains(shard.first + number, operation, start, begin, end)
            continue
        for part, made in enumerate(operation.parts):
            found += _within((shard.first + number, part), made.elements, operation.itemsize, start, begin, end)
            start += made.elements * operation.itemsize
    return found


def _grains(place: int, operation: Operation, start: int, begin: int, end: int) -> Iterator[Segment]:
    """Yield those grains of an operation, the first of which begins at ``start``, that begin within [begin, end)."""
    if operation.elements == 0:
        return
    size = operation.grain * operation.itemsize
    for number in range(max(0, -((start - begin) // size)), -(-operation.elements // operation.grain)):
        position = start + number * size
        if position >= end:
            return
        first = number * operation.grain
        elements = min(operation.grain, operation.elements - first)
        yield Segment(place, 0, first, elements, position - begin, counted=True)


def _within(
    place: tuple[int, int], elements: int, itemsize: int, start: int, begin: int, end: int
) -> Iterator[Segment]:
    """Yield those of ``elements``, the first of which begins at ``start``, that touch [begin, end)."""
    first = max(0, begin - start) // itemsize
    last = min(elements, -(-(end - start) // itemsize))
    if first < last and start + first * itemsize < begin:
        yield Segment(*place, first, 1, start + first * itemsize - begin, counted=False)
        first += 1
    if first < last:
        yield Segment(*place, first, last - first, start + first * itemsize - begin, counted=True)


def batches(
    found: Sequence[Segment],
    operations: Sequence[Operation],
    room: Callable[[int, int], int],
    arena_bytes: int,
) -> Iterator[Batch]:
    """Yield what to read and compute for the segments of a window, in steps that fit the arena.

    Tensors that follow each other in the output mostly follow each other in the inputs too: neighbours are read
    together.

    Args:
        found: the window's segments.
        operations: of the plan.
        room: bytes of arena that ``(file, size)`` takes.
        arena_bytes: size of the arena.
    """
    extents: list[Extent] = []
    steps: list[Step] = []
    filled = 0
    for segment in found:
        operation = operations[segment.operation]
        operands = operation.parts[segment.part].operands
        wanted = [_extent(segment, operand) for operand in operands]
        scales = [_scale_extent(segment, operand.scale, operation.shape[-1]) for operand in operands if operand.scale]
        added = sum(room(extent.file, extent.size) for extent in (*wanted, *scales))
        if steps and filled + added > arena_bytes:
            yield Batch(tuple(extents), tuple(steps))
            extents, steps, filled = [], [], 0
        filled += added
        places = tuple(_join(extents, extent, len(wanted)) for extent in wanted)
        of_scales = iter([_join(extents, extent, len(wanted)) for extent in scales])
        steps.append(Step(segment, places, tuple(next(of_scales) if each.scale else None for each in operands)))
    if steps:
        yield Batch(tuple(extents), tuple(steps))


def _extent(segment: Segment, operand: Operand) -> Extent:
    size = DTYPES[operand.dtype].bits // 8
    return Extent(operand.file, operand.offset + segment.first * size, segment.elements * size)


def scale_rows(segment: Segment, scale: Scale, columns: int) -> range:
    """Return which rows of scales the elements of a segment have, in a matrix of so many columns."""
    first, last = segment.first // columns, (segment.first + segment.elements - 1) // columns
    return range(first // scale.block_rows, last // scale.block_rows + 1)


def _scale_extent(segment: Segment, scale: Scale, columns: int) -> Extent:
    rows = scale_rows(segment, scale, columns)
    return Extent(scale.file, scale.offset + rows.start * scale.row_bytes, len(rows) * scale.row_bytes)


def _join(extents: list[Extent], extent: Extent, recent: int) -> tuple[int, int]:
    """Add an extent to those of a batch, at the end of one of the most recent where it goes on from there."""
    for place in range(len(extents) - 1, max(-1, len(extents) - 1 - 2 * recent), -1):
        other = extents[place]
        if other.file == extent.file and other.offset + other.size == extent.offset:
            extents[place] = Extent(other.file, other.offset, other.size + extent.size)
            return place, other.size
    extents.append(extent)
    return len(extents) - 1, 0
