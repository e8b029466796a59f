"""Puts the code of an object file into this process: ELF for x86-64, where all that it refers to is its own.

LLVM can do that for every format, but its library has 180 MB, and to load it takes longer than to read the first
gigabyte. Sections and relocations are as the System V ABI has them (gABI, chapter 4; psABI for AMD64, 4.4).
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import Final, NamedTuple

from paramdelta.storage import pages
from paramdelta.storage.platform import c_function

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELOCATION: Final = struct.Struct("<QQq")

_IDENTITY: Final = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_RELOCATABLE, _X86_64 = 1, 62
_PROGRAM, _SYMBOLS, _STRINGS, _RELOCATIONS, _NOTHING = 1, 2, 3, 4, 8
_WRITABLE, _LOADED = 1, 2
_UNWINDING: Final = 0x7000_0001  # for exceptions, which these loops never raise
_ABSOLUTE_64, _RELATIVE_32, _CALL_32, _RELATIVE_64 = 1, 2, 4, 24

_mprotect: Final = c_function("mprotect", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Code(NamedTuple):
    """Code that can be called, as long as this object lives: where each symbol is, and the memory that holds it."""

    addresses: dict[str, int]
    memory: mmap.mmap


class _Section(NamedTuple):
    kind: int
    flags: int
    body: bytes
    size: int
    link: int
    info: int
    alignment: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


def link(file: bytes) -> Code | None:
    """Return the code in an object file, ready to be called.

    Returns None where it is of another kind, refers to something that is not in it, or the system lets nobody make
    memory executable: LLVM may know better.
    """
    sections = _sections(file)
    if sections is None or _mprotect is None or not hasattr(mmap, "PROT_EXEC"):
        return None
    places = _lay_out(sections)
    symbols = [symbol for section in sections if section.kind == _SYMBOLS for symbol in _symbols(section, sections)]
    if places is None:
        return None
    size = max(places[number] + len(sections[number].body) for number in places)
    memory = mmap.mmap(-1, size)
    start = pages.address_of(memory)
    for number, place in places.items():
        memory[place : place + len(sections[number].body)] = sections[number].body
    for section in sections:
        if section.kind == _RELOCATIONS and section.info in places:
            for offset, kind, symbol, addend in _relocations(section, symbols):
                if symbol.section not in places:
                    return None
                at = places[section.info] + offset
                target = places[symbol.section] + symbol.value + addend
                if not _relocate(memory, kind, at, target, start):
                    return None
    if _mprotect(start, size, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        return None
    found = {each.name: start + places[each.section] + each.value for each in symbols if each.section in places}
    return Code(found, memory)


def _sections(file: bytes) -> list[_Section] | None:
    """Return the sections of an object file, None where it is not one for this processor."""
    if len(file) < _HEADER.size or not file.startswith(_IDENTITY):
        return None
    _, kind, machine, *_, offset, _, _, _, _, width, count, _ = _HEADER.unpack_from(file)
    if (kind, machine, width) != (_RELOCATABLE, _X86_64, _SECTION.size):
        return None
    sections = []
    for number in range(count):
        _, kind, flags, _, begin, size, link, info, alignment, _ = _SECTION.unpack_from(file, offset + number * width)
        body = b"" if kind == _NOTHING else file[begin : begin + size]
        sections.append(_Section(kind, flags, body, size, link, info, max(1, alignment)))
    return sections


def _lay_out(sections: list[_Section]) -> dict[int, int] | None:
    """Return where each section that is needed goes, None where one could not be as it wants to be."""
    places: dict[int, int] = {}
    end = 0
    for number, section in enumerate(sections):
        if not section.flags & _LOADED or section.kind == _UNWINDING or section.size == 0:
            continue
        if section.kind != _PROGRAM or section.flags & _WRITABLE:
            return None
        places[number] = -(-end // section.alignment) * section.alignment
        end = places[number] + section.size
    return places or None


def _symbols(table: _Section, sections: list[_Section]) -> list[_Symbol]:
    names = sections[table.link].body
    return [
        _Symbol(names[name : names.index(b"\0", name)].decode(), section, value)
        for name, _, _, section, value, _ in _SYMBOL.iter_unpack(table.body)
    ]


def _relocations(section: _Section, symbols: list[_Symbol]) -> list[tuple[int, int, _Symbol, int]]:
    """Return offset, kind, symbol and addend of each."""
    return [
        (offset, info & 0xFFFF_FFFF, symbols[info >> 32], addend)
        for offset, info, addend in _RELOCATION.iter_unpack(section.body)
    ]


def _relocate(memory: mmap.mmap, kind: int, at: int, target: int, start: int) -> bool:
    """Write into the place ``at`` how to get to ``target``; return whether that is known."""
    if kind == _ABSOLUTE_64:
        struct.pack_into("<Q", memory, at, start + target)
    elif kind in {_RELATIVE_32, _CALL_32}:
        struct.pack_into("<i", memory, at, target - at)
    elif kind == _RELATIVE_64:
        struct.pack_into("<q", memory, at, target - at)
    else:
        return False
    return True
