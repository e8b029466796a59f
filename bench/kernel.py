"""Throughput of the kernels against memcpy: bytes read and written per second, data far larger than any cache.

python -m bench.kernel [MEGABYTES PER OPERAND] [--only WORD] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from paramdelta.engine.kernels import fuse, preparations
from paramdelta.engine.sums import Sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Job = Callable[[int, int], None]  # does elements from, to

FLOAT: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
REPEATS = 7
THREADS = (1, 2)
CHUNK = 1 << 20
"""Elements that one call fuses: a window of a few MB."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The kernels against memcpy.")
    parser.add_argument("megabytes", type=int, nargs="?", default=256, help="per operand")
    parser.add_argument("--only", default="", help="rows with this word in their names")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = measure_all(given.megabytes, given.only)
    if given.json:
        print(json.dumps(rows))
        return
    table = Table(
        "operands", *(f"{n} thread{'s'[: n - 1]}, GB/s" for n in THREADS), *(f"of memcpy, {n}" for n in THREADS)
    )
    for row in rows:
        speeds, ratios = row["gigabytes_per_second"].values(), row["of_memcpy"].values()
        table.add_row(row["name"], *(f"{speed:.1f}" for speed in speeds), *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


def measure_all(megabytes: int, only: str) -> list[dict[str, Any]]:
    """Return memcpy's speed, and those of what is to be measured, by number of threads, and beside memcpy's."""
    memcpy = {threads: measure(*copying(megabytes), threads) for threads in THREADS}
    found = [{"name": "memcpy", "gigabytes_per_second": memcpy, "of_memcpy": dict.fromkeys(THREADS, 1.0)}]
    for name, make in cases(megabytes):
        if only in name:
            case = make()
            speeds = {threads: measure(*case, threads) for threads in THREADS}
            ratios = {threads: speed / memcpy[threads] for threads, speed in speeds.items()}
            found.append({"name": name, "gigabytes_per_second": speeds, "of_memcpy": ratios})
    return found


def measure(count: int, size: int, job: Job, threads: int) -> float:
    """Return the median GB/s of a job over ``count`` elements that moves ``size`` bytes."""
    edges = [count * i // threads for i in range(threads + 1)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            list(pool.map(job, edges, edges[1:]))
            seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds[1:]) / 1e9


def copying(megabytes: int) -> tuple[int, int, Job]:
    """Return the copy of two operands, which moves what a fusion of three moves."""
    source = np.ones(2 * megabytes * 10**6, np.uint8)
    target = np.ones_like(source)
    return source.size, 2 * source.nbytes, lambda begin, end: np.copyto(target[begin:end], source[begin:end])


def fusing(operands: list[Array], dtypes: tuple[str, ...], alphas: tuple[float, ...], out: str) -> tuple[int, int, Job]:
    """Return the fusion of some arrays, in calls of `CHUNK` elements."""
    count = len(operands[0])
    result = np.zeros(count, FLOAT[out])
    for prepare in preparations([(dtypes, alphas, out)], scaled=False):
        prepare()

    def job(begin: int, end: int) -> None:
        counters, sums = array("q", (0, 0)), Sums(len(alphas))
        for at in range(begin, end, CHUNK):
            addresses = [operand[at:].ctypes.data for operand in operands]
            fuse(addresses, dtypes, alphas, result[at:].ctypes.data, out, min(CHUNK, end - at), counters, sums)

    return count, result.nbytes + sum(operand.nbytes for operand in operands), job


def cases(megabytes: int) -> Iterator[tuple[str, Callable[[], tuple[int, int, Job]]]]:
    """Yield a name, and what makes elements, bytes moved and a job, for everything worth a row."""
    exact = (1.0,)
    for dtype in ("BF16", "F16", "F32", "F64"):
        kinds = (dtype,) * 3
        count = megabytes * 10**6 // FLOAT[dtype](0).itemsize
        base = gaussian(count, 0.02).astype(FLOAT[dtype])
        post, new = (changed(base, 0.0007, seed) for seed in (1, 2))
        operands = {
            "weights": [new, post, base],
            "zeros": [np.zeros_like(base) for _ in kinds],
            "post = base": [new, base, base.copy()],
            "new base = base": [base.copy(), post, base],
            "pruned by half": [pruned(x) for x in (new, post, base)],
            "mixed scales": [scaled(x, i) for i, x in enumerate((new, post, base))],
        }
        for name, arrays in operands.items():
            yield f"{dtype} {name}", partial(fusing, arrays, kinds, exact, dtype)
        yield f"{dtype} alpha = 0.5", partial(fusing, operands["weights"], kinds, (0.5,), dtype)
    base32 = gaussian(megabytes * 10**6 // 4, 0.02)
    narrow = base32.astype(FLOAT["BF16"])
    wider = [narrow, changed(base32, 0.0007, 1), base32]
    yield "BF16 new, F32 post and base", partial(fusing, wider, ("BF16", "F32", "F32"), exact, "BF16")
    mixed = [narrow, narrow.astype("f2"), narrow]
    yield "BF16, F16 post", partial(fusing, mixed, ("BF16", "F16", "BF16"), exact, "BF16")


def gaussian(count: int, deviation: float, seed: int = 0) -> NDArray[np.float32]:
    """Return a million normal numbers, repeated."""
    numbers = np.random.default_rng(seed).standard_normal(1_000_003, np.float32)
    return np.resize(numbers * np.float32(deviation), count)


def changed(array: Array, deviation: float, seed: int) -> Array:
    """Return an array with deltas added."""
    return (array.astype(np.float32) + gaussian(len(array), deviation, seed)).astype(array.dtype)


def pruned(array: Array) -> Array:
    """Return an array with every other element zero."""
    result = array.copy()
    result[::2] = 0
    return result


def scaled(array: Array, seed: int) -> Array:
    """Return an array with elements shrunk to a millionth at random, so that magnitudes differ within a sum."""
    shrink = np.random.default_rng(seed).random(1_000_003) < 0.1
    return np.where(np.resize(shrink, len(array)), (array * array.dtype.type(1e-6)), array)


if __name__ == "__main__":
    main()
