"""Faster exact sums where new base, post, base and output share a format.

The sum is formed plainly in a wider format. TwoSum's error terms say whether it was exact, which for weights it almost
always is; then one rounding is all that is left. A block of BF16 with an error is done again in f32, rounding to odd. A
block of another format with an error, or of any with an infinity or a NaN, is left to
`paramdelta.engine.loops.arithmetic`.
"""

from __future__ import annotations

from typing import Any

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
    store16,
    store32,
)
from paramdelta.engine.scratch import BLOCK

U16, U32, U64 = np.uint16, np.uint32, np.uint64
"""numba computes in 64 bits unless told otherwise after each operation, and lanes are what makes these loops fast."""

_PLUS_0: Any = np.float32(0.0)
_1, _MAGNITUDE_16 = U16(1), U16(0x7FFF)
_FAR_FROM_INFINITY = 250
_SIGN, _MAGNITUDE, _INFINITY = U32(0x8000_0000), U32(0x7FFF_FFFF), U32(0x7F80_0000)


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
    return U32(U32(wide + U32(U32(0x7FFF) + U32(U32(wide >> U32(16)) & U32(1)))) >> U32(16))


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
def plain_bf16(new: np.int64, post: np.int64, base: np.int64, out: int, size: int) -> bool:
    """Sum a block in f32 and say whether that is exact, by the operands' exponents alone.

    Operands other than zero are multiples of 2^(e-134) and at most 2^(E-126) - 2^(E-134), where e and E are their least
    and greatest exponent fields. Where E - e is 14 at most, sums of three are below 2^(E-124), and f32 has enough bits
    for such multiples. Where it is 15, one of the three is below 2^(E-141) and their sum below 2^(E-125): enough again.
    """
    greatest: Any = U16(0)
    least: Any = U16(0xFFFF)
    for i in range(size):
        n, p, b = load16(new, i), load16(post, i), load16(base, i)
        x, y, z = U16(n & _MAGNITUDE_16), U16(p & _MAGNITUDE_16), U16(b & _MAGNITUDE_16)
        greatest = max(greatest, max(x, max(y, z)))
        least = min(least, min(U16(x - _1), min(U16(y - _1), U16(z - _1))))  # less one, so that no zero counts
        total = (widen_bf16(p) - widen_bf16(b)) + widen_bf16(n)
        code = round_to_bf16(bits32(total + _PLUS_0))
        store16(out, i, n if p == b else (p if n == b else U16(code)))
    top, bottom = np.int64(greatest) >> 7, max(np.int64(1), (np.int64(least) + 1) >> 7)
    return bool(top < _FAR_FROM_INFINITY and top - bottom <= 15)


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
    """Sum a block in f32 and say whether every sum was exact and finite."""
    errors = top = U32(0)
    for i in range(size):
        n, p, b = load16(new, i), load16(post, i), load16(base, i)
        u, low_u = two_sum(widen_f16(p), -widen_f16(b))
        t, low_t = two_sum(u, widen_f16(n))
        errors = U32(errors | U32(bits32(low_u) | bits32(low_t)))
        code = round_to_f16(bits32(t + _PLUS_0))
        top = max(top, U32(code & U32(0x7FFF)))
        store16(out, i, n if p == b else (p if n == b else U16(code)))
    return bool(top < U32(0x7C00) and U32(errors << U32(1)) == U32(0))


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


@entry
def skim_bf16(addresses: int, out: int, begin: int, end: int) -> int:
    """Fuse BF16 from element ``begin`` on; return the first that was not decided, or ``end``."""
    new, post, base = np.int64(load64(addresses, 0)), np.int64(load64(addresses, 1)), np.int64(load64(addresses, 2))
    for start in range(begin, end, BLOCK):
        size, at = min(BLOCK, end - start), 2 * start
        fetch_ahead(new + at, post + at, base + at, 2 * BLOCK)
        if not (
            plain_bf16(new + at, post + at, base + at, out + at, size)
            or try_bf16(new + at, post + at, base + at, out + at, size)
            or retry_bf16(new + at, post + at, base + at, out + at, size)
        ):
            return start
    return end


@entry
def skim_f16(addresses: int, out: int, begin: int, end: int) -> int:
    """Fuse F16 from element ``begin`` on; return the first that was not decided, or ``end``."""
    new, post, base = np.int64(load64(addresses, 0)), np.int64(load64(addresses, 1)), np.int64(load64(addresses, 2))
    for start in range(begin, end, BLOCK):
        size, at = min(BLOCK, end - start), 2 * start
        fetch_ahead(new + at, post + at, base + at, 2 * BLOCK)
        if not try_f16(new + at, post + at, base + at, out + at, size):
            return start
    return end


@entry
def skim_f32(addresses: int, out: int, begin: int, end: int) -> int:
    """Fuse F32 from element ``begin`` on; return the first that was not decided, or ``end``."""
    new, post, base = np.int64(load64(addresses, 0)), np.int64(load64(addresses, 1)), np.int64(load64(addresses, 2))
    for start in range(begin, end, BLOCK):
        size, at = min(BLOCK, end - start), 4 * start
        fetch_ahead(new + at, post + at, base + at, 4 * BLOCK)
        if not try_f32(new + at, post + at, base + at, out + at, size):
            return start
    return end
