"""Sums over the elements of deltas, to tell norms and angles from: any mix of formats, any number of deltas.

Differences are formed in f64, as exact as they can be there. The sums of a block are formed in any order, which costs a
few units in the last place; those of blocks are added up with their errors, so that where a tensor is cut hardly shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paramdelta.engine.loops.arithmetic import two_sum
from paramdelta.engine.loops.bits import (
    code_array,
    entry,
    float64,
    get,
    integer_array,
    load64,
    part,
    put,
    reduction,
    value_array,
)
from paramdelta.engine.loops.scaled import gather, until_edge
from paramdelta.engine.scratch import BLOCK, PAIR, PRODUCTS, ROWS, STATISTICS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGNITUDE = np.uint64(2**63 - 1)
LARGEST, CHANGED, LEFT_OUT = range(2 * PRODUCTS, STATISTICS)
"""Where these are among the numbers of a delta."""


@part
def add_up(sums: int, place: int, lost: int, more: float) -> None:
    """Add to the sum at ``place``, and what that loses to the one at ``lost``."""
    total, error = two_sum(get(sums, place), more)
    put(sums, place, total)
    put(sums, lost, get(sums, lost) + error)


@part
def add_block(sums: int, dotted: tuple[float, float, float, float, float], extent: tuple[float, int]) -> None:
    """Add what one block of a delta has come to: what `dots` and `largest_of` return."""
    add_up(sums, 0, 5, dotted[0])
    add_up(sums, 1, 6, dotted[1])
    add_up(sums, 2, 7, dotted[2])
    add_up(sums, 3, 8, dotted[3])
    add_up(sums, 4, 9, dotted[4])
    put(sums, LARGEST, max(get(sums, LARGEST), extent[0]))
    put(sums, CHANGED, get(sums, CHANGED) + np.float64(extent[1]))


@reduction
def dots(delta: int, shift: int, base: int, size: int) -> tuple[float, float, float, float, float]:
    """Return the sums of squares of all three, and of the shift's products with the others, as `PRODUCTS` has them."""
    squares = shift_squares = products = base_squares = base_products = 0.0
    for i in range(size):
        d, v, b = get(delta, i), get(shift, i), get(base, i)
        squares += d * d
        shift_squares += v * v
        products += d * v
        base_squares += b * b
        base_products += b * v
    return squares, shift_squares, products, base_squares, base_products


@reduction
def dot(one: int, two: int, size: int) -> float:
    """Return the sum of products."""
    total = 0.0
    for i in range(size):
        total += get(one, i) * get(two, i)
    return total


@part
def largest_of(delta: int, size: int) -> tuple[float, int]:
    """Return the largest magnitude, and how many elements are not zero."""
    greatest = same = np.uint64(0)
    for i in range(size):
        magnitude = load64(delta, i) & _MAGNITUDE
        greatest = max(greatest, magnitude)
        same += np.uint64(magnitude == np.uint64(0))
    return float64(greatest), size - int(same)


@part
def subtract(
    post: NDArray[np.float64], base: NDArray[np.float64], new: NDArray[np.float64], size: int, delta: int, shift: int
) -> int:
    """Form a block of deltas and shifts, with zeros where either is not finite, and in the base; return how many."""
    left_out = np.uint64(0)
    for i in range(size):
        d, v = post[i] - base[i], new[i] - base[i]
        finite = np.isfinite(d) and np.isfinite(v)
        put(delta, i, d if finite else 0.0)
        put(shift, i, v if finite else 0.0)
        base[i] = base[i] if finite else 0.0
        left_out += np.uint64(not finite)
    return int(left_out)


@entry
def measure(
    operands: int,
    formats_at: int,
    forms_at: int,
    addresses_at: int,
    scales_at: int,
    columns: int,
    begin: int,
    end: int,
    sums_at: int,
    codes_at: int,
    values_at: int,
    deltas_at: int,
) -> None:
    """Add up what the deltas come to in the elements ``begin`` to ``end``.

    Args:
        operands: how many; they are described as `paramdelta.engine.loops.scaled` has it, scales or not.
        columns: of the matrices.
        sums_at: of the numbers of each delta (`STATISTICS`), then of each pair of deltas (`PAIR`).
        codes_at: of scratch codes, shape (ROWS, BLOCK).
        values_at: of scratch values of that shape.
        deltas_at: of scratch values, a row of BLOCK for each delta.
    """
    formats, forms = integer_array(formats_at, operands, 3), integer_array(forms_at, operands, 4)
    addresses, scales = integer_array(addresses_at, 1, operands)[0], integer_array(scales_at, 1, operands)[0]
    number = operands // 2
    pairs = sums_at + 8 * STATISTICS * number
    codes, values = code_array(codes_at, ROWS, BLOCK), value_array(values_at, ROWS, BLOCK)
    new, post, base = values[0], values[1], values[2]
    shift = values_at + 8 * 3 * BLOCK
    at = begin
    while at < end:
        row, column = at // columns, at % columns
        size = until_edge(forms, column, min(columns - column, end - at))
        place = (at, row, column)
        gather(formats, forms, addresses, scales, 0, place, size, codes[0], new)
        for k in range(number):
            gather(formats, forms, addresses, scales, 2 * k + 1, place, size, codes[1], post)
            gather(formats, forms, addresses, scales, 2 * k + 2, place, size, codes[2], base)
            sums, delta = sums_at + 8 * STATISTICS * k, deltas_at + 8 * BLOCK * k
            put(sums, LEFT_OUT, get(sums, LEFT_OUT) + np.float64(subtract(post, base, new, size, delta, shift)))
            add_block(sums, dots(delta, shift, values_at + 8 * 2 * BLOCK, size), largest_of(delta, size))
            for j in range(k):
                pair = pairs + 8 * PAIR * (k * (k - 1) // 2 + j)
                add_up(pair, 0, 1, dot(deltas_at + 8 * BLOCK * j, delta, size))
        at += size
