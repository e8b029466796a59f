"""The arithmetic's front door: which compiled loop fuses which dtypes, called with raw addresses.

Two kinds of sum. With one delta and a coefficient of 1 the output is the real number post - base + new base, rounded
once. Otherwise it is accumulated in f64, in the order given, and rounded once more to the output dtype. In both, where
all dtypes agree, bits are copied rather than computed where nothing was added: where every post has its base's bits the
output has the new base's, and with one delta of coefficient 1, where new base and base agree, it has post's.
Elsewhere an exact zero is +0 and a NaN is the canonical quiet one, so that every machine gives the same bytes.
"""

from __future__ import annotations

import struct
from array import array
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.engine.machine_code import Loop, loop
from paramdelta.engine.scratch import BLOCK, Scratch
from paramdelta.errors import ParamDeltaError
from paramdelta.storage import process
from paramdelta.storage.pages import Buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from paramdelta.checkpoint.scaling import Blocks
    from paramdelta.engine.sums import Sums
    from paramdelta.planning.parts import Operand, Scale

    Kernel = Callable[[array[int], int, int, int, int, Sums], None]
    """Called with the operands' addresses, the output's, first element and end, the counters' address, and sums."""

_FORMATS = {
    "BF16": (7, 8, 0x7F7F),
    "F16": (10, 5, 0x7BFF),
    "F32": (23, 8, 0x7F7F_FFFF),
    "F64": (52, 11, 0x7FEF_FFFF_FFFF_FFFF),
    "F8_E5M2": (2, 5, 0x7B),
    "F8_E4M3": (3, 4, 0x7E),  # 448: the bits of infinity and of most NaNs are numbers here (OCP 8-bit float, "FN")
}
"""Bits of the fraction and of the exponent, and the code of the greatest finite number."""

_SHORTCUTS = {"BF16": "skim_bf16", "F16": "skim_f16", "F32": "skim_f32"}
"""For one dtype throughout."""

_TINY, _ULP = 2.0**-1073, 2.0**-53

_STRETCH: Final = 16 * BLOCK
"""Elements done in full where a shortcut stops: enough to hide the calls, too few to matter where it happens once."""

_CHUNK: Final = 256 * BLOCK
"""Elements that are fused and then added up: few enough to stay in the L2 cache."""

_ENDLESS: Final = 1 << 62
"""Columns of what is no matrix."""

MERGEABLE: tuple[str, ...] = tuple(_FORMATS)
"""The safetensors dtypes that can be added, in any mix."""


class Places(NamedTuple):
    """Where in memory matrices would begin, and their scales (0 where there are none), were all of them there."""

    matrices: tuple[int, ...]
    scales: tuple[int, ...]


class Band(NamedTuple):
    """What came of one row of blocks: the bytes of its scales; the sums of squares of errors, and of the results."""

    scales: bytes
    error: float
    size: float


def fuse(
    addresses: Sequence[int],
    dtypes: tuple[str, ...],
    alphas: tuple[float, ...],
    out_address: int,
    out_dtype: str,
    count: int,
    counters: array[int],
    sums: Sums,
) -> None:
    """Write new base + sum of alpha (post - base) over ``count`` elements, and add up the deltas; releases the GIL.

    Without deltas that converts the new base to another dtype.

    Args:
        addresses: where the 2k + 1 operands new base, post 1, base 1, post 2, base 2, … start, at any alignment.
            Memory behind them is read unchecked.
        dtypes: their safetensors dtypes, in the same order.
        alphas: the k coefficients.
        out_address: where the output starts, at any alignment; it must not overlap an operand.
        out_dtype: the output's safetensors dtype.
        count: elements.
        counters: two int64 (`array` of type ``q``): the numbers of infinities and of NaNs that were computed, not
            copied, are added.
        sums: of as many deltas; what they come to in these elements is added.

    Raises:
        ValueError: a dtype is not in `MERGEABLE`, or the lengths do not fit each other.
    """
    _require_sums(alphas, sums)
    places = array("q", addresses)
    _kernel(dtypes, alphas, out_dtype)(places, out_address, 0, count, _at(counters), sums)


def fuse_scaled(
    operands: Sequence[Operand],
    alphas: tuple[float, ...],
    places: Places,
    columns: int,
    elements: range,
    out_address: int,
    out_dtype: str,
    counters: array[int],
    sums: Sums,
) -> None:
    """Do what `fuse` does for elements of matrices some of which are block-scaled, releasing the GIL.

    Args:
        operands: of the part.
        places: where each matrix would begin in memory, and its scales.
        columns: of the matrices.
        elements: which of them, in row-major order.
        out_address: where the first of these goes.
        out_dtype: a dtype of `MERGEABLE`.
        counters: as in `fuse`, and ``sums`` too.
    """
    _require_sums(alphas, sums)
    described, coefficients, scratch = _Described.of(operands, out_dtype, places), array("d", alphas), Scratch()
    loop("scaled", "fuse_scaled")(
        *described.kinds,
        _at(coefficients),
        *described.places,
        columns,
        elements.start,
        elements.stop,
        out_address,
        _at(counters),
        *scratch.addresses,
    )
    if alphas:
        _add_up(described, columns, elements, sums)


def requantise(
    operands: Sequence[Operand],
    alphas: tuple[float, ...],
    places: Places,
    columns: int,
    rows: range,
    out_address: int,
    blocks: Blocks,
    scale_dtype: str,
    counters: array[int],
    sums: Sums,
) -> Band:
    """Write one row of blocks of the sum as block-scaled E4M3, releasing the GIL. Arguments as `fuse_scaled`.

    Args:
        rows: which rows of the matrices; those of one row of blocks.
        blocks: the form of the output.
        scale_dtype: F32 or BF16.
    """
    _require_sums(alphas, sums)
    found = array("Q", bytes(8 * -(-columns // blocks.columns)))
    errors = array("d", (0.0, 0.0))
    width = DTYPES[scale_dtype].bits // 8
    described, coefficients = _Described.of(operands, "F8_E4M3", places), array("d", alphas)
    form = array("q", (blocks.rows, blocks.columns, blocks.powers_of_two, width))
    scratch, block = Scratch(), Buffer(8 * blocks.rows * blocks.columns)
    loop("scaled", "requantise")(
        *described.kinds,
        _at(coefficients),
        *described.places,
        columns,
        rows.start,
        rows.stop,
        out_address,
        _at(form),
        len(found),
        _at(found),
        _at(counters),
        _at(errors),
        *scratch.addresses,
        block.address,
    )
    if alphas:
        _add_up(described, columns, range(rows.start * columns, rows.stop * columns), sums)
    scales = b"".join(code.to_bytes(width, "little") for code in found)
    return Band(scales, errors[0], errors[1])


def _require_sums(alphas: tuple[float, ...], sums: Sums) -> None:
    """Raise ValueError where compiled code would write beyond the sums."""
    if sums.number != len(alphas):
        raise ValueError(f"sums of {sums.number} deltas do not fit {len(alphas)} coefficients")


def preparations(
    combinations: Iterable[tuple[tuple[str, ...], tuple[float, ...], str]], *, scaled: bool
) -> Iterator[Callable[[], object]]:
    """Yield what to call so that no later call waits for a loop to be compiled or linked, a loop or two at a time.

    Args:
        combinations: what `fuse` is wanted for: (dtypes, alphas, out_dtype).
        scaled: whether `fuse_scaled` and `requantise` are wanted too.
    """
    yield floats_are_strict
    for dtypes, alphas, out_dtype in combinations:
        yield partial(_kernel, dtypes, alphas, out_dtype)
    for name in ("fuse_scaled", "requantise") if scaled else ():
        yield partial(loop, "scaled", name)
    yield partial(loop, "statistics", "measure")


def floats_are_strict() -> bool:
    """Return whether this thread keeps subnormals and rounds to nearest, as programs start with."""
    bits = struct.unpack("<2q", struct.pack("<2d", _TINY, _ULP))
    return loop("arithmetic", "floats_are_strict")(*bits) == 1


def require_strict_floats() -> None:
    """See to it that floats behave in this thread as IEEE 754 has it: subnormals are kept, sums rounded to nearest.

    Raises:
        ParamDeltaError: they do not, and cannot be made to.
    """
    if floats_are_strict():
        return
    process.restore_floats()
    if not floats_are_strict():
        raise ParamDeltaError(
            "this process flushes subnormal numbers or rounds in another way than to nearest",
            remedy="Find the library that does so (built with -ffast-math?), or merge in a process without it.",
        )


@lru_cache(maxsize=1024)
def _kernel(dtypes: tuple[str, ...], alphas: tuple[float, ...], out_dtype: str) -> Kernel:
    if not set(dtypes) | {out_dtype} <= set(MERGEABLE):
        raise ValueError(f"cannot add {', '.join(dtypes)} to {out_dtype}: only {', '.join(MERGEABLE)} can be added")
    if len(dtypes) != 2 * len(alphas) + 1:
        raise ValueError(f"{len(alphas)} coefficients do not fit {len(dtypes)} operands")
    formats = _formats((*dtypes, out_dtype))
    adding = partial(_add_up_plain, dtypes) if alphas else _add_up_nothing
    if alphas != (1.0,):
        weighted = partial(_fuse_weighted, loop("arithmetic", "fuse_weighted"), formats, array("d", alphas))
        return partial(_fuse_and_add_up, weighted, adding)
    exact = partial(_fuse_exact, loop("arithmetic", "fuse_exact"), formats)
    measured = partial(_fuse_and_add_up, exact, adding)
    if set(dtypes) == {out_dtype} and out_dtype in _SHORTCUTS:
        return partial(_fuse_alike, loop("shortcuts", _SHORTCUTS[out_dtype]), measured)
    return measured


def _fuse_alike(
    skim: Loop, exact: Kernel, addresses: array[int], out: int, begin: int, end: int, counters: int, sums: Sums
) -> None:
    """Take the shortcut as far as it goes, a stretch in full, the shortcut again."""
    scratch = Scratch()
    while (begin := skim(_at(addresses), out, begin, end, sums.address, scratch.addresses[1])) < end:
        stop = min(begin + _STRETCH, end)
        exact(addresses, out, begin, stop, counters, sums)
        begin = stop


def _fuse_and_add_up(
    fuse: Callable[[int, int, int, int, int], None],
    add_up: Callable[[array[int], int, int, Sums], None],
    addresses: array[int],
    out: int,
    begin: int,
    end: int,
    counters: int,
    sums: Sums,
) -> None:
    """Fuse, and add up the deltas, a chunk at a time that stays in the cache."""
    for start in range(begin, end, _CHUNK):
        stop = min(start + _CHUNK, end)
        fuse(_at(addresses), out, start, stop, counters)
        add_up(addresses, start, stop, sums)


def _add_up_nothing(_addresses: array[int], _begin: int, _end: int, _sums: Sums) -> None:
    """There are no deltas."""


def _add_up_plain(dtypes: tuple[str, ...], addresses: array[int], begin: int, end: int, sums: Sums) -> None:
    """Add up deltas of operands without scales."""
    _add_up(_Described.plain(dtypes, addresses), _ENDLESS, range(begin, end), sums)


def _add_up(described: _Described, columns: int, elements: range, sums: Sums) -> None:
    scratch, deltas = Scratch(), array("d", bytes(8 * BLOCK * (described.number // 2)))
    loop("statistics", "measure")(
        *described.kinds,
        *described.places,
        columns,
        elements.start,
        elements.stop,
        sums.address,
        *scratch.addresses,
        _at(deltas),
    )


def _fuse_exact(fuse: Loop, formats: array[int], addresses: int, out: int, begin: int, end: int, counters: int) -> None:
    scratch = Scratch()
    fuse(_at(formats), addresses, out, begin, end, counters, *scratch.addresses)


def _fuse_weighted(
    fuse: Loop,
    formats: array[int],
    alphas: array[float],
    addresses: int,
    out: int,
    begin: int,
    end: int,
    counters: int,
) -> None:
    scratch = Scratch()
    fuse(_at(formats), len(alphas), _at(alphas), addresses, out, begin, end, counters, *scratch.addresses)


def _at(numbers: array[int] | array[float]) -> int:
    """Return where an array begins; the caller keeps it alive."""
    return numbers.buffer_info()[0]


class _Described(NamedTuple):
    """Operands as `paramdelta.engine.loops.scaled` wants them: how many, and arrays that describe them."""

    number: int
    formats: array[int]
    forms: array[int]
    matrices: array[int]
    scales: array[int]

    @property
    def kinds(self) -> tuple[int, int, int]:
        """How many, and where it says what they are."""
        return self.number, _at(self.formats), _at(self.forms)

    @property
    def places(self) -> tuple[int, int]:
        """Where it says where they are."""
        return _at(self.matrices), _at(self.scales)

    @classmethod
    def of(cls, operands: Sequence[Operand], out_dtype: str, places: Places) -> _Described:
        """Describe operands, scales or not, and the output."""
        return cls(
            len(operands),
            _formats((*(operand.dtype for operand in operands), out_dtype)),
            _forms([operand.scale for operand in operands]),
            array("q", places.matrices),
            array("q", places.scales),
        )

    @classmethod
    def plain(cls, dtypes: tuple[str, ...], addresses: array[int]) -> _Described:
        """Describe operands without scales."""
        number = len(dtypes)
        return cls(number, _formats(dtypes), _forms((None,) * number), addresses, array("q", bytes(8 * number)))


@lru_cache(maxsize=64)
def _formats(dtypes: tuple[str, ...]) -> array[int]:
    return array("q", (number for dtype in dtypes for number in _FORMATS[dtype]))


def _forms(scales: Sequence[Scale | None]) -> array[int]:
    """Return the rows that `paramdelta.engine.loops.scaled` wants; a matrix without scales has a form of zeros."""
    rows = array("q")
    for scale in scales:
        if scale is None:
            rows.extend((0, 0, 0, 0))
        else:
            rows.extend((DTYPES[scale.dtype].bits // 8, scale.block_rows, scale.block_columns, scale.columns))
    return rows
