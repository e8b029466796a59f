"""Block-scaled operands and outputs: what `paramdelta.engine.loops.arithmetic` does, for matrices with scales.

A code of E4M3 times the scale of its block, F32 or BF16, is exact in f64; so sums are as exact as those of plain
weights, and rounded once. To write block-scaled weights, a block's sums are held, their largest magnitude decides the
scale, and each is divided by it and rounded to E4M3: to what the exact sum's quotient is nearest to.

Arrays that describe operands have a row for each, new, post, base, post, base, …: ``formats`` (fraction bits, exponent
bits, top), ``forms`` (bytes of a scale or 0, rows and columns of a block, columns of the scale matrix). ``addresses``
and ``scales`` say where in memory the first element of each matrix would be, and of its scales; what is not needed of
them may be missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paramdelta.engine.loops.arithmetic import (
    add,
    decode,
    encode,
    load,
    one_format,
    settle,
    store,
    width_of,
)
from paramdelta.engine.loops.bits import (
    bits64,
    code_array,
    entry,
    float32,
    float64,
    integer_array,
    load8,
    load16,
    load32,
    part,
    store8,
    value_array,
)
from paramdelta.engine.scratch import BLOCK, ROWS

if TYPE_CHECKING:
    from numpy.typing import NDArray

GREATEST = 448.0
"""The greatest number of E4M3."""

_LEAST_SCALE = 2.0**-126
_FRACTION = np.uint64((1 << 52) - 1)


@part
def scale_bits(base: np.int64, width: int, index: int) -> np.uint32:
    """Return the code of a scale."""
    return load32(base, index) if width == 4 else np.uint32(load16(base, index))


@part
def scale_value(code: np.uint32, width: int) -> float:
    """Return what the code of a scale means."""
    wide = np.uint32(code) if width == 4 else np.uint32(code << np.uint32(16))
    return float(np.float64(float32(wide)))


@part
def scale_place(forms: NDArray[np.int64], j: int, row: int, column: int) -> int:
    """Return which scale an element of an operand has."""
    return int(row // forms[j, 1] * forms[j, 3] + column // forms[j, 2])


@part
def gather(
    formats: NDArray[np.int64],
    forms: NDArray[np.int64],
    addresses: NDArray[np.int64],
    scales: NDArray[np.int64],
    j: int,
    place: tuple[int, int, int],
    size: int,
    codes: NDArray[np.uint64],
    values: NDArray[np.float64],
) -> None:
    """Read elements of one operand that lie in one row and one block, from (element, row, column) on."""
    element, row, column = place
    width = width_of(formats[j, 0], formats[j, 1])
    load(np.int64(addresses[j] + element * width), width, size, codes)
    decode(codes, formats[j, 0], formats[j, 1], formats[j, 2], size, values)
    if forms[j, 0] != 0:
        code = scale_bits(scales[j], forms[j, 0], scale_place(forms, j, row, column))
        scale = scale_value(code, forms[j, 0])
        for i in range(size):
            values[i] *= scale


@part
def is_exact(alphas: NDArray[np.float64]) -> bool:
    """Return whether the sum is post - base + new, which is rounded once."""
    return bool(alphas.shape[0] == 1 and alphas[0] == 1.0)


@part
def sum_piece(
    formats: NDArray[np.int64],
    forms: NDArray[np.int64],
    alphas: NDArray[np.float64],
    addresses: NDArray[np.int64],
    scales: NDArray[np.int64],
    place: tuple[int, int, int],
    size: int,
    narrow: bool,
    codes: NDArray[np.uint64],
    values: NDArray[np.float64],
) -> tuple[bool, bool]:
    """Sum into ``values[3]``; say whether any post's codes differ from its base's, and the new base's from a base's."""
    new, post, base, total = values[0], values[1], values[2], values[3]
    differ = moved = np.uint64(0)
    gather(formats, forms, addresses, scales, 0, place, size, codes[0], new)
    for i in range(size):
        total[i] = new[i]
    for k in range(alphas.shape[0]):
        gather(formats, forms, addresses, scales, 2 * k + 1, place, size, codes[1], post)
        gather(formats, forms, addresses, scales, 2 * k + 2, place, size, codes[2], base)
        for i in range(size):
            differ |= codes[1, i] ^ codes[2, i]
            moved |= codes[0, i] ^ codes[2, i]
        if is_exact(alphas):
            add(post, base, new, narrow, size, total)
        else:
            for i in range(size):
                total[i] += alphas[k] * (post[i] - base[i])
    return differ != np.uint64(0), moved != np.uint64(0)


@part
def until_edge(forms: NDArray[np.int64], column: int, size: int) -> int:
    """Return how many of ``size`` elements from a column on have the same scale in each operand, `BLOCK` at most."""
    size = min(size, BLOCK)
    for j in range(forms.shape[0]):
        if forms[j, 0] != 0:
            size = min(size, forms[j, 2] - column % forms[j, 2])
    return size


@entry
def fuse_scaled(
    operands: int,
    formats_at: int,
    forms_at: int,
    alphas_at: int,
    addresses_at: int,
    scales_at: int,
    columns: int,
    begin: int,
    end: int,
    out: int,
    counters_at: int,
    codes_at: int,
    values_at: int,
) -> None:
    """Write the sums of elements ``begin`` to ``end`` of matrices of so many columns, in the format of the last row.

    Args:
        operands: how many; the names that end in ``_at`` are addresses of the arrays that describe them.
        counters_at: as in `paramdelta.engine.loops.arithmetic.fuse_exact`, and the scratch too.
    """
    formats, forms = integer_array(formats_at, operands + 1, 3), integer_array(forms_at, operands, 4)
    alphas = value_array(alphas_at, 1, operands // 2)[0]
    addresses, scales = integer_array(addresses_at, 1, operands)[0], integer_array(scales_at, 1, operands)[0]
    counters = integer_array(counters_at, 1, 2)[0]
    codes, values = code_array(codes_at, ROWS, BLOCK), value_array(values_at, ROWS, BLOCK)
    last = operands
    fraction, exponent, top = formats[last, 0], formats[last, 1], formats[last, 2]
    width = width_of(fraction, exponent)
    for i in range(BLOCK):
        codes[4, i] = codes[5, i] = np.uint64(1)  # no law copies a number that has another form
    element = begin
    while element < end:
        row, column = element // columns, element % columns
        size = until_edge(forms, column, min(end - element, columns - column))
        place = (element, row, column)
        sum_piece(formats, forms, alphas, addresses, scales, place, size, fraction < 52, codes, values)
        encode(values[3], fraction, exponent, top, size, codes[3])
        settle(codes[3], codes[4], codes[5], codes[0], codes[0], fraction, exponent, top, size, counters)
        store(codes[3], width, size, out + (element - begin) * width)
        element += size


@part
def same_scales(
    forms: NDArray[np.int64], scales: NDArray[np.int64], one: int, other: int, row: int, column: int
) -> bool:
    """Return whether two operands have the same scale at an element."""
    return bool(
        scale_bits(scales[one], forms[one, 0], scale_place(forms, one, row, column))
        == scale_bits(scales[other], forms[other, 0], scale_place(forms, other, row, column))
    )


@part
def suits(code: np.uint32, width: int, powers_of_two: bool) -> bool:
    """Return whether a scale may stand in the output: a power of two, where all of them are to be."""
    fraction = np.uint32(0x7FFFFF) if width == 4 else np.uint32(0x7F)
    return bool(not powers_of_two or code & fraction == np.uint32(0))


@part
def laws_hold(formats: NDArray[np.int64], forms: NDArray[np.int64], blocks: NDArray[np.int64]) -> bool:
    """Return whether all operands have the form of the output, so that blocks are copied where nothing was added."""
    same = one_format(formats)
    for j in range(forms.shape[0]):
        same = same and forms[j, 0] == blocks[3] and forms[j, 1] == blocks[0] and forms[j, 2] == blocks[1]
    return same


@part
def scale_for(greatest: float, powers_of_two: bool) -> float:
    """Return the scale, before it is rounded, that makes the greatest magnitude of a block that of E4M3."""
    if greatest == 0.0:
        return 1.0
    scale = max(greatest / GREATEST, _LEAST_SCALE)
    if powers_of_two and bits64(scale) & _FRACTION != np.uint64(0):
        scale = float64((bits64(scale) & ~_FRACTION) + (np.uint64(1) << np.uint64(52)))
    return scale


@part
def round_scale(scale: float, width: int, codes: NDArray[np.uint64], values: NDArray[np.float64]) -> np.uint64:
    """Round a scale to F32 or BF16, to a finite number."""
    fraction, top = (23, 0x7F7FFFFF) if width == 4 else (7, 0x7F7F)
    values[0] = scale
    encode(values, fraction, 8, top, 1, codes)
    return min(codes[0], np.uint64(top))


@part
def copy_rows(source: int, target: int, columns: int, rows: int, size: int) -> None:
    """Copy a block of bytes between matrices of so many columns."""
    for r in range(rows):
        for i in range(size):
            store8(target + r * columns, i, load8(source + r * columns, i))


@part
def quantise(
    sums: NDArray[np.float64],
    scale: float,
    size: int,
    out: int,
    counters: NDArray[np.int64],
    errors: NDArray[np.float64],
    codes: NDArray[np.uint64],
    values: NDArray[np.float64],
) -> None:
    """Write sums / scale in E4M3, rounded once, and add up the squares of what that loses and of the sums."""
    quotients, back = values[4], values[5]
    for i in range(size):
        # Rounded, a quotient is a tie of E4M3 only where it is one exactly: f64 holds tie * scale, and the next sum
        # above or below it is more than half a unit of the quotient away, for a scale's significand is less than 2.
        quotients[i] = sums[i] / scale
    encode(quotients, 3, 4, 0x7E, size, codes[3])
    settle(codes[3], codes[4], codes[5], codes[0], codes[0], 3, 4, 0x7E, size, counters)
    store(codes[3], 1, size, out)
    decode(codes[3], 3, 4, 0x7E, size, back)
    for i in range(size):
        if np.isfinite(sums[i]):
            lost = back[i] * scale - sums[i]
            errors[0] += lost * lost
            errors[1] += sums[i] * sums[i]


@entry
def requantise(
    operands: int,
    formats_at: int,
    forms_at: int,
    alphas_at: int,
    addresses_at: int,
    scales_at: int,
    columns: int,
    begin: int,
    end: int,
    out: int,
    blocks_at: int,
    blocks_across: int,
    found_at: int,
    counters_at: int,
    errors_at: int,
    codes_at: int,
    values_at: int,
    sums_at: int,
) -> None:
    """Write the rows ``begin`` to ``end`` of the sum, one row of blocks, as block-scaled E4M3.

    Args:
        operands: as in `fuse_scaled`.
        out: where the first of these rows goes.
        blocks_at: of rows and columns of an output block, whether scales are powers of two, bytes of a scale.
        blocks_across: how many.
        found_at: of what receives the code of each block's scale.
        errors_at: of the sums of squares of errors and of results, which are added to.
        sums_at: of scratch of a block's size.
    """
    formats, forms = integer_array(formats_at, operands + 1, 3), integer_array(forms_at, operands, 4)
    alphas = value_array(alphas_at, 1, operands // 2)[0]
    addresses, scales = integer_array(addresses_at, 1, operands)[0], integer_array(scales_at, 1, operands)[0]
    blocks, found = integer_array(blocks_at, 1, 4)[0], code_array(found_at, 1, blocks_across)[0]
    counters, errors = integer_array(counters_at, 1, 2)[0], value_array(errors_at, 1, 2)[0]
    codes, values = code_array(codes_at, ROWS, BLOCK), value_array(values_at, ROWS, BLOCK)
    sums = value_array(sums_at, 1, blocks[0] * blocks[1])[0]
    lawful = laws_hold(formats, forms, blocks)
    for i in range(BLOCK):
        codes[4, i] = codes[5, i] = np.uint64(1)
    for number in range(blocks_across):
        first = number * blocks[1]
        across = min(blocks[1], columns - first)
        differ = moved = not lawful
        greatest = 0.0
        filled = 0
        for row in range(begin, end):
            column = first
            while column < first + across:
                size = until_edge(forms, column, first + across - column)
                place = (row * columns + column, row, column)
                here = sum_piece(formats, forms, alphas, addresses, scales, place, size, True, codes, values)
                differ, moved = differ or here[0], moved or here[1]
                for i in range(size):
                    sums[filled + i] = values[3, i]
                    magnitude = abs(values[3, i])
                    greatest = max(greatest, magnitude) if np.isfinite(magnitude) else greatest
                column += size
                filled += size
        if lawful:
            for k in range(alphas.shape[0]):
                differ = differ or not same_scales(forms, scales, 2 * k + 1, 2 * k + 2, begin, first)
                moved = moved or not same_scales(forms, scales, 0, 2 * k + 2, begin, first)
        donor = 0 if not differ else 1 if is_exact(alphas) and not moved else -1
        if donor >= 0:
            own = scale_bits(scales[donor], forms[donor, 0], scale_place(forms, donor, begin, first))
            if suits(own, forms[donor, 0], blocks[2] != 0):
                source = addresses[donor] + begin * columns + first
                copy_rows(source, out + first, columns, end - begin, across)
                found[number] = np.uint64(own)
                continue
        code = round_scale(scale_for(greatest, blocks[2] != 0), blocks[3], codes[3], values[4])
        scale = scale_value(np.uint32(code), blocks[3])
        found[number] = code
        filled = 0
        for row in range(begin, end):
            column = 0
            while column < across:
                size = min(BLOCK, across - column)
                at = out + (row - begin) * columns + first + column
                quantise(sums[filled : filled + size], scale, size, at, counters, errors, codes, values)
                column += size
                filled += size
