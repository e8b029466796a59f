from __future__ import annotations

import ctypes
import itertools
import math
from array import array
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdelta.engine import kernels
from paramdelta.engine.kernels import MERGEABLE, fuse, preparations
from paramdelta.engine.sums import Sums
from paramdelta.errors import ParamDeltaError
from tests import exact, oracle
from tests.exact import UINT, run, values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.exact import Codes

EXACT = (1.0,)
WITH_INFINITY = [dtype for dtype in MERGEABLE if dtype != "F8_E4M3"]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([7, *seed])


def column(dtype: str, *codes: int) -> Codes:
    return np.array(codes, UINT[dtype])


def single(dtype: str, new: int, post: int, base: int) -> int:
    """The kernel's bits for one element, one dtype throughout."""
    return int(run([column(dtype, c) for c in (new, post, base)], (dtype,) * 3, EXACT, dtype)[0][0])


# The oracle itself, against what it shares nothing with.


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_oracle_decodes_as_numpy_and_ml_dtypes(dtype: str) -> None:
    codes = exact.uniform([dtype], dtype, 65536, rng())[0]
    for code, value in zip(codes.tolist(), values(codes, dtype).tolist(), strict=True):
        number = oracle.decode(code, dtype)
        if isinstance(number, float):
            assert number == value or math.isnan(number) == math.isnan(value) is True
        else:
            assert Fraction(number) * Fraction(2) ** oracle.UNIT == Fraction(value)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [("F64", "F16"), ("F64", "F32"), ("F32", "BF16"), ("F32", "F16"), ("F32", "F8_E4M3"), ("F32", "F8_E5M2")],
)
def test_oracle_rounds_as_numpy_and_ml_dtypes(wide: str, narrow: str) -> None:
    # Not F64 to BF16: ml_dtypes goes through f32 and rounds twice.
    codes = np.concatenate(exact.triples([wide] * 3, narrow, 30_000, rng()))
    with np.errstate(all="ignore"):
        expected = codes.view(exact.FLOAT[wide]).astype(exact.FLOAT[narrow]).view(UINT[narrow])
    for code, reference in zip(codes.tolist(), expected.tolist(), strict=True):
        number = oracle.decode(code, wide)
        if number != 0 and number == number:  # a negative number that overflows E4M3 is -NaN there, the one NaN here
            is_nan = narrow == "F8_E4M3" and reference & 0x7F == 0x7F
            assert oracle.round_once(number, narrow) == (oracle.CANONICAL_NAN[narrow] if is_nan else reference)


def test_oracle_does_not_round_twice() -> None:
    number = (1 << -oracle.UNIT) + (1 << (-oracle.UNIT - 8)) + (1 << (-oracle.UNIT - 40))
    assert oracle.round_once(number, "BF16") == 0x3F81


# Exact sums.


@pytest.mark.parametrize(("dtype", "count"), [("BF16", 200_000), ("F16", 200_000), ("F32", 60_000), ("F64", 60_000)])
def test_one_dtype_agrees_with_the_oracle(dtype: str, count: int) -> None:
    assert exact.mismatches((dtype,) * 3, dtype, count, rng(1)) == []


@pytest.mark.parametrize("kind", exact.KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", MERGEABLE)
def test_each_kind_of_operand_alone(dtype: str, kind: Any) -> None:
    triple = kind((dtype,) * 3, dtype, 4_000, rng(2))
    wanted, counts = exact.expected(triple, (dtype,) * 3, dtype)
    found, counters = run(triple, (dtype,) * 3, EXACT, dtype)
    assert found.tolist() == wanted
    assert counters == counts


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_each_element_alone(dtype: str) -> None:
    # In a block, one element that needs the long way takes the others with it and hides what they would have needed.
    triple = exact.triples((dtype,) * 3, dtype, 4_000, rng(11))
    wanted, _ = exact.expected(triple, (dtype,) * 3, dtype)
    rows = zip(*(codes.tolist() for codes in triple), strict=True)
    assert [single(dtype, *row) for row in rows] == wanted


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_the_error_of_a_difference_survives_cancellation(dtype: str) -> None:
    fraction, exponent = oracle.FIELDS[dtype]
    large, speck, sign = (1 << (fraction + exponent)) - (2 << fraction), 1, 1 << (fraction + exponent)
    assert single(dtype, sign | large, large, speck) == sign | speck


@pytest.mark.parametrize("out", MERGEABLE)
def test_every_mix_agrees_with_the_oracle(out: str) -> None:
    for i, dtypes in enumerate(itertools.product(MERGEABLE, repeat=3)):
        assert exact.mismatches(dtypes, out, 800, rng(3, i)) == []


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_edges_each_against_each(dtype: str) -> None:
    triple = [np.array(c, UINT[dtype]) for c in zip(*itertools.product(exact.edges(dtype), repeat=3), strict=True)]
    wanted, counts = exact.expected(triple, (dtype,) * 3, dtype)
    found, counters = run(triple, (dtype,) * 3, EXACT, dtype)
    assert found.tolist() == wanted
    assert counters == counts


@pytest.mark.parametrize("dtype", WITH_INFINITY)
def test_an_infinity_outweighs_partial_sums_that_overflow(dtype: str) -> None:
    fraction, exponent = oracle.FIELDS[dtype]
    infinity, sign = ((1 << exponent) - 1) << fraction, 1 << (fraction + exponent)
    largest = infinity - 1
    assert single(dtype, sign | infinity, largest, sign | largest) == sign | infinity
    assert single(dtype, sign | largest, largest, sign | largest) == largest
    assert single(dtype, infinity, sign | infinity, 0) == oracle.CANONICAL_NAN[dtype]


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_exact_zeros_are_positive(dtype: str) -> None:
    one, minus = 1 << oracle.FIELDS[dtype][0], 1 << sum(oracle.FIELDS[dtype])
    assert single(dtype, minus | 2 * one, 2 * one, 0) == 0
    assert single(dtype, minus, minus, 0) == 0


# The bitwise laws.


@pytest.mark.parametrize("dtype", MERGEABLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unchanged_by_post_training_keeps_the_new_base(dtype: str, data: st.DataObject) -> None:
    codes = st.integers(0, 2 ** (8 * UINT[dtype]().itemsize) - 1)
    new, base, other = (data.draw(codes) for _ in range(3))
    alpha = data.draw(st.floats())
    posts = [new, base, base]
    assert run([column(dtype, c) for c in posts], (dtype,) * 3, (alpha,), dtype) == (column(dtype, new), (0, 0))
    five = [column(dtype, c) for c in (new, base, base, other, other)]
    assert run(five, (dtype,) * 5, (1.0, alpha), dtype) == (column(dtype, new), (0, 0))


@pytest.mark.parametrize("dtype", MERGEABLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unmoved_base_gives_post(dtype: str, data: st.DataObject) -> None:
    codes = st.integers(0, 2 ** (8 * UINT[dtype]().itemsize) - 1)
    post, base = data.draw(codes), data.draw(codes)
    assert run([column(dtype, c) for c in (base, post, base)], (dtype,) * 3, EXACT, dtype) == (
        column(dtype, post),
        (0, 0),
    )


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_the_laws_copy_all_bits_of_whole_blocks(dtype: str) -> None:
    new, post, base = exact.uniform((dtype,) * 3, dtype, 5_000, rng(4))
    assert np.array_equal(run([new, base, base], (dtype,) * 3, EXACT, dtype)[0], new)
    assert np.array_equal(run([base, post, base], (dtype,) * 3, EXACT, dtype)[0], post)
    assert np.array_equal(run([new, base, base], (dtype,) * 3, (0.3,), dtype)[0], new)


def test_no_law_where_dtypes_differ() -> None:
    signalling = column("BF16", 0x7F81)
    zero = column("BF16", 0)
    assert run([signalling, zero, zero], ("BF16",) * 3, EXACT, "F32") == (column("F32", 0x7FC00000), (0, 1))
    minus_zero = column("BF16", 0x8000)
    assert run([minus_zero, zero, zero], ("BF16",) * 3, EXACT, "F32")[0] == column("F32", 0)


# Weighted sums.


@pytest.mark.parametrize("alphas", [(0.5,), (-0.3,), (0.0,), (1.0, 1.0), (0.7, -1.25, 1e-3)])
@pytest.mark.parametrize("dtype", MERGEABLE)
def test_weighted_sums_agree_with_stepwise_f64(dtype: str, alphas: tuple[float, ...]) -> None:
    dtypes = (dtype,) * (2 * len(alphas) + 1)
    for out in MERGEABLE:
        assert exact.weighted_mismatches(dtypes, alphas, out, 3_000, rng(5)) == []


def test_weighted_sums_of_mixed_dtypes() -> None:
    mix = ("BF16", "F32", "F64", "F16", "BF16")
    for out in MERGEABLE:
        assert exact.weighted_mismatches(mix, (0.5, -2.0), out, 3_000, rng(6)) == []


def test_products_are_rounded_before_they_are_added() -> None:
    x = 1.0 + 2.0**-30
    new, post, base = (np.array([v]).view(np.uint64) for v in (-(x * x), x, 0.0))
    assert values(run([new, post, base], ("F64",) * 3, (x,), "F64")[0], "F64").tolist() == [0.0]


# Conversions.


@pytest.mark.parametrize("dtype", MERGEABLE)
@pytest.mark.parametrize("out", MERGEABLE)
def test_without_deltas_a_tensor_is_converted_with_one_rounding(dtype: str, out: str) -> None:
    codes = np.concatenate(exact.triples((dtype,) * 3, out, 3_000, rng(12)))
    found, _ = run([codes], (dtype,), (), out)
    if dtype == out:
        expected = codes.tolist()  # the new base's own bits, as the law has it
    else:
        expected = [oracle.round_once(oracle.decode(code, dtype), out) for code in codes.tolist()]
    assert found.tolist() == expected


# Memory.


@pytest.mark.parametrize("dtype", MERGEABLE)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_any_alignment_any_count_nothing_else_written(dtype: str, alpha: float) -> None:
    width = UINT[dtype]().itemsize
    triple = exact.weights((dtype,) * 3, dtype, 1025, rng(7))
    whole, _ = run(triple, (dtype,) * 3, (alpha,), dtype)
    for count, shift in itertools.product([0, 1, 2, 3, 7, 8, 31, 33, 255, 256, 257, 511, 512, 513, 1025], [0, 1, 3]):
        arenas = [np.full(1025 * width + 64, 0xA5, np.uint8) for _ in range(4)]
        places = [32 + (shift + i) % 8 if shift else 32 for i in range(4)]
        for arena, place, codes in zip(arenas, places, triple, strict=False):
            arena[place : place + 1025 * width] = codes.view(np.uint8)
        *operands, out = (arena.ctypes.data + place for arena, place in zip(arenas, places, strict=True))
        before = [arena.copy() for arena in arenas[:3]]
        fuse(operands, (dtype,) * 3, (alpha,), out, dtype, count, array("q", (0, 0)), Sums(1))
        start, end = places[3], places[3] + count * width
        assert np.array_equal(arenas[3][start:end], whole[:count].view(np.uint8))
        assert (np.delete(arenas[3], np.s_[start:end]) == 0xA5).all()
        assert all(np.array_equal(a, b) for a, b in zip(arenas, before, strict=False))


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F16",) * 3, ("F32",) * 3, ("F64",) * 3, ("BF16", "F32", "F16")])
def test_where_a_run_is_cut_does_not_matter(dtypes: tuple[str, ...]) -> None:
    triple = exact.triples(dtypes, dtypes[0], 20_000, rng(8))
    whole, counts = run(triple, dtypes, EXACT, dtypes[0])
    cuts = [0, *sorted(rng(9).integers(0, 20_000, 12).tolist()), 20_000]
    parts = [run([codes[a:b] for codes in triple], dtypes, EXACT, dtypes[0]) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate([part for part, _ in parts]), whole)
    assert tuple(np.sum([counters for _, counters in parts], axis=0)) == counts


def test_threads_give_the_same_bits() -> None:
    triple = exact.triples(("BF16",) * 3, "BF16", 60_000, rng(10))
    whole, _ = run(triple, ("BF16",) * 3, EXACT, "BF16")

    def part(start: int) -> Codes:
        return run([codes[start : start + 1_000] for codes in triple], ("BF16",) * 3, EXACT, "BF16")[0]

    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(np.concatenate(list(pool.map(part, range(0, 60_000, 1_000)))), whole)


# Counters and requests.


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("dtype", WITH_INFINITY)
def test_counters_add_up_what_no_law_copied(dtype: str, alpha: float) -> None:
    fraction, exponent = oracle.FIELDS[dtype]
    infinity = ((1 << exponent) - 1) << fraction
    largest, nan = infinity - 1, infinity + 1
    new = column(dtype, largest, infinity, nan, nan, infinity, 0)
    post = column(dtype, largest, infinity, 0, 5, 7, 0)
    base = column(dtype, 0, 0, 0, 6, 6, 0)
    operands = [new, post, base]
    out = np.zeros(6, UINT[dtype])
    counters = array("q", (10, 20))
    addresses = [operand.ctypes.data for operand in operands]
    for _ in range(2):
        fuse(addresses, (dtype,) * 3, (alpha,), out.ctypes.data, dtype, 6, counters, Sums(1))
    assert counters.tolist() == [10 + 2 * 3, 20 + 2 * 1]


@pytest.mark.parametrize("sign", [0, 0x80])
def test_beyond_448_e4m3_has_only_its_nan(sign: int) -> None:
    new, post = column("F8_E4M3", *[sign | 0x7E] * 3), column("F8_E4M3", *(sign | c for c in (0x58, 0x59, 0x7E)))
    found, counters = run([new, post, column("F8_E4M3", 0, 0, 0)], ("F8_E4M3",) * 3, EXACT, "F8_E4M3")
    assert found.tolist() == [sign | 0x7E, 0x7F, 0x7F]  # 464 is a tie and goes to 448; 466 and 896 overflow
    assert counters == (0, 2)


@pytest.mark.parametrize(
    ("dtypes", "alphas", "out"),
    [
        (("BF16", "I32", "BF16"), EXACT, "BF16"),
        (("BF16",) * 3, EXACT, "F8_E8M0"),
        (("BF16",) * 3, (1.0, 1.0), "BF16"),
        (("BF16", "BF16"), (), "BF16"),
    ],
)
def test_requests_that_make_no_sense_are_refused(dtypes: Sequence[str], alphas: tuple[float, ...], out: str) -> None:
    with pytest.raises(ValueError, match=r"can be added|do not fit"):
        [prepare() for prepare in preparations([(tuple(dtypes), alphas, out)], scaled=False)]


# The processor.


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "fesetround"), reason="this C library is not asked for rounding")
def test_a_thread_in_another_rounding_mode_is_noticed_and_restored() -> None:
    library = ctypes.CDLL(None)
    nearest = library.fegetround()
    seen = []
    for mode in (0x400, 0x800, 0xC00, 0x400000, 0x800000, 0xC00000):  # x86, aarch64
        if library.fesetround(mode) != 0:
            continue
        try:
            seen.append(kernels.floats_are_strict())
            kernels.require_strict_floats()
            assert library.fegetround() == nearest
        finally:
            library.fesetround(nearest)
    assert seen
    assert not any(seen)
    assert kernels.floats_are_strict()


def test_floats_that_cannot_be_restored_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TINY", 0.0)  # as a processor that flushes subnormals sees it
    with pytest.raises(ParamDeltaError, match="flushes subnormal"):
        kernels.require_strict_floats()
