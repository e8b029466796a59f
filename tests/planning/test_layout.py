from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.planning.layout import Layout, OutputShard, by_size, lay_out, like_checkpoint
from paramdelta.planning.parts import Operand, Operation, Part
from tests.make import BITS, byte_count, normal, write_checkpoint, write_index

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ALIGNMENT = 4096


def operation(name: str, shape: Sequence[int], dtype: str = "BF16") -> Operation:
    part = Part(math.prod(shape), (Operand(0, 0, dtype),), (1.0,))
    return Operation(name, "delta", dtype, tuple(shape), (part,))


OPERATIONS = (
    operation("embed", (6, 4)),
    operation("scalar", (), "F32"),
    operation("nothing", (0, 3), "F16"),
    operation("wide", (3,), "F64"),
    operation("mask", (5,), "BOOL"),
    operation("empty.too", (0,), "I64"),
    operation("last", (7, 1), "BF16"),
)


def two_shards() -> Layout:
    return lay_out(OPERATIONS, [("one.safetensors", 3), ("two.safetensors", 4)], with_index=True)


def tree_of(shard: OutputShard) -> dict[str, dict[str, object]]:
    """Return the JSON of a shard's header, read by hand."""
    length = int.from_bytes(shard.header[:8], "little")
    assert len(shard.header) == 8 + length
    tree: dict[str, dict[str, object]] = json.loads(shard.header[8:])
    return tree


def test_headers_say_where_every_tensor_lies() -> None:
    one, two = two_shards().shards
    assert tree_of(one) == {
        "__metadata__": {"format": "pt"},
        "embed": {"dtype": "BF16", "shape": [6, 4], "data_offsets": [0, 48]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [48, 52]},
        "nothing": {"dtype": "F16", "shape": [0, 3], "data_offsets": [52, 52]},
    }
    assert tree_of(two) == {
        "__metadata__": {"format": "pt"},
        "wide": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]},
        "mask": {"dtype": "BOOL", "shape": [5], "data_offsets": [24, 29]},
        "empty.too": {"dtype": "I64", "shape": [0], "data_offsets": [29, 29]},
        "last": {"dtype": "BF16", "shape": [7, 1], "data_offsets": [29, 43]},
    }


def test_data_begins_at_a_multiple_of_4096_and_what_fills_up_is_spaces() -> None:
    for shard in two_shards().shards:
        assert len(shard.header) % ALIGNMENT == 0
        text = shard.header[8:]
        assert text.rstrip(b" ") + b" " * (len(text) - len(text.rstrip(b" "))) == text
        assert text[:1] == b"{"
        assert text.rstrip(b" ")[-1:] == b"}"


@given(st.integers(0, 500))
def test_a_header_is_never_longer_than_it_must_be(letters: int) -> None:
    shard = lay_out([operation("n" * (3_800 + letters), (1,))], [("m", 1)], with_index=False).shards[0]
    needed = 8 + len(shard.header[8:].rstrip(b" "))
    assert len(shard.header) == -(-needed // ALIGNMENT) * ALIGNMENT


def test_shards_know_their_place_their_tensors_and_their_size() -> None:
    one, two = two_shards().shards
    assert (one.name, one.first, one.begins, one.data_bytes) == ("one.safetensors", 0, (0, 48, 52), 52)
    assert (two.name, two.first, two.begins, two.data_bytes) == ("two.safetensors", 3, (0, 24, 29, 29), 43)
    assert list(one.operations) == [0, 1, 2]
    assert list(two.operations) == [3, 4, 5, 6]
    assert two.size == len(two.header) + 43


def test_files_with_these_headers_are_opened_by_the_safetensors_library(tmp_path: Path) -> None:
    for shard in two_shards().shards:
        path = tmp_path / shard.name
        path.write_bytes(shard.header + bytes(shard.data_bytes))
        assert path.stat().st_size == shard.size
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            members = [OPERATIONS[place] for place in shard.operations]
            assert sorted(file.keys()) == sorted(member.name for member in members)
            for member in members:
                found = file.get_slice(member.name)
                assert tuple(found.get_shape()) == member.shape
                assert found.get_dtype() == member.dtype


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=3)).filter(
            lambda tensor: BITS[tensor[0]] % 8 == 0
        ),
        max_size=20,
    )
)
def test_tensors_follow_each_other_without_a_gap(tensors: list[tuple[str, list[int]]]) -> None:
    operations = [operation(f"t{number}", shape, dtype) for number, (dtype, shape) in enumerate(tensors)]
    (shard,) = lay_out(operations, [("m", len(operations))], with_index=False).shards
    position = 0
    for begin, (dtype, shape) in zip(shard.begins, tensors, strict=True):
        assert begin == position
        position += byte_count(dtype, shape)
    assert shard.data_bytes == position


def test_names_of_any_script_survive_the_header(tmp_path: Path) -> None:
    names = ['quo"te', "back\\slash", "tab\t", "нуль", "重み", "🙂", "\x7f"]
    layout = lay_out([operation(name, (1,)) for name in names], [("m.safetensors", len(names))], with_index=True)
    assert list(tree_of(layout.shards[0])) == ["__metadata__", *names]
    assert json.loads(layout.index or b"")["weight_map"] == dict.fromkeys(sorted(names), "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(layout.shards[0].header + bytes(layout.shards[0].data_bytes))
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert sorted(file.keys()) == sorted(names)


# -- the index -----------------------------------------------------------------------------------------------


def test_the_index_names_every_tensor_sorted_as_transformers_writes_it() -> None:
    expected = """{
  "metadata": {
    "total_size": 95
  },
  "weight_map": {
    "embed": "one.safetensors",
    "empty.too": "two.safetensors",
    "last": "two.safetensors",
    "mask": "two.safetensors",
    "nothing": "one.safetensors",
    "scalar": "one.safetensors",
    "wide": "two.safetensors"
  }
}
"""
    assert two_shards().index == expected.encode()


def test_a_layout_without_an_index_has_none() -> None:
    assert lay_out(OPERATIONS, [("model.safetensors", 7)], with_index=False).index is None


# -- which shards --------------------------------------------------------------------------------------------


def test_shards_of_a_sharded_checkpoint_keep_their_names_and_tensors(tmp_path: Path) -> None:
    tensors = {name: normal((2,)) for name in "abcde"}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "new", tensors, shards=[["b"], ["a", "e", "c"], ["d"]]))
    assert like_checkpoint(checkpoint, [0, 1, 1, 1, 2]) == [
        ("model-00001-of-00003.safetensors", 1),
        ("model-00002-of-00003.safetensors", 3),
        ("model-00003-of-00003.safetensors", 1),
    ]


def test_a_shard_without_tensors_is_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: normal((2,)) for name in "abcd"}, shards=[["a"], ["b", "c"], ["d"]])
    checkpoint = open_checkpoint(tmp_path)
    names = [shard.name for shard in checkpoint.shards]
    assert like_checkpoint(checkpoint, [0, 1, 1, 2, 2, 2]) == list(zip(names, [1, 2, 3], strict=True))
    assert like_checkpoint(checkpoint, [0, 2, 2]) == [(names[0], 1), (names[2], 2)]
    assert like_checkpoint(checkpoint, [2, 2, 2]) == [(names[2], 3)]


def test_one_file_of_any_name_becomes_model_safetensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: normal((2,)) for name in "abc"})
    (tmp_path / "model.safetensors").rename(tmp_path / "foo.safetensors")
    assert like_checkpoint(open_checkpoint(tmp_path / "foo.safetensors"), [0, 0, 0]) == [("model.safetensors", 3)]


def test_one_file_with_an_index_keeps_its_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {name: normal((2,)) for name in "abc"})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    write_index(tmp_path, {"model-00001-of-00001.safetensors": ["a", "b", "c"]})
    assert like_checkpoint(open_checkpoint(tmp_path), [0, 0, 0]) == [("model-00001-of-00001.safetensors", 3)]


def test_by_size_starts_a_shard_where_the_next_tensor_does_not_fit() -> None:
    operations = [operation(name, (50,)) for name in "abcdefg"]  # of 100 bytes
    assert by_size(operations, 300) == [
        ("model-00001-of-00003.safetensors", 3),
        ("model-00002-of-00003.safetensors", 3),
        ("model-00003-of-00003.safetensors", 1),
    ]
    assert [count for _, count in by_size(operations, 299)] == [2, 2, 2, 1]


def test_by_size_gives_one_file_where_everything_fits() -> None:
    operations = [operation(name, (50,)) for name in "ab"]
    assert by_size(operations, 200) == [("model.safetensors", 2)]
    assert by_size([], 200) == [("model.safetensors", 0)]


def test_by_size_gives_a_tensor_that_is_too_large_a_shard_of_its_own() -> None:
    sizes = [10, 1_000, 10, 10]
    operations = [operation(f"t{number}", (size,)) for number, size in enumerate(sizes)]
    assert [count for _, count in by_size(operations, 100)] == [1, 1, 2]
    assert [count for _, count in by_size(operations, 1)] == [1, 1, 1, 1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_by_size_keeps_the_order_the_limit_and_no_shard_empty(elements: list[int], most: int) -> None:
    operations = [operation(f"t{number}", (count,)) for number, count in enumerate(elements)]
    sizes = by_size(operations, most)
    counts = [count for _, count in sizes]
    assert sum(counts) == len(operations)
    assert all(counts)
    for shard in lay_out(operations, sizes, with_index=True).shards:
        large = [place for place in shard.operations if operations[place].nbytes]
        assert shard.data_bytes <= most or len(large) == 1


@pytest.mark.parametrize("count", [2, 10, 100_001])
def test_shards_are_numbered_with_five_digits_or_more(count: int) -> None:
    sizes = by_size([operation("t", (1,))] * count, 2)
    assert sizes[0][0] == f"model-00001-of-{count:05}.safetensors"
    assert sizes[-1][0] == f"model-{count:05}-of-{count:05}.safetensors"
