"""The kernels against the oracle, element by element: the data, the comparison, and the full run.

`python -m tests.exact` takes some minutes and writes `docs/exactness.md`; `tests/engine/test_kernels.py` does the same
on small samples. Both counters are compared too.
"""

from __future__ import annotations

import itertools
import multiprocessing
import platform
import sys
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numba
import numpy as np

from paramdelta.engine.kernels import MERGEABLE, fuse
from paramdelta.engine.sums import Sums
from tests import oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Codes = NDArray[np.unsignedinteger[Any]]
    Rng = np.random.Generator

UINT: dict[str, Any] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.uint32,
    "F64": np.uint64,
    "F8_E5M2": np.uint8,
    "F8_E4M3": np.uint8,
}
FLOAT: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}

SEED = 20250421
CHUNK = 100_000


def run(
    operands: Sequence[Codes], dtypes: tuple[str, ...], alphas: tuple[float, ...], out: str
) -> tuple[Codes, tuple[int, int]]:
    """Fuse arrays of codes and return the output's codes and the two counters."""
    result = np.zeros(len(operands[0]), UINT[out])
    counters = array("q", (0, 0))
    kept = [np.ascontiguousarray(operand) for operand in operands]
    addresses = [codes.ctypes.data for codes in kept]
    fuse(addresses, dtypes, alphas, result.ctypes.data, out, len(result), counters, Sums(len(alphas)))
    return result, (int(counters[0]), int(counters[1]))


def values(codes: Codes, dtype: str) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        wide: NDArray[np.float64] = codes.view(FLOAT[dtype]).astype(np.float64)
    return wide


def nearby(numbers: NDArray[np.float64], dtype: str) -> Codes:
    """Codes at or next to some numbers: how they are rounded does not matter here."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        codes: Codes = numbers.astype(FLOAT[dtype]).view(UINT[dtype])
    return codes


def jitter(codes: Codes, rng: Rng, most: int = 2) -> Codes:
    """Move some codes a few steps up or down."""
    return codes + rng.integers(-most, most + 1, len(codes)).astype(codes.dtype)


# Each kind of triple returns codes of new, post and base.


def uniform(dtypes: Sequence[str], _out: str, count: int, rng: Rng) -> list[Codes]:
    """Any bits."""
    return [rng.integers(0, 2 ** (8 * UINT[d]().itemsize), count, dtype=UINT[d]) for d in dtypes]


def finite(dtypes: Sequence[str], out: str, count: int, rng: Rng) -> list[Codes]:
    """Any bits of finite numbers."""
    return [clear(codes, d) for codes, d in zip(uniform(dtypes, out, count, rng), dtypes, strict=True)]


def clear(codes: Codes, dtype: str) -> Codes:
    """Take the lowest bit out of exponents that are all ones."""
    fraction, exponent = oracle.FIELDS[dtype]
    ones = ((1 << exponent) - 1) << fraction
    return np.where((codes & ones) == ones, codes ^ (1 << fraction), codes).astype(codes.dtype)


def weights(dtypes: Sequence[str], _out: str, count: int, rng: Rng) -> list[Codes]:
    """What models are made of: Gaussian weights, small deltas, some of them pruned, not trained, or equal."""
    base = rng.normal(0, 0.02, count)
    new, post = (base + rng.normal(0, 0.0007, count) * (rng.random(count) < 0.9) for _ in range(2))
    return [nearby(x * (rng.random(count) < 0.95), d) for x, d in zip((new, post, base), dtypes, strict=True)]


def close(dtypes: Sequence[str], _out: str, count: int, rng: Rng) -> list[Codes]:
    """Exponents a few or a few dozen apart, for some hundred elements at the same place, anywhere in the range."""
    most = min(2 ** (oracle.FIELDS[d][1] - 1) for d in dtypes)
    least = max(oracle.least_exponent(d) for d in dtypes)
    centre = rng.integers(least, most, count // 512 + 1).repeat(512)[:count]
    spread = rng.choice([2, 10, 30, 60], count // 512 + 1).repeat(512)[:count]
    exponents = [np.clip(centre + rng.integers(-spread, spread + 1), least - 1, most - 1) for _ in dtypes]
    return [
        nearby(np.ldexp(rng.uniform(-1, 1, count), e.astype(np.int32)), d)
        for e, d in zip(exponents, dtypes, strict=True)
    ]


def cancelling(dtypes: Sequence[str], out: str, count: int, rng: Rng) -> list[Codes]:
    """Base near post, or new near base - post."""
    new, post, base = close(dtypes, out, count, rng)
    near_post = jitter(nearby(values(post, dtypes[1]), dtypes[2]), rng)
    with np.errstate(invalid="ignore", over="ignore"):
        near_new = jitter(nearby(values(base, dtypes[2]) - values(post, dtypes[1]), dtypes[0]), rng)
    pick = rng.integers(0, 3, count)
    return [np.where(pick > 0, near_new, new), post, np.where(pick < 2, near_post, base)]


def apart(dtypes: Sequence[str], _out: str, count: int, rng: Rng) -> list[Codes]:
    """Exponents 8 to 26 apart, each operand the largest in turn: where sums stop fitting into 24 bits."""
    exponents = rng.integers(-8, 8, count) - rng.integers(8, 27, (3, count))
    exponents[rng.integers(0, 3, count), np.arange(count)] = rng.integers(-8, 8, count)
    numbers = np.ldexp(rng.uniform(0.5, 1.0, (3, count)) * rng.choice([-1.0, 1.0], (3, count)), exponents)
    numbers[:, ::2] = _one_bit_beyond_a_tie(-(-count // 2), rng)
    order = rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1).T
    numbers = np.take_along_axis(numbers, order, axis=0)
    numbers[order == 2] *= -1.0  # base is taken away
    return [nearby(row, dtype) for row, dtype in zip(numbers, dtypes, strict=True)]


def _one_bit_beyond_a_tie(count: int, rng: Rng) -> NDArray[np.float64]:
    """Return addends: two whose sum is a tie of a format of 8 bits or of 11, and a speck of odd code to either side."""
    bits = rng.choice([8, 11], count)
    speck = np.ldexp(1.0 + np.ldexp(1.0, 1 - bits), -rng.integers(8, 27, count)) * rng.choice([-1.0, 1.0], count)
    return np.stack([np.full(count, 1.5), 0.5 + np.ldexp(1.0, 1 - bits), speck])


def ties(dtypes: Sequence[str], out: str, count: int, rng: Rng) -> list[Codes]:
    """New a number of the output's format, post half its last place, base nothing, or too little to see."""
    new, _, base = finite(dtypes, out, count, rng)
    new = nearby(values(nearby(values(new, dtypes[0]), out), out), dtypes[0])
    with np.errstate(invalid="ignore"):
        _, exponents = np.frexp(np.abs(values(new, dtypes[0])))
    least = oracle.least_exponent(out)
    half = np.maximum(exponents - oracle.FIELDS[out][0] - 1, least) - 1
    post = nearby(np.ldexp(rng.choice([-1.0, 1.0, 3.0], count), half), dtypes[1])
    speck = nearby(np.ldexp(rng.choice([-1.0, 1.0], count), half - rng.integers(1, 80, count)), dtypes[2])
    pick = rng.integers(0, 4, count)
    base = np.where(pick == 0, base, np.where(pick == 1, 0, speck)).astype(base.dtype)
    return [new, post, base]


def special(dtypes: Sequence[str], _out: str, count: int, rng: Rng) -> list[Codes]:
    """Zeros, infinities, NaNs, the least and the greatest numbers, of either sign, each against each."""
    return [
        rng.choice(
            jitter(np.array(edges(d), UINT[d]).repeat(8), rng) if rng.random() < 0.5 else edges(d), count
        ).astype(UINT[d])
        for d in dtypes
    ]


def edges(dtype: str) -> list[int]:
    fraction, exponent = oracle.FIELDS[dtype]
    one, infinity = 1 << fraction, ((1 << exponent) - 1) << fraction
    quiet = infinity | one >> 1
    positive = [
        0,
        1,
        2,
        one - 1,
        one,
        one + 1,
        infinity // 2,
        infinity - 2 * one,
        infinity - one,
        infinity - 2,
    ]
    positive += [infinity - 1, infinity, infinity + 1, quiet, quiet + 1]
    return positive + [code | 1 << (fraction + exponent) for code in positive]


def overflowing(dtypes: Sequence[str], _out: str, count: int, rng: Rng) -> list[Codes]:
    """Three large terms, so that partial sums overflow where the whole may not; one of them sometimes small."""
    triple = []
    for d in dtypes:
        fraction, exponent = oracle.FIELDS[d]
        infinity = ((1 << exponent) - 1) << fraction
        large = infinity - 1 - rng.integers(0, 3 << fraction, count)
        small = rng.integers(0, infinity, count)
        sign = rng.integers(0, 2, count).astype(np.uint64) << np.uint64(fraction + exponent)
        triple.append((np.where(rng.random(count) < 0.85, large, small).astype(np.uint64) | sign).astype(UINT[d]))
    return triple


KINDS: tuple[Callable[[Sequence[str], str, int, Rng], list[Codes]], ...] = (
    uniform,
    finite,
    weights,
    close,
    cancelling,
    apart,
    ties,
    special,
    overflowing,
)


def triples(dtypes: Sequence[str], out: str, count: int, rng: Rng) -> list[Codes]:
    """Codes of new, post and base, of every kind: first one kind after the other, for a block is done in full if one
    of its elements asks for it, then all of them mixed.
    """
    shares = np.diff(np.linspace(0, count, len(KINDS) + 1).astype(int))
    parts = [kind(dtypes, out, int(share), rng) for kind, share in zip(KINDS, shares, strict=True)]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    mixed = rng.random(count) < 0.2
    order = np.concatenate([np.flatnonzero(~mixed), rng.permutation(np.flatnonzero(mixed))])
    return [column[order] for column in columns]


def expected(triple: Sequence[Codes], dtypes: Sequence[str], out: str) -> tuple[list[int], tuple[int, int]]:
    """The oracle's output and counters for k = 1, alpha = 1."""
    rows = zip(*(codes.tolist() for codes in triple), strict=True)
    results = [oracle.fuse(new, post, base, dtypes, out) for new, post, base in rows]
    computed = [oracle.decode(code, out) for code, copied in results if not copied]
    nans = sum(number != number for number in computed)
    infinities = sum(isinstance(number, float) for number in computed) - nans
    return [code for code, _ in results], (infinities, nans)


def mismatches(dtypes: tuple[str, ...], out: str, count: int, rng: Rng) -> list[str]:
    """Compare a sample and describe every difference."""
    triple = triples(dtypes, out, count, rng)
    found, counters = run(triple, dtypes, (1.0,), out)
    wanted, counts = expected(triple, dtypes, out)
    where = np.flatnonzero(found != np.array(wanted, UINT[out]))
    wrong = [
        f"{dtypes} to {out}: {[hex(int(codes[i])) for codes in triple]}: {int(found[i]):#x}, not {wanted[i]:#x}"
        for i in where
    ]
    return wrong if counters == counts else [*wrong, f"{dtypes} to {out}: counted {counters}, not {counts}"]


def weighted(
    triple: Sequence[Codes], dtypes: Sequence[str], alphas: Sequence[float], out: str
) -> tuple[list[int], tuple[int, int]]:
    """The weighted sum step by step in numpy's f64, and the oracle's single rounding of it."""
    with np.errstate(all="ignore"):
        total = values(triple[0], dtypes[0])
        for alpha, post, base in zip(alphas, range(1, len(triple), 2), range(2, len(triple), 2), strict=True):
            difference = values(triple[post], dtypes[post]) - values(triple[base], dtypes[base])
            product = alpha * difference
            total = total + product
    codes = []
    infinities = nans = 0
    rows = zip(*(codes.tolist() for codes in triple), strict=True)
    for row, code in zip(rows, total.view(np.uint64).tolist(), strict=True):
        copied = oracle.law(row[0], row[1::2], row[2::2], alphas) if {*dtypes} == {out} else None
        result = oracle.round_once(oracle.decode(code, "F64"), out) if copied is None else copied
        number = oracle.decode(result, out)
        if copied is None and isinstance(number, float):
            nans += number != number
            infinities += number == number
        codes.append(result)
    return codes, (infinities, nans)


def weighted_mismatches(
    dtypes: tuple[str, ...], alphas: tuple[float, ...], out: str, count: int, rng: Rng
) -> list[str]:
    """Compare a weighted sample and describe every difference."""
    triple = triples(dtypes[:3], out, count, rng)
    for i in range(3, len(dtypes), 2):
        triple += triples((dtypes[0], *dtypes[i : i + 2]), out, count, rng)[1:]
    if len({*dtypes, out}) == 1:  # make law (a) apply to a share
        still = rng.random(count) < 0.2
        for i in range(1, len(dtypes), 2):
            triple[i] = np.where(still, triple[i + 1], triple[i])
    found, counters = run(triple, dtypes, alphas, out)
    wanted, counts = weighted(triple, dtypes, alphas, out)
    where = np.flatnonzero(found != np.array(wanted, UINT[out]))
    wrong = [f"{alphas} x {dtypes} to {out}: {[hex(int(codes[i])) for codes in triple]}" for i in where]
    return wrong if counters == counts else [*wrong, f"{alphas} x {dtypes} to {out}: counted {counters}, not {counts}"]


class Task(NamedTuple):
    """A chunk of the full run; without coefficients the exact sum."""

    name: str
    dtypes: tuple[str, ...]
    alphas: tuple[float, ...]
    out: str
    size: int
    seed: int


def perform(task: Task) -> tuple[str, int, list[str]]:
    """Return the task's name, how many elements it compared, and the differences."""
    rng = np.random.default_rng([SEED, task.seed])
    if task.alphas:
        wrong = weighted_mismatches(task.dtypes, task.alphas, task.out, task.size, rng)
    else:
        wrong = mismatches(task.dtypes, task.out, task.size, rng)
    return task.name, task.size, wrong


def tasks(scale: float) -> Iterator[Task]:
    """Every comparison of the full run, its sizes multiplied by ``scale``."""
    seeds = itertools.count()
    totals = {"BF16": 10**7, "F16": 10**7, "F32": 2 * 10**6, "F64": 2 * 10**6, "F8_E4M3": 10**6, "F8_E5M2": 10**6}
    for dtype, total in totals.items():
        for _ in range(max(1, round(scale * total / CHUNK))):
            yield Task(f"{dtype} throughout", (dtype,) * 3, (), dtype, CHUNK, next(seeds))
    for *dtypes, out in itertools.product(MERGEABLE, repeat=4):
        count = max(600, round(scale * 10_000))
        yield Task("every mix of dtypes", tuple(dtypes), (), out, count, next(seeds))
    for dtype, out in itertools.product(MERGEABLE, repeat=2):
        for alphas in ((0.5,), (-0.3,), (1.0, 1.0), (0.7, -1.25, 1e-3)):
            count = max(600, round(scale * 20_000))
            kinds = (dtype,) * (2 * len(alphas) + 1)
            yield Task("weighted, stepwise f64", kinds, alphas, out, count, next(seeds))


def main() -> int:
    """Run everything on all cores and write the record."""
    scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    started = time.monotonic()
    work = list(tasks(scale))
    compared: dict[str, int] = {}
    wrong: list[str] = []
    perform(work[0]._replace(size=600))  # compiled once, before the processes share the cache
    with multiprocessing.get_context("spawn").Pool() as pool:
        for name, count, differences in pool.imap_unordered(perform, work):
            compared[name] = compared.get(name, 0) + count
            wrong += differences
    seconds = time.monotonic() - started
    rows = [f"| {name} | {count:,} |" for name, count in compared.items()]
    record = f"""# Exactness

Written by `python -m tests.exact`, which compares every output bit and both counters of the kernels with
`tests/oracle.py`. The operands are random bits, exponents close together, cancellation, ties and near-ties, zeros,
subnormals, infinities, NaNs, and sums whose parts overflow.

| operands and output | elements compared |
|---|---|
{chr(10).join(rows)}

**{len(wrong)} mismatches.** Seed {SEED}, {seconds:.0f} s on {multiprocessing.cpu_count()} cores, {platform.machine()},
Python {platform.python_version()}, numpy {np.__version__}, numba {numba.__version__}.
"""
    print(record)
    print("\n".join(wrong[:20]))
    if scale == 1.0 and not wrong:
        (Path(__file__).parent.parent / "docs" / "exactness.md").write_text(record, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
