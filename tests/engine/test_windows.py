from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.checkpoint.scaling import Blocks, scale_shape
from paramdelta.engine.budget import Shape
from paramdelta.engine.windows import Batch, Segment, Window, batches, carried, cut, segments
from paramdelta.planning.layout import Layout, lay_out
from paramdelta.planning.parts import Operand, Operation, Part

if TYPE_CHECKING:
    from collections.abc import Callable

ALIGNMENT = 4096
WIDTHS = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "BOOL": 1, "I64": 8}

ROOMS: dict[str, Callable[[int, int], int]] = {
    "mmap": lambda _, __: 0,
    "pread": lambda _, size: -(-size // ALIGNMENT) * ALIGNMENT,
    "direct": lambda _, size: -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT,
}


class Case(NamedTuple):
    operations: list[Operation]
    layout: Layout
    window_bytes: int

    def windows(self) -> list[Window]:
        return [
            window
            for number, shard in enumerate(self.layout.shards)
            for window in cut(number, shard, self.operations, self.window_bytes)
        ]

    def before(self, segment: Segment) -> int:
        """Return how many elements the parts before a segment's have."""
        return sum(part.elements for part in self.operations[segment.operation].parts[: segment.part])

    def segments(self, window: Window) -> list[Segment]:
        return segments(window, self.layout.shards[window.shard], self.operations)


def split(elements: int, operands: list[Operand], alphas: tuple[float, ...], pieces: int) -> tuple[Part, ...]:
    """Return parts that together are what one part would be."""
    edges = [elements * piece // pieces for piece in range(pieces + 1)]
    return tuple(
        Part(end - begin, tuple(Operand(o.file, o.offset + begin * WIDTHS[o.dtype], o.dtype) for o in operands), alphas)
        for begin, end in pairwise(edges)
    )


def make(
    tensors: list[tuple[str, int]], sources: list[list[str]], counts: list[int], window_bytes: int, pieces: int = 1
) -> Case:
    """Return tensors of dtype and elements, their source dtypes, tensors per shard, and a size of windows.

    Each source of an operation lies in a file of its own, where tensors follow each other from an odd offset on.
    """
    ends = [1_001 * number for number in range(9)]
    operations = []
    for number, ((dtype, elements), dtypes) in enumerate(zip(tensors, sources, strict=True)):
        operands = []
        for file, source in enumerate(dtypes):
            operands.append(Operand(file, ends[file], source))
            ends[file] += elements * WIDTHS[source]
        alphas = (1.0,) * (len(dtypes) // 2)
        op = "delta" if alphas else "copy"
        operations.append(Operation(f"t{number}", op, dtype, (elements,), split(elements, operands, alphas, pieces)))
    sizes = [(f"shard-{number}", count) for number, count in enumerate(counts)]
    return Case(operations, lay_out(operations, sizes, with_index=True), window_bytes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tensors of mixed widths in mixed order, so that elements begin anywhere and windows cut them."""
    elements = st.one_of(st.integers(0, 5), st.integers(0, 9_000), st.sampled_from([0, 1, 511, 512, 513, 2048, 4096]))
    floats = st.sampled_from(["BF16", "F16", "F32", "F64"])
    tensors = draw(st.lists(st.tuples(st.sampled_from(sorted(WIDTHS)), elements), min_size=1, max_size=12))
    deltas = draw(st.integers(1, 3))
    sources = [
        draw(st.lists(floats, min_size=1 + 2 * deltas, max_size=1 + 2 * deltas)) if dtype[-1] in "246" else [dtype]
        for dtype, _ in tensors
    ]
    sources = [[dtype] if dtype == "I64" else found for (dtype, _), found in zip(tensors, sources, strict=True)]
    split = sorted(draw(st.lists(st.integers(0, len(tensors)), max_size=3)))
    counts = [end - begin for begin, end in pairwise([0, *split, len(tensors)])]
    pages = draw(st.sampled_from([1, 1, 2, 3, 5, 64]))
    return make(tensors, sources, counts, ALIGNMENT * pages, draw(st.integers(1, 3)))


# -- windows -------------------------------------------------------------------------------------------------


@given(st.integers(1, 300_000), st.integers(1, 20))
def test_windows_cover_a_shard_once_and_begin_aligned(size: int, pages: int) -> None:
    case = make([("U8", 5), ("U8", size)], [["U8"], ["U8"]], [1, 1], pages * ALIGNMENT)
    found = [window for window in case.windows() if window.shard == 1]
    assert found[0].begin == 0
    assert found[-1].end == case.layout.shards[1].size
    assert all(one.end == other.begin for one, other in pairwise(found))
    assert all(window.begin % ALIGNMENT == 0 for window in found)
    assert all(window.end - window.begin == pages * ALIGNMENT for window in found[:-1])


# -- segments ------------------------------------------------------------------------------------------------


@given(cases())
def test_every_element_is_counted_in_exactly_one_window_the_one_in_which_it_begins(case: Case) -> None:
    counted: list[list[int]] = [[0] * operation.elements for operation in case.operations]
    for window in case.windows():
        for segment in case.segments(window):
            if segment.counted:
                assert segment.position >= 0
                first = case.before(segment) + segment.first
                for element in range(first, first + segment.elements):
                    counted[segment.operation][element] += 1
            else:
                assert segment.elements == 1
                assert segment.position < 0
    assert all(set(times) <= {1} for times in counted)


@given(cases())
def test_every_byte_of_data_lies_in_one_segment_of_its_window(case: Case) -> None:
    for window in case.windows():
        shard = case.layout.shards[window.shard]
        covered = 0
        for segment in case.segments(window):
            end = segment.position + segment.elements * case.operations[segment.operation].itemsize
            inside = range(max(segment.position, 0), min(end, window.end - window.begin))
            first_data_byte = max(len(shard.header) - window.begin, 0)
            assert inside.start == first_data_byte + covered  # nothing between it and the segment before
            assert len(inside) > 0
            covered += len(inside)
        assert covered == max(0, window.end - max(window.begin, len(shard.header)))


@given(cases())
def test_positions_agree_with_the_layout_and_stay_inside_the_slack(case: Case) -> None:
    for window in case.windows():
        shard = case.layout.shards[window.shard]
        for segment in case.segments(window):
            operation = case.operations[segment.operation]
            begin = len(shard.header) + shard.begins[segment.operation - shard.first]
            assert segment.operation in shard.operations
            before, part = case.before(segment), operation.parts[segment.part]
            assert window.begin + segment.position == begin + (before + segment.first) * operation.itemsize
            assert 0 <= segment.first < segment.first + segment.elements <= part.elements
            assert segment.position > -operation.itemsize
            end = segment.position + segment.elements * operation.itemsize
            assert end < window.end - window.begin + operation.itemsize


@given(cases())
def test_segments_are_in_file_order(case: Case) -> None:
    for window in case.windows():
        places = [(segment.operation, segment.part, segment.first) for segment in case.segments(window)]
        assert places == sorted(set(places))


def test_a_window_of_the_header_alone_has_no_segments() -> None:
    case = make([("BF16", 10)], [["BF16"]], [1], ALIGNMENT)
    header, data = case.windows()
    assert case.segments(header) == []
    assert case.segments(data) == [Segment(0, 0, 0, 10, 0, counted=True)]


def test_an_element_that_a_boundary_cuts_is_in_both_windows_and_counted_in_the_first() -> None:
    case = make([("U8", 4093), ("F64", 2)], [["U8"], ["F64"] * 3], [2], ALIGNMENT)
    _, first, second = case.windows()
    assert case.segments(first) == [Segment(0, 0, 0, 4093, 0, counted=True), Segment(1, 0, 0, 1, 4093, counted=True)]
    assert case.segments(second) == [Segment(1, 0, 0, 1, -3, counted=False), Segment(1, 0, 1, 1, 5, counted=True)]


def test_tensors_of_no_elements_have_no_segments_wherever_they_lie() -> None:
    tensors = [("BF16", 0), ("BF16", 2048), ("F64", 0), ("U8", 0), ("BF16", 2048), ("BF16", 0)]
    case = make(tensors, [[dtype] for dtype, _ in tensors], [6], ALIGNMENT)
    assert [[segment.operation for segment in case.segments(window)] for window in case.windows()] == [[], [1], [4]]


def test_a_shard_without_tensors_is_its_header() -> None:
    case = make([("BF16", 1)], [["BF16"]], [0, 1], ALIGNMENT)
    assert [case.segments(window) for window in case.windows() if window.shard == 0] == [[]]


# -- batches -----------------------------------------------------------------------------------------------


def batches_of(case: Case, window: Window, backend: str, arena: int) -> list[Batch]:
    return list(batches(case.segments(window), case.operations, ROOMS[backend], arena))


@given(cases(), st.sampled_from(sorted(ROOMS)))
def test_batches_fit_the_arena_that_the_budget_gives_and_serve_every_segment_in_order(case: Case, backend: str) -> None:
    arena = Shape.of(case.operations).arena(case.window_bytes)
    for window in case.windows():
        found = batches_of(case, window, backend, arena)
        assert [step.segment for batch in found for step in batch.steps] == case.segments(window)
        for batch in found:
            assert batch.steps
            assert sum(ROOMS[backend](extent.file, extent.size) for extent in batch.extents) <= arena


@given(cases(), st.sampled_from(sorted(ROOMS)), st.integers(1, 100_000))
def test_every_operand_lies_where_its_step_says(case: Case, backend: str, arena: int) -> None:
    for window in case.windows():
        for batch in batches_of(case, window, backend, arena):
            wanted = 0
            for segment, places, scales in batch.steps:
                operands = case.operations[segment.operation].parts[segment.part].operands
                assert len(places) == len(operands) == len(scales)
                for operand, (extent, begin) in zip(operands, places, strict=True):
                    width = WIDTHS[operand.dtype]
                    assert batch.extents[extent].file == operand.file
                    assert batch.extents[extent].offset + begin == operand.offset + segment.first * width
                    assert 0 <= begin <= batch.extents[extent].size - segment.elements * width
                    wanted += segment.elements * width
            assert sum(extent.size for extent in batch.extents) == wanted  # nothing is read that nobody asked for
            room = sum(ROOMS[backend](extent.file, extent.size) for extent in batch.extents)
            assert room <= arena or len(batch.steps) == 1


@given(
    st.lists(st.tuples(st.sampled_from(["BF16", "F32", "F64"]), st.integers(1, 900)), min_size=2, max_size=12),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_tensors_that_follow_each_other_in_their_files_are_read_with_one_extent_per_file(
    tensors: list[tuple[str, int]], deltas: int, pages: int
) -> None:
    sources = [[dtype] * (1 + 2 * deltas) for dtype, _ in tensors]
    case = make(tensors, sources, [len(tensors)], pages * ALIGNMENT)
    for window in case.windows():
        for batch in batches_of(case, window, "direct", 1 << 30):
            assert [extent.file for extent in batch.extents] == list(range(1 + 2 * deltas))


def test_a_source_whose_tensors_lie_apart_does_not_keep_the_others_from_being_joined() -> None:
    operations = [
        Operation(f"t{n}", "delta", "F32", (10,), (Part(10, (Operand(0, 900 * n, "F32"), *others), (1.0,)),))
        for n, others in enumerate([(Operand(1, 40 * n, "F32"), Operand(2, 40 * n, "F32")) for n in range(3)])
    ]
    case = Case(operations, lay_out(operations, [("m", 3)], with_index=False), 2 * ALIGNMENT)
    (batch,) = batches_of(case, case.windows()[0], "pread", 1 << 20)
    assert sorted(batch.extents) == [(0, 0, 40), (0, 900, 40), (0, 1800, 40), (1, 0, 120), (2, 0, 120)]


def test_a_file_that_plays_two_roles_is_read_correctly_for_both() -> None:
    operands = [(Operand(0, begin, "F32"), Operand(1, begin, "F32"), Operand(1, begin, "F32")) for begin in (0, 40)]
    parts = [Part(10, found, (1.0,)) for found in operands]
    operations = [Operation(f"t{n}", "delta", "F32", (10,), (part,)) for n, part in enumerate(parts)]
    layout = lay_out(operations, [("m", 2)], with_index=False)
    case = Case(operations, layout, 2 * ALIGNMENT)
    ((batch,),) = [batches_of(case, window, "pread", 1 << 20) for window in case.windows()]
    for number, step in enumerate(batch.steps):
        assert [batch.extents[e].offset + begin for e, begin in step.operands] == [40 * number] * 3
        assert [batch.extents[e].file for e, _ in step.operands] == [0, 1, 1]


def test_no_segments_make_no_batch() -> None:
    assert list(batches([], [], ROOMS["direct"], 1 << 20)) == []


@pytest.mark.parametrize("backend", sorted(ROOMS))
def test_many_small_tensors_of_one_window_are_read_in_few_batches(backend: str) -> None:
    # A mixture of experts has tens of thousands of tensors, some of a few KB: a read for each would be slow.
    case = make([("BF16", 2048)] * 200, [["BF16"] * 3] * 200, [200], 1 << 20)
    window = case.windows()[0]
    assert len(batches_of(case, window, backend, Shape(3, 3).arena(1 << 20))) <= 4


# -- grains of many elements -----------------------------------------------------------------------------------------


@st.composite
def cases_with_grains(draw: st.DrawFn) -> Case:
    """Block-scaled matrices of all widths, each with its scales, among tensors without grains."""
    operations: list[Operation] = []
    for number in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.integers(0, 40)), draw(st.sampled_from([1, 3, 500, 1_000, 3_000]))
        blocks = Blocks(draw(st.sampled_from([1, 4, 7])), 128, powers_of_two=False)
        part = Part(rows * columns, (Operand(0, 0, "F8_E4M3"),), ())
        operations.append(Operation(f"m{number}", "delta", "F8_E4M3", (rows, columns), (part,), blocks))
        shape = scale_shape((rows, columns), blocks)
        operations.append(Operation(f"s{number}", "scales", "F32", shape, (Part(shape[0] * shape[1], (), ()),)))
        size = draw(st.integers(0, 3_000))
        operations.append(Operation(f"p{number}", "copy", "U8", (size,), (Part(size, (Operand(0, 0, "U8"),), ()),)))
    layout = lay_out(operations, [("model.safetensors", len(operations))], with_index=False)
    least = Shape.of(operations).least_window
    grain = max(operation.grain for operation in operations)
    smallest = -(-grain // ALIGNMENT) * ALIGNMENT + 2 * ALIGNMENT  # what a window really needs
    return Case(operations, layout, draw(st.sampled_from([smallest, smallest + ALIGNMENT, least, 4 * least])))


@given(cases_with_grains())
def test_every_byte_is_made_by_one_window_or_handed_on_by_the_one_before(case: Case) -> None:
    shard = case.layout.shards[0]
    made = bytearray(shard.size)
    made[: len(shard.header)] = b"\1" * len(shard.header)
    windows = case.windows()
    assert all(one.end == other.begin for one, other in pairwise(windows))
    assert (windows[0].begin, windows[-1].end) == (0, shard.size)
    for window in windows:
        assert window.begin % ALIGNMENT == 0
        assert 0 < window.end - window.begin <= case.window_bytes
        beyond = carried(window.end, shard, case.operations)
        assert 0 <= beyond < ALIGNMENT
        for segment in case.segments(window):
            operation = case.operations[segment.operation]
            begin = window.begin + segment.position
            end = begin + segment.elements * operation.itemsize
            if operation.blocks is not None:
                assert begin >= window.begin
                assert end <= window.end + beyond  # what lies beyond is all handed on
                assert segment.first % operation.grain == 0
            if segment.counted:
                for place in range(begin, end):
                    made[place] += 1
    assert made == b"\1" * shard.size


@given(cases_with_grains())
def test_scales_are_written_after_all_that_they_belong_to_has_begun(case: Case) -> None:
    started: set[tuple[int, int]] = set()
    for window in case.windows():
        for segment in case.segments(window):
            operation = case.operations[segment.operation]
            if operation.blocks is not None:
                started.add((segment.operation, segment.first // operation.grain))
            elif operation.op == "scales":
                columns = operation.shape[1]
                last = (segment.first + segment.elements - 1) // columns
                assert all((segment.operation - 1, n) in started for n in range(segment.first // columns, last + 1))
