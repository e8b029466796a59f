"""The memory in which a loop works on one block of elements at a time."""

from __future__ import annotations

from typing import Final

import numpy as np

BLOCK: Final = 256
"""Elements per block: the rows below then fit into the least L1 cache there is, of 32 KiB."""

ROWS: Final = 6
"""Rows of each type: codes of new, post, base and the output, and two masks; values of the first four, and two more."""


class Scratch:
    """Rows of codes (u64) and of values (f64), each of shape (ROWS, BLOCK), and their addresses."""

    def __init__(self) -> None:
        self._codes = np.empty((ROWS, BLOCK), np.uint64)
        self._values = np.empty((ROWS, BLOCK), np.float64)
        self.addresses = self._codes.ctypes.data, self._values.ctypes.data
