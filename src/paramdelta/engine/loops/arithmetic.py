"""The arithmetic for any mix of formats, compiled: load, decode, add, round once, apply the bitwise laws, count, store.

A *code* is the bits of a number as an unsigned integer. A *format* is the widths of its fraction and exponent fields,
and its *top*: the code of the greatest finite number. Above it lie infinity and the NaNs of IEEE 754's formats, and the
one NaN of E4M3, which has no infinity.
Codes are decoded to f64, which holds all formats exactly, and encoded by integer arithmetic, so one function serves
every format. The loops work on blocks that stay in the L1 cache, and each becomes vector instructions.
`paramdelta.engine.loops.shortcuts` is faster where all operands share a format, and leaves to this what it cannot
decide.

Exact sums follow S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using
rounding to odd", IEEE Transactions on Computers 57(4), 2008.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paramdelta.engine.loops.bits import (
    bits64,
    code_array,
    entry,
    float64,
    integer_array,
    load8,
    load16,
    load32,
    load64,
    part,
    store8,
    store16,
    store32,
    store64,
    value_array,
)
from paramdelta.engine.scratch import BLOCK, ROWS

if TYPE_CHECKING:
    from numpy.typing import NDArray

# numba makes a float of signed and unsigned integers together, so every constant that meets a code is unsigned.
_0, _1, _63 = np.uint64(0), np.uint64(1), np.uint64(63)
_MAGNITUDE = np.uint64(2**63 - 1)
_INFINITY = np.uint64(0x7FF << 52)
_HUGE = 2.0**1020
_TINY = 2.0**-900


@part
def two_sum(a: float, b: float) -> tuple[float, float]:
    """Return the rounded sum and its error, exactly a + b together; not finite after an overflow (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@part
def round_to_odd(s: float, e: float) -> float:
    """Turn s, the sum s + e rounded to nearest, into the sum rounded to odd: truncated, last bit set if inexact.

    Rounded again, to a format at least two bits narrower, it gives what the exact sum would have given.
    """
    code = bits64(s)
    past = (code ^ bits64(e)) >> _63  # 1 if s lies beyond the exact sum
    return float64((code - past) | _1) if abs(e) > 0.0 else s


@part
def sum_three(post: float, base: float, new: float, narrow: bool) -> tuple[float, float]:
    """Return post - base + new, rounded once, and an error term that is not finite if anything overflowed.

    Rounded to odd if ``narrow`` (an encoding to fewer bits will follow), else to nearest. Subnormals need no care: a
    sum of floats that is subnormal is exact.
    """
    u, low_u = two_sum(post, -base)
    t, low_t = two_sum(u, new)
    v, low_v = two_sum(low_t, low_u)
    s, e = two_sum(t, round_to_odd(v, low_v))
    return (round_to_odd(s, e) if narrow else s), e


@part
def sum_any(post: float, base: float, new: float, narrow: bool) -> float:
    """Return what `sum_three` does, also for infinities, NaNs, and operands so large that partial sums overflow."""
    x, y, z = post, -base, new
    if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
        # Only true infinities count: a partial sum of finite operands must not become one.
        return (0.0 if np.isfinite(x) else x) + (0.0 if np.isfinite(y) else y) + (0.0 if np.isfinite(z) else z)
    if abs(x) < abs(y):
        x, y = y, x
    if abs(y) < abs(z):
        y, z = z, y
    if abs(x) < abs(y):
        x, y = y, x
    if (x < 0.0) != (y < 0.0) or abs(x) < _HUGE:
        return sum_three(x, -y, z, narrow)[0]  # the two largest oppose each other: no partial sum exceeds them
    if narrow:
        return x  # the sum is at least as large, and overflows every narrower format
    # At least as large as x, so scaling back is exact or overflows, and below _TINY only a term's sign matters.
    return 16.0 * sum_three(x / 16.0, not_tiny(y) / -16.0, not_tiny(z) / 16.0, False)[0]


@part
def not_tiny(x: float) -> float:
    """Raise a nonzero number to at least 2^-900 in magnitude."""
    return x if x == 0.0 or abs(x) > _TINY else np.copysign(_TINY, x)


@entry
def floats_are_strict(tiny_bits: int, ulp_bits: int) -> int:
    """Return 1 if this thread keeps subnormals and rounds to nearest, else 0, given the bits of 2^-1073 and 2^-53.

    The state of the processor is inherited from the thread that starts this one, where a library that was built for
    speed may have changed it.
    """
    tiny, ulp = float64(np.uint64(tiny_bits)), float64(np.uint64(ulp_bits))
    kept = tiny * 0.5 + tiny > tiny and np.float32(tiny * 2.0**925) * np.float32(0.5) > np.float32(0.0)
    nearest = 1.0 + ulp == 1.0 and -1.0 - ulp == -1.0 and 1.0 + 1.5 * ulp > 1.0 and -1.0 - 1.5 * ulp < -1.0
    return 1 if kept and nearest else 0


@part
def load(address: int | np.int64, width: int, size: int, codes: NDArray[np.uint64]) -> None:
    """Read codes of ``width`` bytes from an address of any alignment."""
    if width == 1:
        for i in range(size):
            codes[i] = np.uint64(load8(address, i))
    elif width == 2:
        for i in range(size):
            codes[i] = np.uint64(load16(address, i))
    elif width == 4:
        for i in range(size):
            codes[i] = np.uint64(load32(address, i))
    else:
        for i in range(size):
            codes[i] = load64(address, i)


@part
def store(codes: NDArray[np.uint64], width: int, size: int, address: int) -> None:
    """Write codes of ``width`` bytes to an address of any alignment."""
    if width == 1:
        for i in range(size):
            store8(address, i, np.uint8(codes[i]))
    elif width == 2:
        for i in range(size):
            store16(address, i, np.uint16(codes[i]))
    elif width == 4:
        for i in range(size):
            store32(address, i, np.uint32(codes[i]))
    else:
        for i in range(size):
            store64(address, i, codes[i])


@part
def decode(
    codes: NDArray[np.uint64], fraction: int, exponent: int, top: int, size: int, values: NDArray[np.float64]
) -> None:
    """Turn codes of a format into f64, exactly."""
    bias = (1 << (exponent - 1)) - 1
    widen = np.uint64(52 - fraction)
    to_sign = np.uint64(63 - fraction - exponent)
    sign = np.uint64(1 << 63)
    rebias = np.uint64((1023 - bias) << 52)
    mask = np.uint64((1 << (fraction + exponent)) - 1)
    least_normal = np.uint64(1 << fraction)
    greatest = np.uint64(top)
    # The ruler is the power of two whose last bit weighs as much as the format's least subnormal: a subnormal's code
    # becomes the ruler's fraction, and to take the ruler away again is exact.
    ruler = np.uint64((1023 - bias + 53 - fraction) << 52)
    for i in range(size):
        magnitude = codes[i] & mask
        wide = (magnitude << widen) + rebias
        if magnitude > greatest:
            wide = wide | _INFINITY
        if magnitude < least_normal:
            wide = bits64(float64(ruler + magnitude) - float64(ruler))
        values[i] = float64(wide | ((codes[i] << to_sign) & sign))


@part
def encode(
    values: NDArray[np.float64], fraction: int, exponent: int, top: int, size: int, codes: NDArray[np.uint64]
) -> None:
    """Round f64 to a format, once, to nearest, ties to even. Zero becomes +0, NaN the canonical quiet NaN.

    What is beyond the greatest finite number becomes the code above it: infinity, or E4M3's NaN.
    """
    bias = (1 << (exponent - 1)) - 1
    narrow = np.uint64(52 - fraction)
    half = (_1 << narrow) >> _1
    odd = min(half, _1)  # 0 where the format is f64 itself and nothing is rounded
    to_sign = np.uint64(63 - fraction - exponent)
    sign = np.uint64(1 << (fraction + exponent))
    rebias = np.uint64((1023 - bias) << fraction)
    least_normal = np.uint64((1024 - bias) << 52)
    beyond = np.uint64(top + 1)
    nan = beyond | np.uint64(1 << (fraction - 1))
    least_nan = max(beyond, np.uint64((((1 << exponent) - 1) << fraction) + 1))
    ruler = np.uint64((1023 - bias + 53 - fraction) << 52)  # as in `decode`: adding it rounds where subnormals end
    for i in range(size):
        wide = bits64(values[i] + 0.0)
        magnitude = wide & _MAGNITUDE
        code = ((magnitude + (half - odd) + ((magnitude >> narrow) & odd)) >> narrow) - rebias
        code = min(code, beyond)
        if magnitude < least_normal:
            code = bits64(float64(magnitude) + float64(ruler)) - ruler
        signed = code | ((wide >> to_sign) & sign)
        codes[i] = nan if magnitude > _INFINITY or code >= least_nan else signed


@part
def add(
    post: NDArray[np.float64],
    base: NDArray[np.float64],
    new: NDArray[np.float64],
    narrow: bool,
    size: int,
    sums: NDArray[np.float64],
) -> None:
    """Sum a block: plainly if the error terms are all zero, else by `sum_three`, and by `sum_any` where that fails."""
    errors = _0
    for i in range(size):
        u, low_u = two_sum(post[i], -base[i])
        sums[i], low_t = two_sum(u, new[i])
        errors = errors | bits64(low_u) | bits64(low_t)
    if errors << _1 == _0:
        return
    exponents = _0
    for i in range(size):
        sums[i], e = sum_three(post[i], base[i], new[i], narrow)
        exponents = exponents | ((bits64(e) & _MAGNITUDE) + (_1 << np.uint64(52)))
    if exponents >> _63 == _0:
        return
    for i in range(size):
        sums[i] = sum_any(post[i], base[i], new[i], narrow)


@part
def settle(
    codes: NDArray[np.uint64],
    changed: NDArray[np.uint64],
    moved: NDArray[np.uint64],
    new: NDArray[np.uint64],
    post: NDArray[np.uint64],
    fraction: int,
    exponent: int,
    top: int,
    size: int,
    counters: NDArray[np.int64],
) -> None:
    """Copy new where nothing changed, post where base has not moved, and count what else is not finite."""
    mask = np.uint64((1 << (fraction + exponent)) - 1)
    infinity = np.uint64(((1 << exponent) - 1) << fraction)  # an ordinary number in E4M3
    greatest = np.uint64(top)
    infinities = nans = _0
    for i in range(size):
        magnitude = codes[i] & mask
        computed = np.uint64(changed[i] != _0) & np.uint64(moved[i] != _0)
        beyond = computed & np.uint64(magnitude > greatest)
        infinities += beyond & np.uint64(magnitude == infinity)
        nans += beyond & np.uint64(magnitude != infinity)
        copy = new[i] if changed[i] == _0 else post[i]
        codes[i] = codes[i] if computed == _1 else copy
    counters[0] += np.int64(infinities)
    counters[1] += np.int64(nans)


@part
def width_of(fraction: int, exponent: int) -> int:
    """Return the bytes of one element."""
    return (1 + fraction + exponent) >> 3


@part
def one_format(formats: NDArray[np.int64]) -> bool:
    """Return whether all operands and the output have the same format, so that the bitwise laws hold."""
    same = True
    for j in range(1, formats.shape[0]):
        same = same and formats[j, 0] == formats[0, 0] and formats[j, 1] == formats[0, 1]
    return same


@entry
def fuse_exact(
    formats_at: int, addresses: int, out: int, begin: int, end: int, counters_at: int, codes_at: int, values_at: int
) -> None:
    """Write post - base + new, rounded once, for elements ``begin`` to ``end``.

    Args:
        formats_at: of four rows (fraction bits, exponent bits, top), for new, post, base and the output.
        addresses: of the three addresses of new, post and base.
        counters_at: of the two counters of infinities and NaNs.
        codes_at: of scratch codes, shape (ROWS, BLOCK).
        values_at: of scratch values of that shape.
    """
    formats, counters = integer_array(formats_at, 4, 3), integer_array(counters_at, 1, 2)[0]
    codes, values = code_array(codes_at, ROWS, BLOCK), value_array(values_at, ROWS, BLOCK)
    new, post, base, result, changed, moved = codes[0], codes[1], codes[2], codes[3], codes[4], codes[5]
    lawless = np.uint64(not one_format(formats))
    for start in range(begin, end, BLOCK):
        size = min(BLOCK, end - start)
        for j in range(3):
            fraction, exponent, top = formats[j, 0], formats[j, 1], formats[j, 2]
            width = width_of(fraction, exponent)
            load(np.int64(load64(addresses, j)) + start * width, width, size, codes[j])
            decode(codes[j], fraction, exponent, top, size, values[j])
        fraction, exponent, top = formats[3, 0], formats[3, 1], formats[3, 2]
        width = width_of(fraction, exponent)
        add(values[1], values[2], values[0], fraction < 52, size, values[3])
        encode(values[3], fraction, exponent, top, size, result)
        for i in range(size):
            changed[i] = (post[i] ^ base[i]) | lawless
            moved[i] = (new[i] ^ base[i]) | lawless
        settle(result, changed, moved, new, post, fraction, exponent, top, size, counters)
        store(result, width, size, out + start * width)


@entry
def fuse_weighted(
    formats_at: int,
    deltas: int,
    alphas_at: int,
    addresses: int,
    out: int,
    begin: int,
    end: int,
    counters_at: int,
    codes_at: int,
    values_at: int,
) -> None:
    """Write new + alpha (post - base) + …, each operation rounded in f64, the sum once more to the output's format.

    Args:
        formats_at: as in `fuse_exact`, with rows for new, post, base, post, base, … and the output.
        deltas: how many.
        alphas_at: of their coefficients.
        addresses: of the addresses of new, post, base, post, base, …
        counters_at: as in `fuse_exact`, and the scratch too.
    """
    last = 2 * deltas + 1
    formats, counters = integer_array(formats_at, last + 1, 3), integer_array(counters_at, 1, 2)[0]
    alphas = value_array(alphas_at, 1, deltas)[0]
    codes, values = code_array(codes_at, ROWS, BLOCK), value_array(values_at, ROWS, BLOCK)
    new, post, base, result, changed, moved = codes[0], codes[1], codes[2], codes[3], codes[4], codes[5]
    lawless = np.uint64(not one_format(formats))
    for i in range(BLOCK):
        moved[i] = _1  # post itself is never the answer here
    for start in range(begin, end, BLOCK):
        size = min(BLOCK, end - start)
        for j in range(last):
            fraction, exponent, top = formats[j, 0], formats[j, 1], formats[j, 2]
            width = width_of(fraction, exponent)
            row = 0 if j == 0 else 2 - j % 2
            load(np.int64(load64(addresses, j)) + start * width, width, size, codes[row])
            decode(codes[row], fraction, exponent, top, size, values[row])
            if row == 0:
                for i in range(size):
                    changed[i] = lawless
            elif row == 2:
                for i in range(size):
                    changed[i] |= post[i] ^ base[i]
                    values[0, i] += alphas[j // 2 - 1] * (values[1, i] - values[2, i])
        fraction, exponent, top = formats[last, 0], formats[last, 1], formats[last, 2]
        width = width_of(fraction, exponent)
        encode(values[0], fraction, exponent, top, size, result)
        settle(result, changed, moved, new, new, fraction, exponent, top, size, counters)
        store(result, width, size, out + start * width)
