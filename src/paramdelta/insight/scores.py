"""How much of post-training a merge carries over: from benchmark scores to transfer efficiency, in both of its senses.

One is the slope of a line that is fitted to merged scores over reference scores, as for ParamΔ (arXiv 2504.21023); the
other the share of the gain that is recovered, (merged - new base) / (reference - new base), known as
"performance gap recovered" (Burns et al., "Weak-to-strong generalization", arXiv 2312.09390).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.wording import listed, quoted
from paramdelta.errors import RecipeError
from paramdelta.insight.bootstrap import Estimate, estimate
from paramdelta.insight.notice import Notice
from paramdelta.insight.score_table import title

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from paramdelta.insight.score_table import Score, Table

_LEAST_SHARE: Final = 0.01
_FLAT: Final = 1e-12  # what rounding can leave of a variance that is zero
_SLACK: Final = 1 - 1e-9  # 2.3 - 1.3 is a little less than 1


@dataclass(frozen=True, slots=True)
class Transfer:
    """How much of post-training a merge carries over, in scores that belong together. Shares: 1 is all of it.

    Attributes:
        benchmarks: number of different benchmarks; these are resampled for the intervals.
        slope: of the line through the origin that fits merged scores over reference scores, by least squares: which
            share of the reference's scores the merge reaches.
        r_squared: share of the variance of merged scores that this line explains, negative where their mean explains
            more; None for fewer than three scores, or where all merged scores are the same.
        slope_with_intercept: of the line that need not go through the origin: by how many points merged scores rise
            with each point of the reference's.
        intercept: of that line, in points.
        r_squared_with_intercept: of that line.
        recovered: mean over benchmarks of the share of the gain that the merge recovers.
        recovered_of_sums: the share of all gains together, in which a benchmark with a small gain weighs little.
        left_out: scores that are not in ``recovered``, since reference and new base are too close.
    """

    benchmarks: int
    slope: Estimate
    r_squared: float | None
    slope_with_intercept: Estimate
    intercept: float | None
    r_squared_with_intercept: float | None
    recovered: Estimate
    recovered_of_sums: Estimate
    left_out: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a table of scores says of a merge.

    Attributes:
        file: the table's name, as messages show it.
        overall: of all scores together.
        groups: of each group, in the table's order; empty where the table has no such column.
        scores: the table, seeds averaged.
        min_gain: the gain, up or down, in points, below which a benchmark is left out of ``recovered``.
        warnings: what to know before the numbers are believed.
    """

    file: str
    overall: Transfer
    groups: dict[str, Transfer]
    scores: tuple[Score, ...]
    min_gain: float
    warnings: tuple[Notice, ...]


def transfer_report(table: Table, min_gain: float | None = None) -> TransferReport:
    """Return what a table of scores says of a merge.

    Args:
        min_gain: the gain, up or down, in points, below which a benchmark is left out of ``recovered``; by default one
            hundredth of the largest score in the table.

    Raises:
        RecipeError: the table is empty, or ``min_gain`` is not more than zero and finite.
    """
    if not table.scores:
        raise RecipeError("has no scores", file=table.file)
    if min_gain is not None and not 0 < min_gain < math.inf:
        raise RecipeError(f"min-gain: must be more than 0 and finite, not {min_gain}")
    scores = table.scores
    least = _LEAST_SHARE * max(map(_largest, scores)) if min_gain is None else min_gain
    groups: dict[str, list[Score]] = {}
    for each in scores:
        groups.setdefault(each.group, []).append(each)
    return TransferReport(
        table.file,
        overall=transfer(scores, least),
        groups={group: transfer(members, least) for group, members in groups.items() if group},
        scores=scores,
        min_gain=least,
        warnings=tuple(_warnings(table, least)),
    )


def transfer(scores: Sequence[Score], min_gain: float) -> Transfer:
    """Return how much of post-training is carried over in scores that belong together.

    Scores of one benchmark in several groups are resampled together: they depend on each other.

    Args:
        scores: at least one.
        min_gain: the gain in points below which a benchmark is left out of ``recovered``.
    """
    middle = math.fsum(each.reference for each in scores) / len(scores)
    height = math.fsum(each.merged for each in scores) / len(scores)
    shares = {each: share for each in scores if (share := recovered(each, min_gain)) is not None}

    def centred(score: Score) -> tuple[float, ...]:
        x, y = score.reference - middle, score.merged - height
        return 1.0, x, y, x * x, x * y

    def of_sums(sums: NDArray[Any]) -> NDArray[Any]:
        count, gain, merged_gain = sums.T
        return _ratio(merged_gain, gain, _is_clear(gain / count, min_gain))

    slope = _estimate(scores, lambda each: (each.reference**2, each.reference * each.merged), _second_to_first)
    free = _estimate(scores, centred, _slopes)
    intercept = None if free.value is None else height - free.value * middle
    return Transfer(
        benchmarks=len({each.benchmark for each in scores}),
        slope=slope,
        r_squared=_r_squared(scores, height, slope.value, 0.0),
        slope_with_intercept=free,
        intercept=intercept,
        r_squared_with_intercept=_r_squared(scores, height, free.value, intercept),
        recovered=_estimate(tuple(shares), lambda each: (1.0, shares[each]), _second_to_first),
        recovered_of_sums=_estimate(scores, lambda each: (1.0, each.gain, each.merged_gain), of_sums),
        left_out=tuple(each for each in scores if each not in shares),
    )


def recovered(score: Score, min_gain: float) -> float | None:
    """Return which share of its gain the merge recovers on one benchmark, None where the gain is too small to say.

    Args:
        min_gain: the least gain, up or down, in points.
    """
    if not _is_clear(score.gain, min_gain):
        return None
    return _finite(score.merged_gain / score.gain)


def _r_squared(scores: Sequence[Score], mean: float, slope: float | None, intercept: float | None) -> float | None:
    """Return the share of the variance around the mean of merged scores that a line explains."""
    if slope is None or intercept is None or len(scores) < 3 or len({each.merged for each in scores}) == 1:
        return None
    missed = math.fsum((each.merged - intercept - slope * each.reference) ** 2 for each in scores)
    around = math.fsum((each.merged - mean) ** 2 for each in scores)
    return _finite(1 - missed / around) if around else None


def _second_to_first(sums: NDArray[Any]) -> NDArray[Any]:
    """Return ratios of two sums."""
    lower, upper = sums.T
    return _ratio(upper, lower, lower > 0)


def _slopes(sums: NDArray[Any]) -> NDArray[Any]:
    """Return slopes from sums of 1, x, y, x² and x·y."""
    count, x, y, xx, xy = sums.T
    variance = count * xx - x * x
    return _ratio(count * xy - x * y, variance, variance > _FLAT * count * xx)


def _ratio(upper: NDArray[Any], lower: NDArray[Any], valid: NDArray[Any]) -> NDArray[Any]:
    """Return ratios, NaN where they are not valid."""
    import numpy as np

    ratios: NDArray[Any] = upper / np.where(valid, lower, np.nan)
    return ratios


def _is_clear(gain: Any, min_gain: float) -> Any:
    """Return whether a gain, or each of an array of gains, is large enough to divide by."""
    return (abs(gain) >= min_gain * _SLACK) & (gain != 0)


def _estimate(
    scores: Sequence[Score],
    terms: Callable[[Score], tuple[float, ...]],
    statistic: Callable[[NDArray[Any]], NDArray[Any]],
) -> Estimate:
    """Return a statistic of sums over scores, benchmarks being the units that are resampled."""
    units: dict[str, list[tuple[float, ...]]] = {}
    for score in scores:
        units.setdefault(score.benchmark, []).append(terms(score))
    return estimate([[math.fsum(column) for column in zip(*rows, strict=True)] for rows in units.values()], statistic)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _largest(score: Score) -> float:
    return max(abs(score.new_base), abs(score.merged), abs(score.reference))


def _warnings(table: Table, min_gain: float) -> Iterator[Notice]:
    """Yield what makes the numbers of a table doubtful."""
    if table.unused:
        yield Notice("unused-column", f"columns that are not known: {listed([*map(quoted, table.unused)])}")
    largest = max(map(_largest, table.scores))
    shares = [each for each in table.scores if 0 < _largest(each) <= 1]
    if largest > 2 and shares:
        message = (
            f"no score above 1 in {listed([*map(title, shares)])}, up to {largest:g} elsewhere: are the units the same?"
        )
        yield Notice("units", message)
    left_out = [each for each in table.scores if recovered(each, min_gain) is None]
    if left_out:
        message = f"reference and new base differ by less than {min_gain:.3g} in {listed([*map(title, left_out)])}"
        yield Notice("small-gain", f"{message}: left out of the mean that is recovered")
