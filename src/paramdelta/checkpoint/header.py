"""The header of a safetensors file: bytes to a validated `Header`, and back. Pure: nothing here opens a file.

A file is accepted if and only if the safetensors library accepts it, except that the following, which the
library lets through, are refused on purpose:

- a name, or any other key, that occurs twice in one object (the library takes the last);
- an entry written as an array, ``["F32", [1], [0, 4]]``, instead of an object;
- a dtype written as an object, ``{"F32": null}``, instead of a string.

In fields that both ignore, a number within rounding of the largest double is accepted here; the library calls some
spellings of it out of range.
"""

from __future__ import annotations

import json
import math
import operator
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from paramdelta.checkpoint import strict_json
from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.checkpoint.wording import clipped, quoted
from paramdelta.errors import HeaderError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_U64 = 1 << 64
_MAX_NESTING = 127
_USUAL_RANK = 8
_DOWNLOAD_AGAIN = "The file is incomplete or damaged: download it again."
_WRITE_AGAIN = "The file is damaged or was written wrongly: download it again, or save it again with safetensors."


class TensorEntry(NamedTuple):
    """One tensor of a file: `dtype` as in `DTYPES`, data in the bytes [begin, end) of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that obeys every rule of the format.

    `tensors` is in offset order and covers the data section without hole or overlap; `data_offset` is the
    byte of the file at which that section begins.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_offset: int


def parse_length(prefix: bytes, file_size: int, file: str) -> int:
    """Return N, the length in bytes of the JSON that follows the 8 bytes `prefix`.

    Raises HeaderError where the file is too short to hold what it announces, or N exceeds the format's limit.
    """
    if file_size < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise HeaderError(
            f"a file of {file_size} bytes is too short to be a safetensors file",
            file=file,
            remedy=_DOWNLOAD_AGAIN,
        )
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"not a safetensors file: its first 8 bytes announce a header of {length} bytes, "
            f"and the format allows {MAX_HEADER_BYTES}",
            file=file,
            remedy=_DOWNLOAD_AGAIN,
        )
    if PREFIX_BYTES + length > file_size:
        raise HeaderError(
            f"truncated: the header should end at byte {PREFIX_BYTES + length}, and the file has {file_size}",
            file=file,
            remedy=_DOWNLOAD_AGAIN,
        )
    return length


def parse_header(raw: bytes, file_size: int, file: str) -> Header:
    """Return the header whose JSON is `raw` (the N bytes after the prefix) in a file of `file_size` bytes.

    Raises HeaderError, naming `file` and the tensor, where a rule of the format is broken.
    """
    tree = _parse_json(raw, file)
    metadata = _metadata(tree.pop(_METADATA, None), file)
    tensors = _in_offset_order(_entries(tree, file))
    data_offset = PREFIX_BYTES + len(raw)
    _check_coverage(tensors, file_size - data_offset, file)
    return Header(tensors, metadata, data_offset)


def _broken(rule: str, file: str, tensor: str | None = None) -> NoReturn:
    tensor = None if tensor is None else clipped(tensor)
    raise HeaderError(f"invalid safetensors header: {rule}", file=file, tensor=tensor, remedy=_WRITE_AGAIN)


def _parse_json(raw: bytes, file: str) -> dict[str, Any]:
    try:
        tree = strict_json.parse(raw)
    except strict_json.InvalidJSONError as error:
        _broken(str(error), file)
    if type(tree) is not dict:
        _broken("the JSON is not an object", file)
    return tree


def _metadata(value: object, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not dict or not all(type(text) is str for text in value.values()):
        _broken(f"{_METADATA} must map strings to strings, and no tensor can have that name", file)
    return value


def _entries(tree: dict[str, Any], file: str) -> dict[str, TensorEntry]:
    # One quick test per entry; only an entry that fails it is asked what is wrong. Checkpoints have up to 10⁵
    # tensors and each of three is read: names, dtypes and shapes that are equal are made one object.
    entries: dict[str, TensorEntry] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name, value in tree.items():
        try:
            dtype = DTYPES[value["dtype"]].name
            shape = value["shape"]
            begin, end = value["data_offsets"]
            sound = type(begin) is int and type(end) is int and 0 <= begin < _U64 and 0 <= end < _U64
            sound = sound and type(shape) is list and _are_sizes(shape)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            _refuse_entry(value, name, file)
        if len(value) != len(_FIELDS):
            _check_ignored(value, name, file)
        size = tuple(shape)
        entries[sys.intern(name)] = TensorEntry(dtype, shapes.setdefault(size, size), begin, end)
    return entries


def _are_sizes(numbers: list[Any]) -> bool:
    for n in numbers:  # noqa: SIM110 (a generator would take twice the time)
        if type(n) is not int or not 0 <= n < _U64:
            return False
    return True


def _refuse_entry(value: Any, name: str, file: str) -> NoReturn:
    if type(value) is not dict:
        _broken("the tensor's entry is not an object", file, name)
    for field in _FIELDS:
        if field not in value:
            _broken(f"the tensor's entry lacks {field}", file, name)
    dtype = value["dtype"]
    if type(dtype) is not str or dtype not in DTYPES:
        _broken(f"unknown dtype {clipped(repr(dtype))}", file, name)
    shape = value["shape"]
    if type(shape) is not list or not _are_sizes(shape):
        _broken("the shape is not a list of unsigned 64-bit integers", file, name)
    _broken("data_offsets is not a pair of unsigned 64-bit integers", file, name)


def _check_ignored(entry: dict[str, Any], name: str, file: str) -> None:
    # The library ignores fields that it does not know, but only where they hold numbers that fit into a
    # double and are not nested deeper than it can read. The header and the entry are the first two levels.
    level: list[Any] = [entry]
    depth = 2
    while level:
        if depth > _MAX_NESTING:
            _broken("nested too deeply", file, name)
        items = [item for holder in level for item in (holder.values() if type(holder) is dict else holder)]
        if any(type(item) in (int, float) and not _is_finite(item) for item in items):
            _broken("a number is out of range", file, name)
        level = [item for item in items if type(item) in (dict, list)]
        depth += 1


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _in_offset_order(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    extents = [(entry.begin, entry.end) for entry in tensors.values()]
    if all(map(operator.le, extents, extents[1:])):
        return tensors
    return dict(sorted(tensors.items(), key=lambda item: item[1][2:]))


def _check_coverage(tensors: dict[str, TensorEntry], data_bytes: int, file: str) -> None:
    position = 0
    for name, (dtype, shape, begin, end) in tensors.items():
        if begin != position or end < begin:
            _refuse_extent(begin, end, position, name, file)
        # The product of few sizes is quick, and exact unless it hides an overflow: behind a zero, or beyond 64 bits.
        # That of a hostile million would take hours.
        bits = math.prod(shape) * DTYPES[dtype].bits if len(shape) <= _USUAL_RANK else 0
        if bits == 0 or bits >= _U64 or bits != 8 * (end - begin):
            _check_size(dtype, shape, end - begin, name, file)
        position = end
    if position > data_bytes:
        raise HeaderError(
            f"truncated: {position} bytes of tensor data are announced, and the file has {data_bytes}",
            file=file,
            remedy=_DOWNLOAD_AGAIN,
        )
    if position < data_bytes:
        _broken(f"{data_bytes - position} bytes after the last tensor belong to none", file)


def _refuse_extent(begin: int, end: int, position: int, name: str, file: str) -> NoReturn:
    if end < begin:
        _broken(f"the tensor's data ends at {end}, before its begin at {begin}", file, name)
    flaw = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
    _broken(f"the tensor's data {flaw}: it begins at {begin}, not at {position}", file, name)


def _check_size(dtype: str, shape: tuple[int, ...], nbytes: int, name: str, file: str) -> None:
    bits = 1
    for size in (*shape, DTYPES[dtype].bits):
        bits *= size
        if bits >= _U64:
            _broken("the tensor's size exceeds 64 bits", file, name)
    if bits % 8:
        _broken(f"{dtype} elements of shape {_sized(shape)} do not fill whole bytes", file, name)
    if bits != 8 * nbytes:
        _broken(
            f"{dtype} of shape {_sized(shape)} takes {bits // 8} bytes, and data_offsets span {nbytes}",
            file,
            name,
        )


def _sized(shape: tuple[int, ...]) -> str:
    return clipped(str(list(shape)))


def build_header(tensors: Iterable[tuple[str, TensorEntry]], metadata: Mapping[str, str], align: int = 4096) -> bytes:
    """Return the opening of a file: 8 length bytes, then the JSON, padded to a multiple of `align` bytes.

    `tensors` come in the order in which they shall be listed. Raises HeaderError where the header would not
    be one: above the format's size limit, a name that occurs twice or is reserved, a lone surrogate.
    """
    tree: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, entry in tensors:
        if name in tree or name == _METADATA:
            raise HeaderError(f"the name {quoted(name)} is reserved or occurs twice", tensor=clipped(name))
        tree[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
    try:
        text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise HeaderError("a tensor name or metadata holds a lone surrogate, which is not Unicode") from None
    length = len(text) + -(PREFIX_BYTES + len(text)) % align
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"a header of {length} bytes exceeds the format's limit of {MAX_HEADER_BYTES}")
    return length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)
