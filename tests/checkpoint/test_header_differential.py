"""Ours against the safetensors library, on files that are valid, nearly valid, and not valid at all.

Matrix: {generated headers, mutations of the JSON tree, mutations of the bytes, hand-picked spellings} ×
{accept or refuse; names, dtypes, shapes, order and data of what is accepted}. Where the library accepts and we refuse,
the header must be one of the spellings that `header` lists as refused on purpose.
"""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.checkpoint.header import Header, TensorEntry, build_header, parse_header, parse_length
from paramdelta.errors import HeaderError
from tests.fuzz import FUZZ_EXAMPLES
from tests.make import header_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DATA = bytes(i * 7 % 251 for i in range(4096))  # any two stretches that a test compares differ

deserialize: Callable[[bytes], Any] = safetensors.deserialize  # its stub is untyped

thorough = settings(
    max_examples=FUZZ_EXAMPLES or 500,
    derandomize=not FUZZ_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def ours(file: bytes) -> Header | HeaderError:
    try:
        length = parse_length(file[:8], len(file), "f")
        return parse_header(file[8 : 8 + length], len(file), "f")
    except HeaderError as error:
        return error


def library(file: bytes) -> dict[str, dict[str, Any]] | Exception:
    try:
        return dict(deserialize(file))
    except safetensors.SafetensorError as error:
        return error


def refused_on_purpose(file: bytes) -> bool:
    """Whether the header has a key twice, an entry that is an array, or a dtype that is an object."""
    twice = False

    def pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice = twice or len(dict(pairs)) < len(pairs)
        return dict(pairs)

    tree = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")], object_pairs_hook=pairs_hook)
    return twice or any(
        isinstance(entry, list) or (isinstance(entry, dict) and isinstance(entry.get("dtype"), dict))
        for entry in tree.values()
    )


def assert_same_verdict(file: bytes) -> None:
    mine, theirs = ours(file), library(file)
    if isinstance(theirs, Exception):
        assert isinstance(mine, HeaderError), f"we accept what the library refuses ({theirs}): {file!r}"
    elif isinstance(mine, HeaderError):
        assert refused_on_purpose(file), f"we refuse what the library accepts ({mine}): {file!r}"
    else:
        assert mine.tensors.keys() == theirs.keys()
        for name, entry in mine.tensors.items():
            data = file[mine.data_offset + entry.begin : mine.data_offset + entry.end]
            assert (entry.dtype, list(entry.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
            assert data == theirs[name]["data"]


# -- generated headers ---------------------------------------------------------------------------------------

names = st.text(max_size=6) | st.sampled_from(["a", "b-0", "model.layers.0.weight", "__metadata_", "é\\u", '"'])
shapes = st.lists(st.integers(0, 5), max_size=4)
metadata = st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A valid header as a JSON tree, its entries in any order."""
    position = 0
    entries = {}
    for name in draw(st.lists(names.filter(lambda n: n != "__metadata__"), max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(shapes)
        if DTYPES[dtype].bits * math.prod(shape) % 8:
            shape.append(8)
        end = position + DTYPES[dtype].bits * math.prod(shape) // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    listed = {name: entries[name] for name in draw(st.permutations(list(entries)))}
    about = draw(metadata)
    return listed if about is None else {"__metadata__": about, **listed}


def data_end(tree: dict[str, Any]) -> int:
    """The end of the data that the tree announces, as far as it still makes sense."""
    ends = [0]
    for entry in tree.values():
        try:
            ends.append(int(entry["data_offsets"][1]))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            continue
    return min(max(ends), 1 << 16)


def file_of(tree: Any, data_bytes: int) -> bytes:
    data = DATA * (data_bytes // len(DATA) + 1)
    return header_bytes(tree, align=1) + data[:data_bytes]


@thorough
@given(trees(), st.booleans())
def test_valid_headers_read_alike(tree: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(tree, ensure_ascii=ascii_only).encode()
    file = file_of(text, data_end(tree))
    assert isinstance(ours(file), Header)
    assert_same_verdict(file)


@thorough
@given(trees(), st.sampled_from([1, 8, 64, 4096]))
def test_headers_that_we_build_are_read_by_the_library(tree: dict[str, Any], align: int) -> None:
    about = tree.pop("__metadata__", {})
    entries = {n: TensorEntry(e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in tree.items()}
    opening = build_header(entries.items(), about, align)
    file = opening + DATA * 8
    file = file[: len(opening) + data_end(tree)]
    assert len(opening) % align == 0
    header = ours(file)
    assert isinstance(header, Header)
    assert (header.tensors, header.metadata, header.data_offset) == (entries, about, len(opening))
    assert_same_verdict(file)


def test_safe_open_lists_tensors_in_our_order(tmp_path: Path) -> None:
    # BF16 data is beyond safe_open's numpy reader, its header is not.
    entries = {
        "z": TensorEntry("BF16", (2, 1), 0, 4),
        "a": TensorEntry("F32", (), 4, 8),
        "m": TensorEntry("U8", (3,), 8, 11),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(build_header(reversed(entries.items()), {"format": "pt"}) + bytes(11))
    header = ours(path.read_bytes())
    assert isinstance(header, Header)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.offset_keys() == list(header.tensors) == list(entries)
        assert file.metadata() == header.metadata
        for name, entry in entries.items():
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (entry.dtype, entry.shape)


# -- mutations -----------------------------------------------------------------------------------------------

oddities: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 8, 1.0, 1e3, 0.5, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 10**400),
        *("", "F32", "U8", "u8", "F4", {}, {"a": "b"}, {"F32": None}, {"a": 1}, [True], [1.0], [-1], [1, "1"]),
        *([], [0], [3], [0, 0], [0, 1], [1, 1], [0, 8], [8, 0], [0, 4, 8]),
        *([2**63, 2, 0], [0, 2**63, 4], [2**32, 2**32], [2**61, 8]),
    ]
).map(copy.deepcopy)


@st.composite
def mutated_trees(draw: st.DrawFn) -> tuple[Any, int]:
    """A header with one to three things wrong (or, by chance, right), and the bytes of data behind it."""
    tree = draw(trees())
    size = data_end(tree)
    for _ in range(draw(st.integers(1, 3))):
        tensors = [name for name in tree if name != "__metadata__" and isinstance(tree[name], dict)]
        name = draw(st.sampled_from(tensors)) if tensors else "a"
        entry = tree[name] = tree[name] if tensors else {}
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", "Dtype"]))
        match draw(st.sampled_from(["set", "drop", "shift", "grow", "entry", "metadata", "element", "copy", "array"])):
            case "set":
                entry[field] = draw(oddities)
            case "drop":
                entry.pop(field, None)
            case "shift" if isinstance(entry.get("data_offsets"), list):
                by = draw(st.integers(-2, 2))
                entry["data_offsets"] = [n + by if type(n) is int else n for n in entry["data_offsets"]]
            case "grow":
                size = max(0, size + draw(st.integers(-3, 3)))
            case "entry":
                tree[name] = draw(oddities)
            case "metadata":
                tree["__metadata__"] = draw(oddities)
            case "element" if isinstance(entry.get(field), list) and entry[field]:
                entry[field] = list(entry[field])
                entry[field][draw(st.integers(0, len(entry[field]) - 1))] = draw(oddities)
            case "copy":
                tree[draw(names)] = json.loads(json.dumps(entry))
            case "array":
                tree[name] = list(entry.values())
            case _:
                pass
    return tree, size


@thorough
@given(mutated_trees())
def test_mutated_trees_get_the_same_verdict(case: tuple[Any, int]) -> None:
    tree, size = case
    assert_same_verdict(file_of(json.dumps(tree).encode(), size))
    assert_same_verdict(file_of(json.dumps(tree).encode(), data_end(tree)))


fragments = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"/", b"\\", b"\\/", b"\\x", b"\\u", b"\\u0041"),
        *(b"0", b"1", b"01", b"-", b"-0", b".", b"e", b"1e999", b"null", b"true", b"NaN", b"Infinity"),
        *(b" ", b"\t", b"\n", b"\r", b"\0", b"\x1f", b"\x7f", b"\xc2\xa0", b"\xef\xbb\xbf"),
        *(b"\x80", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\\ud800", b"\\udc00", b"\\ud83d\\ude00"),
        *(b'"x":1,', b'"shape":[1],', b',"__metadata__":{}'),
    ]
)


@thorough
@given(trees(), st.data())
def test_mutated_bytes_get_the_same_verdict(tree: dict[str, Any], data: st.DataObject) -> None:
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    text = bytearray(json.dumps(tree, separators=separators, ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        match data.draw(st.sampled_from(["insert", "replace", "delete", "flip"])):
            case "insert":
                text[at:at] = data.draw(fragments)
            case "replace":
                text[at : at + 1] = data.draw(fragments)
            case "delete":
                del text[at : at + data.draw(st.integers(1, 4))]
            case "flip" if at < len(text):
                text[at] ^= 1 << data.draw(st.integers(0, 7))
    assert_same_verdict(file_of(bytes(text), data_end(tree)))


@thorough
@given(trees(), st.data())
def test_mutated_files_get_the_same_verdict(tree: dict[str, Any], data: st.DataObject) -> None:
    file = bytearray(file_of(tree, data_end(tree)))
    match data.draw(st.sampled_from(["truncate", "append", "prefix", "prefix by a little"])):
        case "truncate":
            del file[data.draw(st.integers(0, len(file))) :]
        case "append":
            file += data.draw(st.binary(min_size=1, max_size=9))
        case "prefix":
            file[:8] = data.draw(st.binary(min_size=8, max_size=8))
        case _:
            length = int.from_bytes(file[:8], "little") + data.draw(st.integers(-9, 9))
            file[:8] = max(0, length).to_bytes(8, "little")
    assert_same_verdict(bytes(file))


# -- spellings that two JSON parsers may read differently ----------------------------------------------------

U8 = '"dtype":"U8","shape":[4],"data_offsets":[0,4]'


def nested(depth: int) -> str:
    """An ignored field by which the header is `depth` levels deep."""
    return f'{{"a":{{{U8},"x":{"[" * (depth - 2)}{"]" * (depth - 2)}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        *(f'{{"a":{{{U8},"x":{value}}}}}' for value in ("1", "1.5", "null", "[]", '{"y":[1,{"z":{}}]}', "-0", "-1")),
        *(f'{{"a":{{{U8},"x":{value}}}}}' for value in ("NaN", "Infinity", "-Infinity", "1e308", "1e309", "-1e309")),
        *(f'{{"a":{{{U8},"x":{"9" * digits}}}}}' for digits in (19, 20, 308, 309, 310, 5000)),
        *(
            f'{{"a":{{{U8},"x":[{{"y":{value}}}]}}}}'
            for value in ("1e309", "9" * 400, '"\\ud800"', "0e9999", "1e-9999")
        ),
        *(nested(depth) for depth in (2, 3, 126, 127, 128, 129, 2000)),
        *(
            f'{{"a":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,4]}}}}'
            for n in ("4.0", "4e0", "04", "+4", "-4", "0x4")
        ),
        *(
            f'{{"a":{{"dtype":"U8","shape":[4,{n}],"data_offsets":[0,4]}}}}'
            for n in ("true", "1", "1.0", '"1"', "null")
        ),
        *(f'{{"a":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,0]}}}}' for n in ("0", "-0", "0.0", "00", "-0.0")),
        *(
            f'{{"a":{{"dtype":"U8","shape":[0],"data_offsets":{n}}}}}'
            for n in ("[0,0]", "[-0,0]", "[0,-0]", "[0]", "[0,0,0]")
        ),
        *(
            f'{{"{name}":{{{U8}}}}}'
            for name in ("-0", "", "\\u0000", "\\ud800", "\\udc00", "\\ud83d\\ude00", "\\ud800\\ud800")
        ),
        *(
            f'{{"{name}":{{{U8}}}}}'
            for name in ("\\\\ud800", "\\\\\\ud800", "\\u00", "\\U0041", "\\uD83D\\u0041", "\x7f", "\x1f")
        ),
        *(
            f"{space}{{{chr(34)}a{chr(34)}:{{{U8}}}}}{space}"
            for space in (" ", "\t", "\r\n", "\f", "\v", "\0", "\ufeff", "\xa0")
        ),
        *(
            f'{{"__metadata__":{value},"a":{{{U8}}}}}'
            for value in ("null", "{}", '{"a":null}', '{"a":1}', "[]", '""', '{"a":"b"}')
        ),
        f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{{{U8}}}}}',
        f'{{"__metadata__":{{{U8}}}}}',
        f'{{"__metadata__":{{"dtype":"U8"}},"a":{{{U8}}}}}',
        f'{{"a":{{{U8}}}}}{{}}',
        f'{{"a":{{{U8}}},}}',
        f'{{"a":{{{U8},"dtype":"U8"}}}}',
        f'{{"a":{{{U8},"DTYPE":"U8"}}}}',
        f'{{"a":{{{U8}}}/**/}}',
        f'[{{"a":{{{U8}}}}}]',
        '{"a":{"dtype":"\\u00558","shape":[4],"data_offsets":[0,4]}}',
        *("", " ", "{}", "[]", "null", "{", "0", '""', "{}}", "{} ", " {}"),
    ],
)
@pytest.mark.parametrize("data_bytes", [0, 4])
def test_spellings_get_the_same_verdict(text: str, data_bytes: int) -> None:
    assert_same_verdict(file_of(text.encode(), data_bytes))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_library_knows_every_dtype_and_its_width(dtype: str) -> None:
    size = DTYPES[dtype].bits
    tree = {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}
    assert not isinstance(library(file_of(tree, size)), Exception)
    assert_same_verdict(file_of(tree, size))
    assert_same_verdict(file_of(tree, size + 1))


def test_the_library_knows_no_other_dtype() -> None:
    error = library(file_of({"a": {"dtype": "?", "shape": [], "data_offsets": [0, 0]}}, 0))
    known = set(str(error).partition("expected one of ")[2].split("`")[1::2])
    assert known == DTYPES.keys()


# -- what is refused on purpose ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'{{"a":{{{U8}}},"a":{{{U8}}}}}', "duplicate key 'a'"),
        (f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{{{U8}}}}}', "duplicate key 'k'"),
        (f'{{"a":{{{U8},"x":1,"x":2}}}}', "duplicate key 'x'"),
        (f'{{"a":{{{U8},"x":{{"y":1,"y":2}}}}}}', "duplicate key 'y'"),
        ('{"a":["U8",[4],[0,4]]}', "not an object"),
        ('{"a":{"dtype":{"U8":null},"shape":[4],"data_offsets":[0,4]}}', "unknown dtype"),
    ],
)
def test_refused_on_purpose(text: str, reason: str) -> None:
    file = file_of(text.encode(), 4)
    assert not isinstance(library(file), Exception), "no longer laxer than we are: drop it from the list"
    verdict = ours(file)
    assert isinstance(verdict, HeaderError)
    assert reason in verdict.message
    assert refused_on_purpose(file)
