"""Faster exact sums where new base, post, base and output share a format.

The sum is formed plainly in a wider format. TwoSum's error terms say whether it was exact, which for weights it almost
always is; then one rounding is all that is left. A block of BF16 with an error is done again in f32, rounding to odd. A
block of another format with an error, or of any with an infinity or a NaN, is left to
`paramdelta.engine.loops.arithmetic`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from paramdelta.engine.loops.arithmetic import two_sum
from paramdelta.engine.loops.bits import (
    bits32,
    bits64,
    entry,
    fetch_ahead,
    float32,
    load16,
    load32,
    load64,
    part,
    put,
    reduction,
    store16,
    store32,
)
from paramdelta.engine.loops.statistics import add_block, dots, largest_of
from paramdelta.engine.scratch import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable


U16, U32, U64 = np.uint16, np.uint32, np.uint64
"""numba computes in 64 bits unless told otherwise after each operation, and lanes are what makes these loops fast."""

_PLUS_0: Any = np.float32(0.0)
_1, _MAGNITUDE_16 = U16(1), U16(0x7FFF)
_FAR_FROM_INFINITY = 250

RUN = 4 * BLOCK
"""Elements whose deltas are added up together: enough to hide what the end of a sum costs."""

SHIFTS, BASES = 4 * RUN, 8 * RUN
"""Where, in bytes, rows of f32 begin in the memory in which those of deltas come first."""
_SIGN, _MAGNITUDE, _INFINITY, _UPPER = U32(0x8000_0000), U32(0x7FFF_FFFF), U32(0x7F80_0000), U32(0xFFFF_0000)


@part
def widen_bf16(code: np.uint16) -> float:
    """Turn a BF16 code into f32."""
    value: float = float32(U32(U32(code) << U32(16)))
    return value


@part
def widen_f16(code: np.uint16) -> float:
    """Turn an F16 code into f32, as `paramdelta.engine.loops.arithmetic.decode` does."""
    magnitude = U32(U32(code) & U32(0x7FFF))
    wide = U32(U32(magnitude << U32(13)) + U32(112 << 23))
    if magnitude >= U32(0x7C00):
        wide = U32(wide | _INFINITY)
    if magnitude < U32(0x0400):
        wide = bits32(float32(U32(U32(126 << 23) + magnitude)) - np.float32(0.5))
    value: float = float32(U32(wide | U32(U32(U32(code) << U32(16)) & _SIGN)))
    return value


@part
def round_to_bf16(wide: np.uint32) -> np.uint32:
    """Round the bits of a finite f32 to BF16, to nearest, ties to even; overflow carries into infinity."""
    return U32(raised_to_bf16(wide) >> U32(16))


@part
def raised_to_bf16(wide: np.uint32) -> np.uint32:
    """Do so, but for the lower half, which is still to be cut off."""
    return U32(wide + U32(U32(0x7FFF) + U32(U32(wide >> U32(16)) & U32(1))))


@part
def round_to_f16(wide: np.uint32) -> np.uint32:
    """Round the bits of a finite f32 to F16, to nearest, ties to even; overflow gives no code below infinity's."""
    magnitude = U32(wide & _MAGNITUDE)
    tie = U32(U32(magnitude >> U32(13)) & U32(1))
    code = U32(U32(U32(magnitude + U32(U32(0x0FFF) + tie)) >> U32(13)) - U32(112 << 10))
    code = min(code, U32(0x7C00))
    if magnitude < U32(113 << 23):
        code = U32(bits32(float32(magnitude) + np.float32(0.5)) - U32(126 << 23))
    return U32(code | U32(U32(wide >> U32(16)) & U32(0x8000)))


@part
def is_plain_bf16(new: np.int64, post: np.int64, base: np.int64, size: int) -> bool:
    """Return whether f32 holds all sums of a block, by the operands' exponents alone.

    Operands other than zero are multiples of 2^(e-134) and at most 2^(E-126) - 2^(E-134), where e and E are their least
    and greatest exponent fields. Where E - e is 14 at most, sums of three are below 2^(E-124), and f32 has enough bits
    for such multiples. Where it is 15, one of the three is below 2^(E-141) and their sum below 2^(E-125): enough again.
    """
    greatest: Any = U16(0)
    least: Any = U16(0xFFFF)
    for i in range(size):
        x = U16(load16(new, i) & _MAGNITUDE_16)
        y = U16(load16(post, i) & _MAGNITUDE_16)
        z = U16(load16(base, i) & _MAGNITUDE_16)
        greatest = max(greatest, max(x, max(y, z)))
        least = min(least, min(U16(x - _1), min(U16(y - _1), U16(z - _1))))  # less one, so that no zero counts
    top, bottom = np.int64(greatest) >> 7, max(np.int64(1), (np.int64(least) + 1) >> 7)
    return bool(top < _FAR_FROM_INFINITY and top - bottom <= 15)


@part
def plain_bf16(
    new: np.int64, post: np.int64, base: np.int64, out: int, words: int, spread: int
) -> tuple[np.uint32, np.uint32, np.uint32]:
    """Sum a block of which `is_plain_bf16` holds, two elements at a time: f32 is the upper half of a word, or of none.

    Deltas, shifts and bases go to the rows of ``spread``.

    Returns:
        The bits of the least sum (magnitudes are meant), those of the largest delta, and how many deltas are not zero.
    """
    least: Any = U32(0xFFFF_FFFF)
    largest = changed = U32(0)
    upper = spread + 4 * words
    for i in range(words):
        n, p, b = load32(new, i), load32(post, i), load32(base, i)
        n_0, p_0, b_0 = (float32(U32(n << U32(16))), float32(U32(p << U32(16))), float32(U32(b << U32(16))))
        n_1, p_1, b_1 = (float32(U32(n & _UPPER)), float32(U32(p & _UPPER)), float32(U32(b & _UPPER)))
        d_0, d_1 = p_0 - b_0, p_1 - b_1
        sum_0, sum_1 = bits32(d_0 + n_0), bits32(d_1 + n_1)
        store32(out, i, U32(round_to_bf16(sum_0) | U32(raised_to_bf16(sum_1) & _UPPER)))
        least = min(least, min(U32(sum_0 & _MAGNITUDE), U32(sum_1 & _MAGNITUDE)))
        size_0, size_1 = U32(bits32(d_0) & _MAGNITUDE), U32(bits32(d_1) & _MAGNITUDE)
        largest = max(largest, max(size_0, size_1))
        changed = U32(changed + U32(min(size_0, U32(1)) + min(size_1, U32(1))))
        store32(spread, i, bits32(d_0))
        store32(upper, i, bits32(d_1))
        store32(spread + SHIFTS, i, bits32(n_0 - b_0))
        store32(upper + SHIFTS, i, bits32(n_1 - b_1))
        store32(spread + BASES, i, bits32(b_0))
        store32(upper + BASES, i, bits32(b_1))
    return least, largest, changed


@part
def sign_zeros_bf16(new: np.int64, post: np.int64, base: np.int64, out: int, size: int) -> None:
    """Give sums that are zero the sign that they should have: a copied one where a law copies, else plus."""
    for i in range(size):
        n, p, b, code = load16(new, i), load16(post, i), load16(base, i), load16(out, i)
        zero = n if p == b else (p if n == b else U16(0))
        store16(out, i, zero if U16(code & _MAGNITUDE_16) == U16(0) else code)


@part
def try_bf16(new: np.int64, post: np.int64, base: np.int64, out: int, size: int) -> bool:
    """Sum a block in f32 and say whether every sum was exact and finite."""
    errors = top = U32(0)
    for i in range(size):
        n, p, b = load16(new, i), load16(post, i), load16(base, i)
        u, low_u = two_sum(widen_bf16(p), -widen_bf16(b))
        t, low_t = two_sum(u, widen_bf16(n))
        errors = U32(errors | U32(bits32(low_u) | bits32(low_t)))
        code = round_to_bf16(bits32(t + _PLUS_0))
        top = max(top, U32(code & U32(0x7FFF)))
        store16(out, i, n if p == b else (p if n == b else U16(code)))
    return bool(top < U32(0x7F80) and U32(errors << U32(1)) == U32(0))


@part
def round_to_odd_f32(s: float, e: float) -> float:
    """Do what `paramdelta.engine.loops.arithmetic.round_to_odd` does, for finite f32."""
    code = bits32(s)
    past = U32(U32(code ^ bits32(e)) >> U32(31))
    return float32(U32(U32(code - past) | U32(1))) if e != _PLUS_0 else s


@part
def retry_bf16(new: np.int64, post: np.int64, base: np.int64, out: int, size: int) -> bool:
    """Sum a block exactly, rounding to odd in f32, and say whether f32 was wide enough: nothing is beyond its range."""
    top = nonfinite = U32(0)
    for i in range(size):
        n, p, b = load16(new, i), load16(post, i), load16(base, i)
        u, low_u = two_sum(widen_bf16(p), -widen_bf16(b))
        t, low_t = two_sum(u, widen_bf16(n))
        v, low_v = two_sum(low_t, low_u)
        s, e = two_sum(t, round_to_odd_f32(v, low_v))
        nonfinite = U32(nonfinite | U32(U32(bits32(e) & _MAGNITUDE) + U32(1 << 23)))
        code = round_to_bf16(bits32(round_to_odd_f32(s + _PLUS_0, e)))
        top = max(top, U32(code & U32(0x7FFF)))
        store16(out, i, n if p == b else (p if n == b else U16(code)))
    return bool(top < U32(0x7F80) and U32(nonfinite >> U32(31)) == U32(0))


@part
def try_f16(new: np.int64, post: np.int64, base: np.int64, out: int, size: int) -> bool:
    """Sum a block in f32 and say whether every sum, delta and shift was exact and every sum finite."""
    errors = top = U32(0)
    for i in range(size):
        n, p, b = load16(new, i), load16(post, i), load16(base, i)
        wide_n, wide_b = widen_f16(n), widen_f16(b)
        u, low_u = two_sum(widen_f16(p), -wide_b)
        t, low_t = two_sum(u, wide_n)
        _, low_v = two_sum(wide_n, -wide_b)
        errors = U32(errors | U32(U32(bits32(low_u) | bits32(low_t)) | bits32(low_v)))
        code = round_to_f16(bits32(t + _PLUS_0))
        top = max(top, U32(code & U32(0x7FFF)))
        store16(out, i, n if p == b else (p if n == b else U16(code)))
    return bool(top < U32(0x7C00) and U32(errors << U32(1)) == U32(0))


@part
def spread_f16(new: np.int64, post: np.int64, base: np.int64, size: int, spread: int) -> tuple[np.uint32, np.uint32]:
    """Spread deltas, shifts and bases of a block as `plain_bf16` does; return the last two of what that returns."""
    largest = changed = U32(0)
    for i in range(size):
        wide_base = widen_f16(load16(base, i))
        delta = bits32(widen_f16(load16(post, i)) - wide_base)
        magnitude = U32(delta & _MAGNITUDE)
        largest = max(largest, magnitude)
        changed = U32(changed + min(magnitude, U32(1)))
        store32(spread, i, delta)
        store32(spread + SHIFTS, i, bits32(widen_f16(load16(new, i)) - wide_base))
        store32(spread + BASES, i, bits32(wide_base))
    return largest, changed


@part
def try_f32(new: np.int64, post: np.int64, base: np.int64, out: int, size: int) -> bool:
    """Sum a block in f64 and say whether every sum was exact and its rounding finite."""
    errors = U64(0)
    top = U32(0)
    for i in range(size):
        n, p, b = load32(new, i), load32(post, i), load32(base, i)
        u, low_u = two_sum(np.float64(float32(p)), -np.float64(float32(b)))
        t, low_t = two_sum(u, np.float64(float32(n)))
        errors = errors | bits64(low_u) | bits64(low_t)
        code = bits32(np.float32(t + 0.0))
        top = max(top, U32(code & _MAGNITUDE))
        store32(out, i, n if p == b else (p if n == b else code))
    return bool(top < _INFINITY and errors << U64(1) == U64(0))


@reduction
def dots_f32(spread: int, size: int) -> tuple[float, float, float, float, float]:
    """Do what `paramdelta.engine.loops.statistics.dots` does, for rows of f32."""
    squares = shift_squares = products = base_squares = base_products = 0.0
    for i in range(size):
        d = np.float64(float32(load32(spread, i)))
        v = np.float64(float32(load32(spread + SHIFTS, i)))
        b = np.float64(float32(load32(spread + BASES, i)))
        squares += d * d
        shift_squares += v * v
        products += d * v
        base_squares += b * b
        base_products += b * v
    return squares, shift_squares, products, base_squares, base_products


def _in_f64(read: Any, widen: Any) -> Callable[..., None]:
    """Return what adds up the deltas of a block of finite elements, in f64: f32 would not hold the differences."""

    @part
    def add_wide(sums: int, new: np.int64, post: np.int64, base: np.int64, size: int, at: int) -> None:
        shifts, bases = at + 8 * BLOCK, at + 8 * 2 * BLOCK
        for i in range(size):
            b = np.float64(widen(read(base, i)))
            put(bases, i, b)
            put(at, i, np.float64(widen(read(post, i))) - b)
            put(shifts, i, np.float64(widen(read(new, i))) - b)
        add_block(sums, dots(at, shifts, bases, size), largest_of(at, size))

    return add_wide


add_wide_bf16 = _in_f64(load16, widen_bf16)
add_wide_f32 = _in_f64(load32, float32)


@part
def add_run(sums: int, spread: int, size: int, largest: np.uint32, changed: np.uint32) -> None:
    """Add up what was spread of some blocks: at most `RUN` elements."""
    if size > 0:
        add_block(sums, dots_f32(spread, size), (np.float64(float32(largest)), int(changed)))


@entry
def skim_bf16(addresses: int, out: int, begin: int, end: int, sums_at: int, spread_at: int) -> int:
    """Fuse BF16 from element ``begin`` on; return the first that was not decided, or ``end``.

    Args:
        addresses: of the three addresses of new, post and base.
        sums_at: of numbers (`STATISTICS`) to which is added what the delta comes to in all elements before that.
        spread_at: of scratch values, shape (ROWS, BLOCK).
    """
    new, post, base = np.int64(load64(addresses, 0)), np.int64(load64(addresses, 1)), np.int64(load64(addresses, 2))
    added = begin  # up to where deltas are added up
    largest = changed = U32(0)  # of those since
    for start in range(begin, end, BLOCK):
        size, at = min(BLOCK, end - start), 2 * start
        n, p, b = new + at, post + at, base + at
        fetch_ahead(n, 2 * BLOCK)
        fetch_ahead(p, 2 * BLOCK)
        fetch_ahead(b, 2 * BLOCK)
        if size % 2 == 0 and is_plain_bf16(n, p, b, size):
            least, greatest, more = plain_bf16(n, p, b, out + at, size // 2, spread_at + 4 * (start - added))
            if least == U32(0):
                sign_zeros_bf16(n, p, b, out + at, size)
            largest, changed = max(largest, greatest), U32(changed + more)
            if start + size - added == RUN:
                add_run(sums_at, spread_at, RUN, largest, changed)
                added, largest, changed = start + size, U32(0), U32(0)
            continue
        add_run(sums_at, spread_at, start - added, largest, changed)
        if not (try_bf16(n, p, b, out + at, size) or retry_bf16(n, p, b, out + at, size)):
            return start
        add_wide_bf16(sums_at, n, p, b, size, spread_at)
        added, largest, changed = start + size, U32(0), U32(0)
    add_run(sums_at, spread_at, end - added, largest, changed)
    return end


@entry
def skim_f16(addresses: int, out: int, begin: int, end: int, sums_at: int, spread_at: int) -> int:
    """Fuse F16 as `skim_bf16` does BF16."""
    new, post, base = np.int64(load64(addresses, 0)), np.int64(load64(addresses, 1)), np.int64(load64(addresses, 2))
    added = begin  # up to where deltas are added up
    largest = changed = U32(0)  # of those since
    for start in range(begin, end, BLOCK):
        size, at = min(BLOCK, end - start), 2 * start
        n, p, b = new + at, post + at, base + at
        fetch_ahead(n, 2 * BLOCK)
        fetch_ahead(p, 2 * BLOCK)
        fetch_ahead(b, 2 * BLOCK)
        if not try_f16(n, p, b, out + at, size):
            add_run(sums_at, spread_at, start - added, largest, changed)
            return start
        greatest, more = spread_f16(n, p, b, size, spread_at + 4 * (start - added))
        largest, changed = max(largest, greatest), U32(changed + more)
        if start + size - added == RUN:
            add_run(sums_at, spread_at, RUN, largest, changed)
            added, largest, changed = start + size, U32(0), U32(0)
    add_run(sums_at, spread_at, end - added, largest, changed)
    return end


@entry
def skim_f32(addresses: int, out: int, begin: int, end: int, sums_at: int, spread_at: int) -> int:
    """Fuse F32 as `skim_bf16` does BF16."""
    new, post, base = np.int64(load64(addresses, 0)), np.int64(load64(addresses, 1)), np.int64(load64(addresses, 2))
    for start in range(begin, end, BLOCK):
        size, at = min(BLOCK, end - start), 4 * start
        n, p, b = new + at, post + at, base + at
        fetch_ahead(n, 4 * BLOCK)
        if not try_f32(n, p, b, out + at, size):
            return start
        add_wide_f32(sums_at, n, p, b, size, spread_at)
    return end
