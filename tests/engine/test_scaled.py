"""Block-scaled FP8 against the oracle: every element in whole numbers, whatever the codes and scales."""

from __future__ import annotations

import math
from array import array
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdelta.checkpoint.scaling import Blocks
from paramdelta.engine import kernels
from paramdelta.engine.kernels import Places
from paramdelta.engine.sums import Sums
from paramdelta.planning.parts import Operand, Scale
from tests import oracle
from tests.exact import UINT, values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Codes = NDArray[np.unsignedinteger[Any]]

SHAPE = (11, 37)
BLOCKS = Blocks(4, 8, powers_of_two=False)
FP8 = "F8_E4M3"


class Matrix:
    """Codes of a dtype, and codes of scales where it has some."""

    def __init__(self, codes: Codes, dtype: str, scales: Codes | None = None, scale_dtype: str = "F32") -> None:
        self.codes, self.dtype, self.scales, self.scale_dtype = codes, dtype, scales, scale_dtype
        self.rows, self.columns = (-(-size // edge) for size, edge in zip(codes.shape, BLOCKS[:2], strict=True))

    @property
    def operand(self) -> Operand:
        scale = Scale(0, 0, self.scale_dtype, self.rows, self.columns, BLOCKS.rows, BLOCKS.columns)
        return Operand(0, 0, self.dtype, None if self.scales is None else scale)

    def number(self, row: int, column: int) -> int | float:
        """The number that an element means, in the oracle's units."""
        code = oracle.decode(int(self.codes[row, column]), self.dtype)
        if self.scales is None:
            return code
        scale = oracle.decode(int(self.scales[row // BLOCKS.rows, column // BLOCKS.columns]), self.scale_dtype)
        if isinstance(code, int) and isinstance(scale, int):
            product = code * scale
            assert product % (1 << -oracle.UNIT) == 0
            return product >> -oracle.UNIT
        return _sign(code) * _sign(scale)


def _sign(number: int | float) -> float:
    """An infinite number as it is, a finite one as 1, 0 or -1: all that matters in a product with an infinite one."""
    return number if isinstance(number, float) else float((number > 0) - (number < 0))


def plain(rng: np.random.Generator, dtype: str, *, bits: bool = False) -> Matrix:
    if bits:
        return Matrix(rng.integers(0, 2 ** (8 * UINT[dtype]().itemsize), SHAPE, dtype=UINT[dtype]), dtype)
    with np.errstate(over="ignore"):
        narrow = rng.normal(0, 0.02, SHAPE).astype(np.float32)
        kind = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, FP8: ml_dtypes.float8_e4m3fn}[dtype]
        return Matrix(narrow.astype(kind).view(UINT[dtype]), dtype)


def scaled(rng: np.random.Generator, *, scale_dtype: str = "F32", spread: float = 1.0) -> Matrix:
    """Any codes but NaN, and scales of weights, or some powers of two away from them."""
    codes = rng.integers(0, 256, SHAPE, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    edges = tuple(-(-size // edge) for size, edge in zip(SHAPE, BLOCKS[:2], strict=True))
    scales = (rng.uniform(0.5, 1.0, edges) * 1e-4 * 2.0 ** rng.uniform(-spread, spread, edges)).astype(np.float32)
    kind = ml_dtypes.bfloat16 if scale_dtype == "BF16" else np.float32
    return Matrix(codes, FP8, scales.astype(kind).view(UINT[scale_dtype]), scale_dtype)


def places(matrices: Sequence[Matrix]) -> Places:
    scales = (0 if matrix.scales is None else matrix.scales.ctypes.data for matrix in matrices)
    return Places(tuple(matrix.codes.ctypes.data for matrix in matrices), tuple(scales))


def fused(
    matrices: Sequence[Matrix], alphas: tuple[float, ...], out: str, cuts: Sequence[int] = ()
) -> tuple[Codes, tuple[int, int]]:
    result = np.zeros(SHAPE, UINT[out])
    counters = array("q", (0, 0))
    edges = [0, *sorted(cuts), result.size]
    for begin, end in pairwise(edges):
        address = result.ctypes.data + begin * result.itemsize
        operands = [matrix.operand for matrix in matrices]
        kernels.fuse_scaled(
            operands, alphas, places(matrices), SHAPE[1], range(begin, end), address, out, counters, Sums(len(alphas))
        )
    return result, (int(counters[0]), int(counters[1]))


def exact(matrices: Sequence[Matrix], row: int, column: int) -> int | float:
    new, post, base = (matrix.number(row, column) for matrix in matrices)
    return oracle.add([post, -base, new])


def stepwise(matrices: Sequence[Matrix], alphas: Sequence[float]) -> NDArray[np.float64]:
    """The weighted sum in numpy's f64; code times scale is exact there."""

    def wide(matrix: Matrix) -> NDArray[np.float64]:
        numbers = values(matrix.codes, matrix.dtype)
        if matrix.scales is None:
            return numbers
        whole = np.kron(values(matrix.scales, matrix.scale_dtype), np.ones(BLOCKS[:2]))
        product: NDArray[np.float64] = numbers * whole[: SHAPE[0], : SHAPE[1]]
        return product

    total = wide(matrices[0])
    for alpha, post, base in zip(alphas, matrices[1::2], matrices[2::2], strict=True):
        total = total + alpha * (wide(post) - wide(base))
    return total


FORMS: dict[str, Any] = {
    "all scaled": lambda rng: [scaled(rng) for _ in range(3)],
    "far apart": lambda rng: [scaled(rng, spread=40.0) for _ in range(3)],
    "scales in BF16": lambda rng: [scaled(rng, scale_dtype="BF16"), scaled(rng), scaled(rng, scale_dtype="BF16")],
    "post plain": lambda rng: [scaled(rng), plain(rng, "BF16"), scaled(rng)],
    "new plain": lambda rng: [plain(rng, "F32"), scaled(rng), plain(rng, "BF16")],
    "any bits": lambda rng: [scaled(rng, spread=20.0), plain(rng, "BF16", bits=True), scaled(rng)],
}


# Sums in a whole dtype.


@pytest.mark.parametrize("out", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_scaled_matrices_are_exact_and_rounded_once(form: str, out: str) -> None:
    rng = np.random.default_rng([1, *form.encode()])
    for _ in range(4):
        matrices = FORMS[form](rng)
        found, counters = fused(matrices, (1.0,), out, rng.integers(0, math.prod(SHAPE), 3).tolist())
        numbers = [exact(matrices, row, column) for row in range(SHAPE[0]) for column in range(SHAPE[1])]
        assert found.ravel().tolist() == [oracle.round_once(number, out) for number in numbers]
        results = [oracle.decode(code, out) for code in found.ravel().tolist()]
        nans = sum(result != result for result in results)
        assert counters == (sum(isinstance(result, float) for result in results) - nans, nans)


@pytest.mark.parametrize("alphas", [(), (0.5,), (1.0, -0.3)])
@pytest.mark.parametrize("form", ["all scaled", "post plain", "new plain"])
def test_weighted_sums_of_scaled_matrices_are_stepwise_f64(form: str, alphas: tuple[float, ...]) -> None:
    rng = np.random.default_rng([2, *form.encode()])
    matrices = [*FORMS[form](rng), *FORMS[form](rng)[1:]][: 2 * len(alphas) + 1]
    found, _ = fused(matrices, alphas, "BF16")
    codes = stepwise(matrices, alphas).view(np.uint64).ravel().tolist()
    assert found.ravel().tolist() == [oracle.round_once(oracle.decode(code, "F64"), "BF16") for code in codes]


def test_a_scale_that_is_not_finite_is_counted() -> None:
    rng = np.random.default_rng(3)
    matrices = [scaled(rng) for _ in range(3)]
    matrices[1].codes[:4, :8] = 0x38  # 1.0
    assert matrices[1].scales is not None
    matrices[1].scales[0, 0] = 0x7F80_0000
    found, counters = fused(matrices, (1.0,), "BF16")
    assert (found[:4, :8] == 0x7F80).all()
    assert counters == (32, 0)


# Written as block-scaled FP8 again.


def requantised(
    matrices: Sequence[Matrix], alphas: tuple[float, ...] = (1.0,), blocks: Blocks = BLOCKS, scale_dtype: str = "F32"
) -> tuple[Matrix, tuple[int, int], float, float]:
    codes = np.zeros(SHAPE, np.uint8)
    counters = array("q", (0, 0))
    bands = []
    for first in range(0, SHAPE[0], blocks.rows):
        rows = range(first, min(first + blocks.rows, SHAPE[0]))
        operands, address = [matrix.operand for matrix in matrices], codes.ctypes.data + first * SHAPE[1]
        bands.append(
            kernels.requantise(
                operands,
                alphas,
                places(matrices),
                SHAPE[1],
                rows,
                address,
                blocks,
                scale_dtype,
                counters,
                Sums(len(alphas)),
            )
        )
    scales = np.frombuffer(b"".join(band.scales for band in bands), UINT[scale_dtype]).reshape(len(bands), -1).copy()
    error, size = sum(band.error for band in bands), sum(band.size for band in bands)
    return Matrix(codes, FP8, scales, scale_dtype), (int(counters[0]), int(counters[1])), error, size


def nearest(number: int, scale: int) -> int:
    """The code of the E4M3 nearest to a quotient; what division leaves over shows in the last of many bits."""
    quotient, rest = divmod(abs(number) << -oracle.UNIT, scale)
    quotient |= rest != 0
    return oracle.round_once(-quotient if number < 0 else quotient, FP8)


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16"])
@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("form", ["all scaled", "far apart", "post plain", "scales in BF16"])
def test_requantised_blocks_have_the_scale_of_their_greatest_and_the_nearest_codes(
    form: str, powers_of_two: bool, scale_dtype: str
) -> None:
    rng = np.random.default_rng([4, *form.encode()])
    blocks = BLOCKS._replace(powers_of_two=powers_of_two)
    for _ in range(4):
        matrices = FORMS[form](rng)
        found, counters, error, size = requantised(matrices, (1.0,), blocks, scale_dtype)
        assert found.scales is not None
        errors = squares = Fraction(0)
        for top in range(0, SHAPE[0], blocks.rows):
            for left in range(0, SHAPE[1], blocks.columns):
                inside = [
                    (row, column)
                    for row in range(top, min(top + blocks.rows, SHAPE[0]))
                    for column in range(left, min(left + blocks.columns, SHAPE[1]))
                ]
                numbers = [exact(matrices, row, column) for row, column in inside]
                greatest = Fraction(max(map(abs, numbers))) * Fraction(2) ** oracle.UNIT
                code = int(found.scales[top // blocks.rows, left // blocks.columns])
                scale = oracle.decode(code, scale_dtype)
                assert isinstance(scale, int)
                check_scale(Fraction(scale) * Fraction(2) ** oracle.UNIT, greatest / 448, powers_of_two, scale_dtype)
                for (row, column), number in zip(inside, numbers, strict=True):
                    assert isinstance(number, int)
                    assert int(found.codes[row, column]) == nearest(number, scale)
                    lost = Fraction(found.number(row, column) - number) * Fraction(2) ** oracle.UNIT
                    errors += lost * lost
                    squares += (Fraction(number) * Fraction(2) ** oracle.UNIT) ** 2
        assert counters == (0, 0)
        assert math.isclose(error, errors, rel_tol=1e-9)
        assert math.isclose(size, squares, rel_tol=1e-9)


def check_scale(scale: Fraction, wanted: Fraction, powers_of_two: bool, dtype: str) -> None:
    if powers_of_two:
        assert wanted <= scale * (1 + Fraction(1, 2**50))
        assert scale < 2 * wanted
        assert scale.numerator & (scale.numerator - 1) == 0
        assert scale.denominator & (scale.denominator - 1) == 0
    else:
        assert abs(scale - wanted) <= wanted / 2 ** (24 if dtype == "F32" else 8) * (1 + Fraction(1, 2**20))


@settings(max_examples=300, deadline=None)
@given(st.integers(1 << 23, (1 << 24) - 1), st.integers(-125, 100), st.integers(0x08, 0x7D), st.integers(-3, 3))
def test_a_sum_next_to_a_tie_goes_to_its_side(significand: int, exponent: int, below: int, steps: int) -> None:
    scale = math.ldexp(significand, exponent - 23)
    low, high = values(np.array([below, below + 1], np.uint8), FP8).tolist()
    near = (low + high) / 2 * scale
    for _ in range(abs(steps)):
        near = math.nextafter(near, math.inf if steps > 0 else 0.0)
    new = np.zeros(SHAPE, np.float64)
    new[0, 0], new[1, 1] = 448 * scale, near
    found, _, _, _ = requantised([Matrix(new.view(np.uint64), "F64")], ())
    even = below + below % 2
    assert found.codes[1, 1] == (even if steps == 0 else below + (steps > 0))


def test_ties_of_the_quotient_go_to_even_and_near_ties_do_not() -> None:
    # Scale 1 by a block whose greatest is 448: sums that are ties of E4M3, and ties moved by far less than f64 shows.
    ties = [1 + 1 / 16, 1 + 3 / 16, 17 / 16 * 2**6, 2**-10, 3 * 2**-10]
    new = np.zeros(SHAPE, np.float32)
    post, base = new.copy(), new.copy()
    new[0, 0] = 448
    new[0, 1:6] = new[1, 1:6] = new[2, 1:6] = ties
    post[1, 1:6], base[2, 1:6] = 1e-30, 1e-30
    matrices = [Matrix(each.view(np.uint32), "F32") for each in (new, post, base)]
    found, _, _, _ = requantised(matrices)
    assert found.scales is not None
    assert found.scales[0, 0] == 0x3F80_0000
    even, above, below = (found.codes[row, 1:6].tolist() for row in range(3))
    assert even == [0x38, 0x3A, 0x68, 0x00, 0x02]
    assert above == [0x39, 0x3A, 0x69, 0x01, 0x02]
    assert below == [0x38, 0x39, 0x68, 0x00, 0x01]


def test_blocks_that_post_training_left_alone_keep_the_new_bases_bits() -> None:
    rng = np.random.default_rng(5)
    new, base = scaled(rng), scaled(rng)
    new.codes[0, :3] = 0x80, 0x7F, 0xFF  # -0 and both NaNs
    found, counters, error, size = requantised([new, base, base], (0.7,))
    assert (found.codes == new.codes).all()
    assert found.scales is not None
    assert (found.scales == new.scales).all()
    assert (counters, error, size) == ((0, 0), 0.0, 0.0)


def test_blocks_where_the_base_did_not_move_have_posts_bits() -> None:
    rng = np.random.default_rng(6)
    post, base = scaled(rng), scaled(rng)
    post.codes[0, :3] = 0x80, 0x7F, 0xFF
    found, counters, _, _ = requantised([base, post, base])
    assert (found.codes == post.codes).all()
    assert found.scales is not None
    assert (found.scales == post.scales).all()
    assert counters == (0, 0)


def test_a_block_whose_scale_alone_differs_is_computed() -> None:
    rng = np.random.default_rng(7)
    new, base = scaled(rng), scaled(rng)
    assert base.scales is not None
    post = Matrix(base.codes, FP8, base.scales.copy())
    assert post.scales is not None
    post.scales[0, 0] += 1
    found, _, _, size = requantised([new, post, base])
    assert size > 0
    assert (found.codes[4:] == new.codes[4:]).all()
    assert found.scales is not None
    assert new.scales is not None
    assert found.scales[0, 0] != new.scales[0, 0]


def test_a_base_that_moved_in_its_scale_alone_has_moved() -> None:
    rng = np.random.default_rng(8)
    post, base = scaled(rng), scaled(rng)
    assert base.scales is not None
    new = Matrix(base.codes, FP8, base.scales.copy())
    assert new.scales is not None
    new.scales[0, 0] += 1 << 20
    found, _, _, _ = requantised([new, post, base])
    assert found.scales is not None
    assert post.scales is not None
    assert (found.scales == post.scales).sum() == post.scales.size - 1
    assert found.scales[0, 0] != post.scales[0, 0]


def test_zeros_get_the_scale_one_and_nans_are_counted() -> None:
    new = Matrix(np.zeros(SHAPE, np.uint16), "BF16")
    new.codes[0, 0] = 0x7FC0
    found, counters, _, _ = requantised([new, new, Matrix(new.codes * 0, "BF16")])
    assert found.scales is not None
    assert (found.scales == 0x3F80_0000).all()
    assert found.codes[0, 0] == 0x7F
    assert (found.codes.ravel()[1:] == 0).all()
    assert counters == (0, 1)


@settings(max_examples=50, deadline=None)
@given(st.floats(2.0**-145, 2.0**127, width=32), st.booleans())
def test_the_greatest_of_a_block_never_overflows(greatest: float, powers_of_two: bool) -> None:
    new = Matrix(np.full(SHAPE, np.float32(greatest)).view(np.uint32), "F32")
    found, counters, _, _ = requantised([new], (), BLOCKS._replace(powers_of_two=powers_of_two))
    assert counters == (0, 0)
    back = Fraction(found.number(0, 0)) * Fraction(2) ** oracle.UNIT
    if greatest > 1e-35:  # the scale is no subnormal
        assert abs(back - Fraction(greatest)) <= Fraction(greatest) / 16
