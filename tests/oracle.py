"""The arithmetic in whole numbers: slow, obvious, and nothing rounds but `round_once`.

Every finite number of these dtypes is a whole multiple of 2^-1074, the least subnormal of F64. So a finite number is
a Python int here, counting those units; what is not finite is the float inf, -inf or nan.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FIELDS = {"BF16": (7, 8), "F16": (10, 5), "F32": (23, 8), "F64": (52, 11), "F8_E5M2": (2, 5), "F8_E4M3": (3, 4)}
CANONICAL_NAN = {
    "BF16": 0x7FC0,
    "F16": 0x7E00,
    "F32": 0x7FC00000,
    "F64": 0x7FF8000000000000,
    "F8_E5M2": 0x7E,
    "F8_E4M3": 0x7F,
}
UNIT = -1074


def decode(code: int, dtype: str) -> int | float:
    """The number that the bits stand for."""
    fraction_bits, exponent_bits = FIELDS[dtype]
    fraction = code & ((1 << fraction_bits) - 1)
    exponent = (code >> fraction_bits) & ((1 << exponent_bits) - 1)
    sign = -1 if code >> (fraction_bits + exponent_bits) else 1
    if dtype == "F8_E4M3":  # has no infinity, and one NaN of either sign
        if code & 0x7F == 0x7F:
            return math.nan
    elif exponent == (1 << exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent > 0:
        fraction += 1 << fraction_bits
    return sign * fraction << (max(exponent, 1) - 1 + least_exponent(dtype) - UNIT)


@cache
def least_exponent(dtype: str) -> int:
    """The exponent of the least subnormal."""
    fraction_bits, exponent_bits = FIELDS[dtype]
    bias = (1 << (exponent_bits - 1)) - 1
    return 1 - bias - fraction_bits


def round_once(number: int | float, dtype: str) -> int:
    """The bits of the nearest number of a dtype, of two equally near the even one. Zero is +0."""
    fraction_bits, exponent_bits = FIELDS[dtype]
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if number != number or (isinstance(number, float) and dtype == "F8_E4M3"):
        return CANONICAL_NAN[dtype]
    sign = (number < 0) << (fraction_bits + exponent_bits)
    if isinstance(number, float):
        return sign | infinity
    # Multiples of 2^step have no more bits than the dtype's significand, and are no finer than its least subnormal.
    least_step = least_exponent(dtype) - UNIT
    magnitude = abs(number)
    step = max(magnitude.bit_length() - (fraction_bits + 1), least_step)
    significand = magnitude >> step
    rest = magnitude - (significand << step)
    if 2 * rest > 1 << step or (2 * rest == 1 << step and significand % 2 == 1):
        significand += 1
    # The significand's leading bit, if there is one, adds the 1 that makes an exponent field of a number of steps.
    code = ((step - least_step) << fraction_bits) + significand
    if dtype == "F8_E4M3":
        return sign | code if code < 0x7F else CANONICAL_NAN[dtype]
    return sign | min(code, infinity)


def add(terms: Sequence[int | float]) -> int | float:
    """The sum. Infinities of one sign outweigh whatever is finite; those of both signs make a NaN."""
    special = {term for term in terms if isinstance(term, float)}
    if not special:
        return sum(terms)
    return special.pop() if len(special) == 1 else math.nan


def law(new: int, posts: Sequence[int], bases: Sequence[int], alphas: Sequence[float]) -> int | None:
    """The bits that the bitwise laws copy, if they apply; all codes are of one dtype."""
    if list(posts) == list(bases):
        return new
    if list(alphas) == [1.0] and new == bases[0]:
        return posts[0]
    return None


def fuse(new: int, post: int, base: int, dtypes: Sequence[str], out: str) -> tuple[int, bool]:
    """The bits of post - base + new, rounded once, and whether a law copied them. ``dtypes``: of new, post, base."""
    if {*dtypes} == {out}:
        copied = law(new, [post], [base], [1.0])
        if copied is not None:
            return copied, True
    number = decode(base, dtypes[2])
    return round_once(add([decode(post, dtypes[1]), -number, decode(new, dtypes[0])]), out), False


def code_of(value: float) -> int:
    """The bits of a Python float."""
    code: int = struct.unpack("<Q", struct.pack("<d", value))[0]
    return code
