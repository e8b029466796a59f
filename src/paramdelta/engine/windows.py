"""How output shards fall into windows, windows into segments, and what each window reads. Pure.

A window is an aligned byte range of one output shard, so it may begin or end in the middle of an element. Such an
element is computed for both windows, into the slack around the window's buffer, and counted for the one in which it
begins.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.parts import Operand, Operation


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
        elements: how many.
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
    """One segment, and for each of its operands the extent that holds it and where in that extent it begins."""

    segment: Segment
    operands: tuple[tuple[int, int], ...]


class Batch(NamedTuple):
    """What a worker reads at once, and the segments that this makes possible."""

    extents: tuple[Extent, ...]
    steps: tuple[Step, ...]


def cut(shard: int, size: int, window_bytes: int) -> Iterator[Window]:
    """Yield the windows of an output shard of ``size`` bytes, its header included."""
    for begin in range(0, size, window_bytes):
        yield Window(shard, begin, min(begin + window_bytes, size))


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
        for part, made in enumerate(operation.parts):
            found += _within((shard.first + number, part), made.elements, operation.itemsize, start, begin, end)
            start += made.elements * operation.itemsize
    return found


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
        part = operations[segment.operation].parts[segment.part]
        wanted = [_extent(segment, operand) for operand in part.operands]
        added = sum(room(extent.file, extent.size) for extent in wanted)
        if steps and filled + added > arena_bytes:
            yield Batch(tuple(extents), tuple(steps))
            extents, steps, filled = [], [], 0
        filled += added
        steps.append(Step(segment, tuple(_join(extents, extent, len(wanted)) for extent in wanted)))
    if steps:
        yield Batch(tuple(extents), tuple(steps))


def _extent(segment: Segment, operand: Operand) -> Extent:
    size = DTYPES[operand.dtype].bits // 8
    return Extent(operand.file, operand.offset + segment.first * size, segment.elements * size)


def _join(extents: list[Extent], extent: Extent, recent: int) -> tuple[int, int]:
    """Add an extent to those of a batch, at the end of one of the most recent where it goes on from there."""
    for place in range(len(extents) - 1, max(-1, len(extents) - 1 - 2 * recent), -1):
        other = extents[place]
        if other.file == extent.file and other.offset + other.size == extent.offset:
            extents[place] = Extent(other.file, other.offset, other.size + extent.size)
            return place, other.size
    extents.append(extent)
    return len(extents) - 1, 0
