"""The memory in which a loop works on one block of elements at a time."""

from __future__ import annotations

import ctypes
from typing import Final

BLOCK: Final = 256
"""Elements per block: the rows below then fit into the least L1 cache there is, of 32 KiB."""

ROWS: Final = 6
"""Rows of each type: codes of new, post, base and the output, and two masks; values of the first four, and two more."""


_Rows: Final = ctypes.c_uint64 * (ROWS * BLOCK)


class Scratch:
    """Rows of codes (u64) and of values (f64), each of shape (ROWS, BLOCK), and their addresses."""

    def __init__(self) -> None:
        self._codes, self._values = _Rows(), _Rows()
        self.addresses = ctypes.addressof(self._codes), ctypes.addressof(self._values)
