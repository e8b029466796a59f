"""Statistics of sums over a dozen or so of units, with confidence intervals by resampling, widened for few units.

Percentiles of the bootstrap alone are too narrow where there are few units: of nominal 95 % intervals around a mean of
eight, 88 % cover it. So they are taken further out, by as much as Student's interval is wider than the normal one: T.
Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69(4), 2015 ("expanded percentile
intervals").
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 10_000
SEED: Final = 0
FEWEST: Final = 6
"""Number of units below which there is no interval: resamples of fewer mostly show how few there are."""

_MOST_WITHOUT_VALUE: Final = 0.01
_NUMBERS_AT_ONCE: Final = 1 << 20


class Estimate(NamedTuple):
    """A number, and where it lies with a confidence of 95 %; None where the data do not say."""

    value: float | None
    low: float | None
    high: float | None


def estimate(units: Sequence[Sequence[float]], statistic: Callable[[NDArray[Any]], NDArray[Any]]) -> Estimate:
    """Return a statistic of sums over units and its confidence interval, the same every time.

    There is no interval for fewer than `FEWEST` units, nor where more than one resample in a hundred has no value.

    Args:
        units: what each unit adds to the sums, all of one length.
        statistic: takes an array of sums, one row for each resample, and returns its value in each; NaN or infinite
            where it has none.
    """
    import numpy as np

    if not units:
        return Estimate(None, None, None)
    terms = np.asarray(units, np.float64)
    totals = [math.fsum(column) for column in terms.T.tolist()]
    with np.errstate(all="ignore"):
        value = float(statistic(np.asarray([totals]))[0])
        if not math.isfinite(value):
            return Estimate(None, None, None)
        return Estimate(value, *_interval(terms, statistic))


def _interval(
    terms: NDArray[Any], statistic: Callable[[NDArray[Any]], NDArray[Any]]
) -> tuple[float, float] | tuple[None, None]:
    import numpy as np

    count = len(terms)
    if count < FEWEST:
        return None, None
    # The legacy generator is the one whose numbers are promised to stay the same in all versions of numpy.
    generator = np.random.RandomState(SEED)
    step = max(1, _NUMBERS_AT_ONCE // terms.size)
    values = np.concatenate(
        [
            statistic(terms[generator.randint(0, count, (min(step, RESAMPLES - begin), count))].sum(axis=1))
            for begin in range(0, RESAMPLES, step)
        ]
    )
    values = values[np.isfinite(values)]
    if len(values) < (1 - _MOST_WITHOUT_VALUE) * RESAMPLES:
        return None, None
    tail = tail_for(count)
    low, high = np.quantile(values, [tail, 1 - tail]).tolist()
    return low, high


def tail_for(units: int) -> float:
    """Return the share of resamples that lies beyond each end of the interval."""
    wider = math.sqrt(units / (units - 1)) * student_quantile((1 + CONFIDENCE) / 2, units - 1)
    return NormalDist().cdf(-wider)


def student_quantile(probability: float, freedom: int) -> float:
    """Return below which t Student's distribution has a probability of more than 0.5.

    Args:
        freedom: whole degrees of freedom.
    """
    low, high = 0.0, 1.0
    while student_below(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_below(middle, freedom) < probability else (low, middle)
    return high


def student_below(t: float, freedom: int) -> float:
    """Return the probability below t in Student's distribution.

    M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    Args:
        freedom: whole degrees of freedom.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    terms = [] if freedom == 1 else [term]
    for place in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (place - 1) / place
        terms.append(term)
    within = math.sin(angle) * math.fsum(terms)
    return (1 + (2 / math.pi * (angle + within) if odd else within)) / 2
