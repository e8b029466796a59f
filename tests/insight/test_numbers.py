from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.insight.numbers import NOTHING, cosine, number, share

FINITE = st.floats(-1e308, 1e308)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NOTHING),
        (0.0, "0"),
        (3, "3"),
        (3_606_752_256, "3,606,752,256"),
        (0.0012345678, "0.001235"),
        (-0.5, "-0.5000"),
        (12.3456, "12.35"),
        (123456.7, "123,457"),
        (1.5e6, "1.500e6"),
        (1.234567e-7, "1.235e-7"),
        (5e-324, "4.941e-324"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@given(FINITE)
def test_numbers_are_right_to_four_digits(value: float) -> None:
    assert math.isclose(float(number(value).replace(",", "")), value, rel_tol=5.1e-4)


def test_a_share_is_none_or_all_only_where_it_is() -> None:
    assert [share(value) for value in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0)] == ["0%", "0.01%", "50.00%", "99.99%", "100%"]
    assert share(None) == NOTHING


def test_a_cosine_of_nothing_has_no_sign() -> None:
    assert cosine(-1e-9) == "0.0000"
    assert cosine(-0.25) == "-0.2500"
