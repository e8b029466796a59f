"""Transfer efficiency against sums of fractions, and against what Python's own statistics say."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import paramdelta
from paramdelta.cli.scores import report_json
from paramdelta.errors import RecipeError
from paramdelta.insight.bootstrap import Estimate
from paramdelta.insight.score_table import Score, Table
from paramdelta.insight.scores import recovered, transfer, transfer_report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NONE = Estimate(None, None, None)
LEAST = 1.0

hundredths = st.integers(0, 10_000)
triples = st.lists(st.tuples(hundredths, hundredths, hundredths), min_size=1, max_size=12)


def scores_of(rows: Sequence[tuple[float, float, float]], group: str = "") -> list[Score]:
    return [Score(f"b{place}", group, *row) for place, row in enumerate(rows)]


def exactly(scores: Sequence[Score], field: str) -> list[Fraction]:
    return [round(Fraction(getattr(score, field)), 2) for score in scores]


def close(value: float | None, expected: Fraction) -> None:
    assert value is not None
    assert value == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


def explained(xs: Sequence[Fraction], ys: Sequence[Fraction], slope: Fraction, intercept: Fraction) -> Fraction:
    mean = sum(ys, Fraction()) / len(ys)
    missed = sum(((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True)), Fraction())
    return 1 - missed / sum(((y - mean) ** 2 for y in ys), Fraction())


@given(triples)
def test_slopes_are_least_squares(rows: list[tuple[int, int, int]]) -> None:
    scores = scores_of([(a / 100, b / 100, c / 100) for a, b, c in rows])
    xs, ys = exactly(scores, "reference"), exactly(scores, "merged")
    found = transfer(scores, LEAST)
    several = len(rows) > 2 and len(set(ys)) > 1
    if not any(xs):
        assert found.slope == NONE
    else:
        slope = sum((x * y for x, y in zip(xs, ys, strict=True)), Fraction()) / sum(x * x for x in xs)
        close(found.slope.value, slope)
        if several:
            close(found.r_squared, explained(xs, ys, slope, Fraction()))
    if len(set(xs)) < 2:
        assert (found.slope_with_intercept, found.intercept, found.r_squared_with_intercept) == (NONE, None, None)
    else:
        x, y = sum(xs, Fraction()) / len(xs), sum(ys, Fraction()) / len(ys)
        slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
            ((a - x) ** 2 for a in xs), Fraction()
        )
        close(found.slope_with_intercept.value, slope)
        close(found.intercept, y - slope * x)
        if several:
            close(found.r_squared_with_intercept, explained(xs, ys, slope, y - slope * x))
    if not several:
        assert found.r_squared is found.r_squared_with_intercept is None


@given(triples)
def test_lines_are_those_of_the_standard_library(rows: list[tuple[int, int, int]]) -> None:
    assume(len(rows) > 2 and all(len({row[place] for row in rows}) > 1 for place in (1, 2)))
    found = transfer(scores_of(rows), LEAST)
    xs, ys = [row[2] for row in rows], [row[1] for row in rows]
    slope, intercept = statistics.linear_regression(xs, ys)
    assert found.slope_with_intercept.value == pytest.approx(slope, abs=1e-9)
    assert found.intercept == pytest.approx(intercept, abs=1e-6)
    assert found.r_squared_with_intercept == pytest.approx(statistics.correlation(xs, ys) ** 2, abs=1e-9)
    assert found.slope.value == pytest.approx(statistics.linear_regression(xs, ys, proportional=True).slope, abs=1e-9)


@given(triples)
def test_what_is_recovered_is_a_share_of_the_gain(rows: list[tuple[int, int, int]]) -> None:
    scores = scores_of([(a / 100, b / 100, c / 100) for a, b, c in rows])
    found = transfer(scores, LEAST)
    exact = [[Fraction(cell, 100) for cell in row] for row in rows]
    shares = [(merged - base) / (reference - base) for base, merged, reference in exact if abs(reference - base) >= 1]
    assert found.left_out == tuple(score for score in scores if recovered(score, LEAST) is None)
    assert len(shares) == len(scores) - len(found.left_out)
    if shares:
        close(found.recovered.value, sum(shares, Fraction()) / len(shares))
    else:
        assert found.recovered == NONE
    gain = sum((reference - base for base, _, reference in exact), Fraction())
    if abs(gain) >= len(rows):
        close(found.recovered_of_sums.value, sum(merged - base for base, merged, _ in exact) / gain)
    else:
        assert found.recovered_of_sums == NONE


@given(triples, st.sampled_from([1e-9, 0.01, 5.0]), st.sampled_from(["", "8B"]))
def test_nothing_is_ever_nan_and_bounds_are_in_order(
    rows: list[tuple[int, int, int]], least: float, group: str
) -> None:
    report = transfer_report(Table("s.csv", tuple(scores_of(rows, group))), least)
    told = json.loads(json.dumps(report_json(report, None), allow_nan=False))
    assert told["groups"].keys() == {group} - {""}
    for name in ("slope", "slope_with_intercept", "recovered", "recovered_of_sums"):
        value, low, high = told["overall"][name].values()
        assert (low is None) == (high is None)
        if low is not None:
            assert value is not None
            assert low <= high


@pytest.mark.parametrize("size", [1e-300, 1e-150, 1.0, 1e9])
@pytest.mark.parametrize("least", [None, 5e-324, 1e300])
def test_sizes_at_the_ends_of_what_is_read_make_no_nan(size: float, least: float | None) -> None:
    rows = [(0.0, size, 5e-324), (size, 0.0, -size), (0.0, -size, 1e-310), (size / 3, size, size / 2)] * 2
    report = transfer_report(Table("s.csv", tuple(scores_of(rows))), least)
    json.dumps(report_json(report, None), allow_nan=False)


def test_a_merge_as_good_as_the_reference_and_one_that_does_nothing() -> None:
    scores = scores_of([(10.0 + 3 * n, 0.0, 30.0 + n * n) for n in range(8)])
    same = transfer([replace(score, merged=score.reference) for score in scores], LEAST)
    for found in (same.slope, same.slope_with_intercept, same.recovered, same.recovered_of_sums):
        assert found == pytest.approx((1, 1, 1))
    assert same.r_squared == pytest.approx(1)
    assert same.intercept == pytest.approx(0, abs=1e-9)
    nothing = transfer([replace(score, merged=score.new_base) for score in scores], LEAST)
    assert nothing.recovered == nothing.recovered_of_sums == Estimate(0, 0, 0)
    assert nothing.slope.value is not None
    assert nothing.slope.value > 0.4


def test_one_score_has_shares_and_no_more() -> None:
    found = transfer([Score("b", "", 20.0, 45.0, 50.0)], LEAST)
    assert found.slope == Estimate(0.9, None, None)
    assert found.recovered == found.recovered_of_sums == Estimate(25 / 30, None, None)
    assert found.slope_with_intercept == NONE
    assert found.r_squared is found.intercept is None


def test_reference_scores_that_are_all_the_same_have_no_line_with_an_intercept() -> None:
    found = transfer(scores_of([(n, 10.0 + n, 0.1) for n in range(8)]), LEAST)
    assert found.slope_with_intercept == NONE
    assert found.slope.value is not None


def test_merged_scores_that_are_all_the_same_have_no_r_squared() -> None:
    found = transfer(scores_of([(0.0, 0.1, 10.0 + n) for n in range(8)]), LEAST)
    assert found.slope_with_intercept.value == 0.0
    assert found.r_squared is found.r_squared_with_intercept is None


def test_a_reference_that_gains_nothing_leaves_no_share_and_is_named() -> None:
    table = Table("s.csv", (Score("b", "", 40.0, 45.0, 40.0), Score("c", "8B", 40.0, 50.0, 60.0)))
    report = transfer_report(table)
    assert report.min_gain == 0.6
    assert report.overall.recovered.value == 0.5
    assert [score.benchmark for score in report.overall.left_out] == ["b"]
    (warning,) = report.warnings
    assert warning.code == "small-gain"
    assert "'b'" in warning.message
    assert "'c'" not in warning.message
    assert transfer_report(Table("s.csv", table.scores[:1])).overall.recovered_of_sums == NONE
    assert transfer_report(Table("s.csv", (Score("z", "", 0.0, 0.0, 0.0),))).overall.recovered == NONE


def test_a_reference_that_loses_counts_the_other_way_round() -> None:
    assert recovered(Score("b", "", 50.0, 45.0, 40.0), LEAST) == 0.5


def test_a_gain_of_exactly_the_least_counts() -> None:
    assert 2.3 - 1.3 < 1
    assert recovered(Score("b", "", 1.3, 2.3, 2.3), 1.0) == 1.0


def test_groups_are_told_apart_and_their_benchmarks_resampled_together() -> None:
    rows = [(10.0 + n, 30.0 + n * n / 3, 40.0 + 2 * n) for n in range(8)]
    apart = scores_of(rows, "8B") + scores_of(rows, "70B")
    report = transfer_report(Table("s.csv", tuple(apart)))
    assert list(report.groups) == ["8B", "70B"]
    assert report.groups["8B"] == report.groups["70B"]
    assert report.overall.benchmarks == 8
    for name in (
        "slope",
        "slope_with_intercept",
        "recovered",
        "recovered_of_sums",
    ):  # twice the scores, no more of them
        assert getattr(report.overall, name) == pytest.approx(getattr(report.groups["8B"], name))


def test_shares_beside_percentages_and_unknown_columns_are_warned_of() -> None:
    scores = (Score("b", "", 0.2, 0.5, 0.6), Score("c", "", 40.0, 50.0, 60.0), Score("d", "", 0.0, 0.0, 0.0))
    codes = {warning.code: warning.message for warning in transfer_report(Table("s.csv", scores, ("shots",))).warnings}
    assert codes.keys() == {"unused-column", "units", "small-gain"}
    assert "'b'" in codes["units"]
    assert "'d'" not in codes["units"]
    assert not transfer_report(Table("s.csv", scores[:1])).warnings


@pytest.mark.parametrize("least", [0.0, -1.0, math.nan, math.inf])
def test_a_least_gain_that_makes_no_sense_is_refused(least: float) -> None:
    with pytest.raises(RecipeError, match="min-gain"):
        transfer_report(Table("s.csv", (Score("b", "", 1.0, 2.0, 3.0),)), least)


def test_a_table_without_scores_is_refused() -> None:
    with pytest.raises(RecipeError, match="has no scores"):
        transfer_report(Table("s.csv", ()))


def test_from_python_by_path_or_by_table(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("benchmark,new_base,merged,reference\nb,20,45,50\n")
    report = paramdelta.score(tmp_path / "s.csv")
    assert isinstance(report, paramdelta.TransferReport)
    assert report.overall == paramdelta.score(Table("t", report.scores)).overall
