"""Machine code of the loops without the statistics, to tell what those cost: `python -m bench.bare DIR`.

It is kept under the names that `paramdelta` looks for, so the same program runs with it where PARAMDELTA_CACHE_DIR says
DIR. In a process of its own, since what is taken out here stays out.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from paramdelta.engine import machine_code
from paramdelta.engine.loops import shortcuts, statistics
from paramdelta.engine.loops.bits import bits32, float32, load32, part, store32
from paramdelta.engine.loops.shortcuts import raised_to_bf16, round_to_bf16

U32 = np.uint32
UPPER, MAGNITUDE = U32(0xFFFF_0000), U32(0x7FFF_FFFF)
PLUS_0: Any = np.float32(0.0)
SHORTCUTS = ("skim_bf16", "skim_f16", "skim_f32")


@part
def sum_bf16(
    new: np.int64, post: np.int64, base: np.int64, out: int, words: int, _spread: int
) -> tuple[np.uint32, np.uint32, np.uint32]:
    """Stand in for `plain_bf16`: the same sums, and nothing about deltas."""
    least: Any = U32(0xFFFF_FFFF)
    for i in range(words):
        n, p, b = load32(new, i), load32(post, i), load32(base, i)
        n_0, p_0, b_0 = (float32(U32(n << U32(16))), float32(U32(p << U32(16))), float32(U32(b << U32(16))))
        n_1, p_1, b_1 = (float32(U32(n & UPPER)), float32(U32(p & UPPER)), float32(U32(b & UPPER)))
        sum_0, sum_1 = bits32((p_0 - b_0) + n_0), bits32((p_1 - b_1) + n_1)
        store32(out, i, U32(round_to_bf16(sum_0) | U32(raised_to_bf16(sum_1) & UPPER)))
        least = min(least, min(U32(sum_0 & MAGNITUDE), U32(sum_1 & MAGNITUDE)))
    return least, U32(0), U32(0)


@part
def spread_nothing(_new: int, _post: int, _base: int, _size: int, _spread: int) -> tuple[np.uint32, np.uint32]:
    """Stand in for `spread_f16`."""
    return U32(0), U32(0)


@part
def add_no_run(_sums: int, _spread: int, _size: int, _largest: int, _changed: int) -> None:
    """Stand in for `add_run`."""


@part
def add_no_block(_sums: int, _new: int, _post: int, _base: int, _size: int, _at: int) -> None:
    """Stand in for those that work in f64."""


def measure_nothing(
    _a: int, _b: int, _c: int, _d: int, _e: int, _f: int, _g: int, _h: int, _i: int, _j: int, _k: int, _l: int
) -> None:
    """Stand in for `measure`."""


def keep_bare_loops(directory: str) -> None:
    """Compile the loops of which statistics are a part."""
    os.environ[machine_code.CACHE_VARIABLE] = directory
    taken_out: dict[str, Any] = {"plain_bf16": sum_bf16, "spread_f16": spread_nothing, "add_run": add_no_run}
    taken_out |= dict.fromkeys(("add_wide_bf16", "add_wide_f32"), add_no_block)
    for name, nothing in taken_out.items():
        getattr(shortcuts, name)  # is it still called so?
        setattr(shortcuts, name, nothing)
    for name in SHORTCUTS:
        machine_code.loop("shortcuts", name)
    setattr(statistics, "measure", measure_nothing)  # noqa: B010 - its arguments have other names
    machine_code.loop("statistics", "measure")


if __name__ == "__main__":
    keep_bare_loops(sys.argv[1])
