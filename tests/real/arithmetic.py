"""post - base + new_base of bf16 weights, exact and rounded once, by nothing of paramdelta's or torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_f64(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The exact values of bf16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def exact_sum(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum, after a check (Knuth's TwoSum) that f64 holds it without any rounding."""
    total = left + right
    shifted = total - left
    error = (left - (total - shifted)) + (right - shifted)
    assert not error.any(), "f64 is too narrow for these weights: this oracle cannot judge them"
    return total


def to_bf16(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Rounds f64 to bf16 once, to nearest, ties to even. (torch goes through f32, which rounds twice.)

    Only for zeros and for values in bf16's normal range, which is where trained weights lie.
    """
    wide = values.view(np.uint64)
    sign = (wide >> np.uint64(48)) & np.uint64(0x8000)
    magnitude = wide & np.uint64(0x7FFF_FFFF_FFFF_FFFF)
    zero = magnitude == 0
    size = np.abs(values[~zero])
    assert size.size == 0 or (size.min() >= 2.0**-126 and size.max() < 2.0**127)
    kept = magnitude >> np.uint64(45)  # f64 stores 52 bits of mantissa, bf16 7
    lost = magnitude & np.uint64((1 << 45) - 1)
    half = np.uint64(1 << 44)
    up = (lost > half) | ((lost == half) & ((kept & np.uint64(1)) == 1))
    rebias = np.uint64((1023 - 127) << 7)
    rounded = np.where(zero, np.uint64(0), kept + up - rebias)
    return (sign | rounded).astype(np.uint16)


def expected_bits(
    post: NDArray[np.uint16], base: NDArray[np.uint16], new_base: NDArray[np.uint16]
) -> NDArray[np.uint16]:
    """post - base + new_base, rounded once; where two operands cancel bit for bit, the third one's bits."""
    total = exact_sum(exact_sum(to_f64(post), -to_f64(base)), to_f64(new_base))
    total[total == 0] = 0.0  # an exact zero is +0
    return np.where(post == base, new_base, np.where(new_base == base, post, to_bf16(total)))
