from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.checkpoint.header import (
    MAX_HEADER_BYTES,
    Header,
    TensorEntry,
    build_header,
    parse_header,
    parse_length,
)
from paramdelta.errors import HeaderError
from tests.make import BITS, at_odd_offsets, file_bytes, header_bytes, normal


def read(file: bytes) -> Header:
    length = parse_length(file[:8], len(file), "model.safetensors")
    return parse_header(file[8 : 8 + length], len(file), "model.safetensors")


def refused(tree: Any, data_bytes: int = 0) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        read(header_bytes(tree) + bytes(data_bytes))
    return caught.value


def entry(dtype: str, shape: list[Any], *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def test_dtypes_agree_with_the_tests_own_table_and_with_numpy() -> None:
    assert {name: dtype.bits for name, dtype in DTYPES.items()} == BITS
    for name, dtype in DTYPES.items():
        assert dtype.name == name
        assert dtype.is_float == (name.startswith("F") or name == "BF16")
        if dtype.numpy is not None:
            assert np.dtype(dtype.numpy).itemsize * 8 == dtype.bits
            assert (np.dtype(dtype.numpy).kind == "f") == dtype.is_float


def test_reads_entries_metadata_and_where_data_begins() -> None:
    file = file_bytes({"w": normal((2, 3)), "b": ("F32", (), bytes(4))}, {"format": "pt", "k": "v"})
    header = read(file)
    assert header.tensors == {"w": TensorEntry("BF16", (2, 3), 0, 12), "b": TensorEntry("F32", (), 12, 16)}
    assert header.metadata == {"format": "pt", "k": "v"}
    assert header.data_offset == len(file) - 16


def test_tensors_come_in_offset_order_whatever_the_order_of_the_header() -> None:
    tree = {"b": entry("U8", [2], 3, 5), "a": entry("U8", [3], 0, 3), "none": entry("U8", [0], 3, 3)}
    assert list(read(header_bytes(tree) + bytes(5)).tensors) == ["a", "none", "b"]


def test_odd_offsets_empty_tensors_and_scalars() -> None:
    tensors = at_odd_offsets({"s": ("F32", (), bytes(4)), "e": ("BF16", (0, 7), b""), "w": normal((3,))})
    for align in (1, 8):
        header = read(file_bytes(tensors, align=align))
        assert [e.begin for e in header.tensors.values()] == [0, 3, 7, 7]


@pytest.mark.parametrize("tree", [{}, {"__metadata__": {}}, {"__metadata__": None}])
def test_a_file_without_tensors(tree: Any) -> None:
    assert read(header_bytes(tree)).tensors == {}


def test_equal_names_dtypes_and_shapes_are_one_object() -> None:
    tensors = {f"w{i}": normal((4, 4)) for i in range(2)}
    one, other = (read(file_bytes(tensors)) for _ in range(2))
    assert one.tensors["w0"].shape is one.tensors["w1"].shape
    for name, again in zip(one.tensors, other.tensors, strict=True):
        assert name is again
        assert one.tensors[name].dtype is other.tensors[name].dtype


@pytest.mark.parametrize(
    ("tree", "data_bytes", "rule"),
    [
        ({"w": entry("U8", [1], 1, 2)}, 2, "leaves a hole before it"),
        ({"v": entry("U8", [2], 0, 2), "w": entry("U8", [2], 1, 3)}, 3, "overlaps the tensor before it"),
        ({"v": entry("U8", [1], 0, 1), "w": entry("U8", [1], 1, 0)}, 1, "before its begin"),
        ({"w": entry("F32", [2], 0, 4)}, 4, "takes 8 bytes, and data_offsets span 4"),
        ({"w": entry("F4", [3], 0, 1)}, 1, "do not fill whole bytes"),
        ({"w": entry("U8", [2**63, 2, 0], 0, 0)}, 0, "exceeds 64 bits"),
        ({"w": entry("U8", [2**64], 0, 0)}, 0, "unsigned 64-bit"),
        ({"w": entry("U8", [1.0], 0, 1)}, 1, "unsigned 64-bit"),
        ({"w": entry("U8", [True], 0, 1)}, 1, "unsigned 64-bit"),
        ({"w": entry("U8", [1], 0, 1, 1)}, 1, "data_offsets is not a pair"),
        ({"w": entry("U8", [1], -1, 0)}, 0, "data_offsets is not a pair"),
        ({"w": entry("F12", [1], 0, 1)}, 1, "unknown dtype 'F12'"),
        ({"w": {"dtype": "U8", "shape": [1]}}, 1, "lacks data_offsets"),
        ({"w": 1}, 0, "not an object"),
    ],
)
def test_each_broken_rule_is_named_with_the_tensor(tree: Any, data_bytes: int, rule: str) -> None:
    error = refused(tree, data_bytes)
    assert rule in error.message
    assert (error.file, error.tensor, error.exit_code) == ("model.safetensors", "w", 3)
    assert error.remedy


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        (b"", "Expecting value"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[]", "not an object"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"\\ud800":0}', "lone surrogate"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"9" * 10_000 + b"}", "out of range"),
        (b'{"a":1,"a":1}', "duplicate key 'a'"),
        ({"__metadata__": {"a": 1}}, "must map strings to strings"),
        ({"__metadata__": entry("U8", [1], 0, 1)}, "no tensor can have that name"),
    ],
)
def test_each_broken_rule_of_the_whole_header_is_named(tree: Any, rule: str) -> None:
    assert rule in refused(tree).message


def test_a_shape_of_a_million_dimensions_is_judged_at_once() -> None:
    assert "exceeds 64 bits" in refused({"w": entry("U8", [2**63] * 10**6, 0, 0)}).message
    assert read(header_bytes({"w": entry("U8", [1] * 10**5, 0, 1)}) + b"x").tensors["w"].end == 1


def test_lengths() -> None:
    assert parse_length((5).to_bytes(8, "little"), 13, "f") == 5
    for prefix, file_size, rule in [
        (b"1234567", 7, "too short"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 2**40, "the format allows 100000000"),
        (b"\xff" * 8, 2**40, "the format allows 100000000"),
        ((6).to_bytes(8, "little"), 13, "truncated: the header should end at byte 14"),
    ]:
        with pytest.raises(HeaderError, match=rule) as caught:
            parse_length(prefix, file_size, "f")
        assert "download it again" in str(caught.value)


def test_a_truncated_file_is_called_that_and_a_longer_one_is_not() -> None:
    tree = {"w": entry("U8", [8], 0, 8)}
    assert "truncated: 8 bytes of tensor data are announced, and the file has 7" in refused(tree, 7).message
    assert "1 bytes after the last tensor" in refused(tree, 9).message


def test_hostile_names_neither_reach_the_terminal_nor_fill_it() -> None:
    error = refused({"\x1b[2J" + "x" * 10_000: 1})
    assert "\x1b" not in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("align", [1, 8, 4096])
def test_built_headers_read_back(align: int) -> None:
    entries = {
        "ü\n\\": TensorEntry("BF16", (3, 5), 0, 30),
        "s": TensorEntry("F64", (), 30, 38),
        "e": TensorEntry("F4", (0,), 38, 38),
    }
    opening = build_header(entries.items(), {"format": "pt"}, align)
    assert len(opening) % align == 0
    assert opening[8:].startswith(b'{"__metadata__":{"format":"pt"},')
    assert read(opening + bytes(38)) == Header(entries, {"format": "pt"}, len(opening))


def test_headers_that_cannot_be_built() -> None:
    one = TensorEntry("U8", (0,), 0, 0)
    for tensors, metadata, rule in [
        ([("a", one), ("a", one)], {}, "occurs twice"),
        ([("__metadata__", one)], {}, "reserved"),
        ([("\ud800", one)], {}, "lone surrogate"),
        ([], {"k": "v" * MAX_HEADER_BYTES}, "exceeds the format's limit"),
    ]:
        with pytest.raises(HeaderError, match=rule):
            build_header(tensors, metadata)
