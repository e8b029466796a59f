"""Memory that loops are handed: to work on one block of elements at a time in, and to add statistics up in."""

from __future__ import annotations

import ctypes
from typing import Final

BLOCK: Final = 256
"""Elements per block: the rows below then fit into the least L1 cache there is, of 32 KiB."""

ROWS: Final = 6
"""Rows of each type: codes of new, post, base and the output, and two masks; values of the first four, and two more."""

_Rows: Final = ctypes.c_uint64 * (ROWS * BLOCK)

PRODUCTS: Final = 5
"""Sums of products that are formed of a delta d = post - base, the shift v = new base - base of its base, and the base
b: of d², v², dv, b² and bv."""

STATISTICS: Final = 2 * PRODUCTS + 3
"""Numbers (f64) that sum up a delta: the sums of products; what those have lost by rounding; the largest |d|, how many
elements have changed (d is not 0), and how many are left out, since one of the three is not finite there."""

PAIR: Final = 2
"""Numbers that sum up a pair of deltas: the sum of their products, and what it has lost by rounding."""


class Scratch:
    """Rows of codes (u64) and of values (f64), each of shape (ROWS, BLOCK), and their addresses."""

    def __init__(self) -> None:
        self._codes, self._values = _Rows(), _Rows()
        self.addresses = ctypes.addressof(self._codes), ctypes.addressof(self._values)
