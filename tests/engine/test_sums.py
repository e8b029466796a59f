"""What deltas come to, against plain numpy in f64 over whole tensors: any dtype, any cut, nothing lost, never NaN."""

from __future__ import annotations

import itertools
import math
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paramdelta.engine.kernels import MERGEABLE, fuse
from paramdelta.engine.scratch import BLOCK
from paramdelta.engine.sums import DeltaSums, Measured, Sums
from tests import exact
from tests.exact import UINT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Codes = NDArray[Any]

RELATIVE = 1e-12


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def measured(
    operands: Sequence[Codes], dtypes: tuple[str, ...], alphas: tuple[float, ...], out: str, cuts: Sequence[int] = ()
) -> Measured:
    """Fuse operands in pieces, each with sums of its own, and add those up."""
    result = np.zeros(len(operands[0]), UINT[out])
    total = Sums(len(alphas))
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(result)]):
        sums = Sums(len(alphas))
        pieces = [np.ascontiguousarray(codes[begin:end]) for codes in operands]
        places = [piece.ctypes.data for piece in pieces]
        address = result.ctypes.data + begin * result.itemsize
        fuse(places, dtypes, alphas, address, out, end - begin, array("q", (0, 0)), sums)
        total.add(sums)
    return total.measured


def expected(operands: Sequence[Codes], dtypes: tuple[str, ...]) -> Measured:
    """Do it with whole tensors of f64 and sums of exact products."""
    with np.errstate(all="ignore"):
        new, *rest = (exact.values(codes, dtype) for codes, dtype in zip(operands, dtypes, strict=True))
        deltas, rows = [], []
        for post, base in zip(rest[::2], rest[1::2], strict=True):
            delta, shift = post - base, new - base
            finite = np.isfinite(delta) & np.isfinite(shift)
            d, v, b = (np.where(finite, each, 0.0) for each in (delta, shift, base))
            deltas.append(d)
            largest = float(np.abs(d).max(initial=0.0))
            changed, left_out = int(np.count_nonzero(d)), int((~finite).sum())
            dots = (fsum(d * d), fsum(v * v), fsum(d * v), fsum(b * b), fsum(b * v))
            rows.append(DeltaSums(*dots, largest, changed, left_out))
        products = [fsum(deltas[i] * deltas[j]) for i in range(len(deltas)) for j in range(i)]
    return Measured(tuple(rows), tuple(products))


def fsum(numbers: NDArray[np.float64]) -> float:
    return math.fsum(numbers.tolist()) if np.isfinite(numbers).all() else math.inf


def assert_close(found: Measured, wanted: Measured) -> None:
    assert len(found.deltas) == len(wanted.deltas)
    for one, other in zip(found.deltas, wanted.deltas, strict=True):
        assert one.squares == pytest.approx(other.squares, rel=RELATIVE)
        assert one.shift_squares == pytest.approx(other.shift_squares, rel=RELATIVE)
        size = math.sqrt(other.squares) * math.sqrt(other.shift_squares)  # what a cosine is relative to
        assert one.products == pytest.approx(other.products, rel=RELATIVE, abs=RELATIVE * size)
        assert one.base_squares == pytest.approx(other.base_squares, rel=RELATIVE)
        size = math.sqrt(other.base_squares) * math.sqrt(other.shift_squares)
        assert one.base_products == pytest.approx(other.base_products, rel=RELATIVE, abs=RELATIVE * size)
        assert (one.largest, one.changed, one.left_out) == (other.largest, other.changed, other.left_out)
    norms = [math.sqrt(row.squares) for row in wanted.deltas]
    sizes = [norms[i] * norms[j] for i in range(len(norms)) for j in range(i)]
    for one_product, other_product, size in zip(found.products, wanted.products, sizes, strict=True):
        assert one_product == pytest.approx(other_product, rel=RELATIVE, abs=RELATIVE * size)


@pytest.mark.parametrize("kind", ["weights", "triples"])
@pytest.mark.parametrize("dtype", [name for name in MERGEABLE if name != "F64"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_one_dtype(dtype: str, alpha: float, kind: str) -> None:
    dtypes = (dtype,) * 3
    operands = getattr(exact, kind)(dtypes, dtype, 30_011, rng(1))
    assert_close(measured(operands, dtypes, (alpha,), dtype), expected(operands, dtypes))


def test_f64() -> None:
    operands = [codes(np.float64(0.02) * rng(seed).standard_normal(30_011)) for seed in range(3)]
    assert_close(measured(operands, ("F64",) * 3, (1.0,), "F64"), expected(operands, ("F64",) * 3))


def codes(values: NDArray[np.float64]) -> Codes:
    return values.view(np.uint64)


@pytest.mark.parametrize("dtypes", [("BF16", "F32", "F16"), ("F32", "BF16", "BF16"), ("F8_E4M3", "BF16", "F8_E5M2")])
def test_mixed_dtypes(dtypes: tuple[str, ...]) -> None:
    operands = exact.weights(dtypes, "BF16", 20_003, rng(2))
    assert_close(measured(operands, dtypes, (1.0,), "BF16"), expected(operands, dtypes))


@pytest.mark.parametrize("deltas", [2, 3, 5])
def test_several_deltas_and_their_products(deltas: int) -> None:
    dtypes = ("BF16",) * (2 * deltas + 1)
    operands = [exact.weights(("BF16",) * 3, "BF16", 10_007, rng(seed))[seed % 3] for seed in range(len(dtypes))]
    found = measured(operands, dtypes, tuple(0.1 * k for k in range(1, deltas + 1)), "BF16", [7, 4096, 9000])
    assert len(found.products) == deltas * (deltas - 1) // 2
    assert_close(found, expected(operands, dtypes))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_cuts_do_not_matter(dtype: str) -> None:
    dtypes = (dtype,) * 3
    operands = (exact.triples if dtype != "F64" else exact.weights)(dtypes, dtype, 50_021, rng(3))
    wanted = expected(operands, dtypes)
    for seed in range(5):
        cuts = rng(seed).integers(0, 50_021, 15).tolist()
        assert_close(measured(operands, dtypes, (1.0,), dtype, cuts), wanted)


@pytest.mark.parametrize("count", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 1, 5 * BLOCK + 3])
def test_any_count(count: int) -> None:
    dtypes = ("BF16",) * 3
    operands = exact.weights(dtypes, "BF16", count, rng(4))
    assert_close(measured(operands, dtypes, (1.0,), "BF16"), expected(operands, dtypes))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_what_is_not_finite_is_left_out_and_counted(dtype: str, share: float) -> None:
    dtypes = (dtype,) * 3
    operands = [operand.copy() for operand in exact.weights(dtypes, dtype, 20_011, rng(5))]
    fraction, exponent = {"BF16": (7, 8), "F16": (10, 5), "F32": (23, 8), "F64": (52, 11)}[dtype]
    infinity = ((1 << exponent) - 1) << fraction
    for seed, operand in enumerate(operands):
        chosen = rng(seed).random(len(operand)) < share
        operand[chosen] = np.array([infinity, infinity | 1, infinity | 1 << (fraction + exponent)], operand.dtype)[seed]
    found, wanted = measured(operands, dtypes, (1.0,), dtype, [999, 5_000]), expected(operands, dtypes)
    assert_close(found, wanted)
    assert 0 < found.deltas[0].left_out <= 20_011
    assert all(math.isfinite(number) for number in found.deltas[0])


def test_small_sums_survive_beside_large_ones() -> None:
    """A sum of a million equal terms, each below the last bit of the first one, is there to twelve digits."""
    post = np.full(1_000_001, 2.0**-27, np.float32)
    post[0] = 1.0
    zero = np.zeros_like(post)
    operands = [array.view(np.uint32) for array in (zero, post, zero)]
    found = measured(operands, ("F32",) * 3, (1.0,), "F32", range(1_000, 1_000_000, 1_000))
    assert found.deltas[0].squares == pytest.approx(1.0 + 1_000_000 * 2.0**-54, rel=1e-15)


def test_what_a_law_copies_counts_like_everything_else() -> None:
    base = exact.weights(("BF16",) * 3, "BF16", 5_000, rng(6))[0]
    nothing = measured([base, base, base], ("BF16",) * 3, (1.0,), "BF16")
    assert nothing.deltas[0]._replace(base_squares=0.0) == DeltaSums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)
    zeros = np.zeros(5_000, np.uint16)
    signs = np.where(rng(7).random(5_000) < 0.5, 0x8000, 0).astype(np.uint16)
    assert measured([zeros, signs, zeros], ("BF16",) * 3, (1.0,), "BF16").deltas[0].changed == 0, "-0 is 0"


def test_sums_of_another_number_of_deltas_are_refused() -> None:
    """Compiled code would write beyond them."""
    with pytest.raises(ValueError, match="sums of 1 deltas do not fit 2 coefficients"):
        fuse([0] * 5, ("BF16",) * 5, (1.0, 1.0), 0, "BF16", 0, array("q", (0, 0)), Sums(1))


def test_without_deltas_there_is_nothing_to_add_up() -> None:
    operand = exact.weights(("BF16",) * 3, "BF16", 100, rng(8))[0]
    assert measured([operand], ("BF16",), (), "F32") == Measured((), ())
