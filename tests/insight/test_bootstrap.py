from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from paramdelta.insight.bootstrap import FEWEST, Estimate, estimate, student_below, student_quantile, tail_for


def mean(sums: Any) -> Any:
    return sums[:, 1] / sums[:, 0]


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.70620),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (5, 2.57058),
        (9, 2.26216),
        (30, 2.04227),
        (120, 1.97993),
    ],
)
def test_quantiles_of_student_are_those_of_printed_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 51, 2000])
def test_student_is_symmetric_and_rises_to_one(freedom: int) -> None:
    below = [student_below(t, freedom) for t in (-1e12, -3.0, -0.1, 0.0, 0.1, 3.0, 1e12)]
    assert below == sorted(below)
    assert below[3] == 0.5
    for lower, upper in zip(below, reversed(below), strict=True):
        assert lower + upper == pytest.approx(1)
    assert below[-1] == pytest.approx(1)


def test_many_units_leave_the_percentiles_where_they_are() -> None:
    tails = [tail_for(units) for units in (FEWEST, 20, 1000)]
    assert tails == sorted(tails)
    assert tails[-1] == pytest.approx(0.025, rel=0.01)


def test_few_units_have_a_value_and_no_interval() -> None:
    assert estimate([], mean) == Estimate(None, None, None)
    assert estimate([(1.0, float(number)) for number in range(FEWEST - 1)], mean) == Estimate(2.0, None, None)
    assert estimate([(1.0, float(number)) for number in range(FEWEST)], mean).low is not None


def test_the_same_units_have_the_same_interval_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [(1.0, number**1.5) for number in range(10)]
    whole = estimate(units, mean)
    monkeypatch.setattr("paramdelta.insight.bootstrap._NUMBERS_AT_ONCE", 1000)
    assert estimate(units, mean) == whole


def test_a_statistic_without_value_is_none_and_one_that_often_lacks_it_has_no_interval() -> None:
    units = [(0.0, 1.0)] * 9 + [(1.0, 1.0)]
    assert estimate([(0.0, 1.0)] * 10, mean) == Estimate(None, None, None)
    assert estimate(units, mean) == Estimate(10.0, None, None)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = random.Random(1)
    covered = 0
    for _ in range(300):
        low, high = estimate([(1.0, generator.gauss(5, 2)) for _ in range(8)], mean)[1:]
        assert low is not None
        assert high is not None
        covered += low <= 5 <= high
    assert 0.9 <= covered / 300 <= 0.98


def test_intervals_are_those_of_resamples_that_are_drawn_one_by_one() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    found = estimate([(1.0, value) for value in values], mean)
    generator = random.Random(7)
    means = sorted(sum(generator.choices(values, k=8)) / 8 for _ in range(40_000))
    tail = tail_for(8)
    assert found.low == pytest.approx(np.quantile(means, tail), abs=0.15)
    assert found.high == pytest.approx(np.quantile(means, 1 - tail), abs=0.15)
