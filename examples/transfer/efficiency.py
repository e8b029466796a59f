"""Transfer efficiency by both definitions, and intervals over seeds.

One is the slope of a line through the origin, merged scores on those of direct training; the other the mean share of
the gain that is recovered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_GAIN = 5.0  # points: of less, a share says little
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles by number of values


@dataclass(frozen=True)
class Point:
    """What three models score on one skill, in per cent."""

    new_base: float
    merged: float
    direct: float


@dataclass(frozen=True)
class Efficiency:
    """How much of direct training a merge replaces; 1 is all of it. None where it cannot be said."""

    slope: float | None
    r_squared: float | None
    recovered: float | None


def efficiency(points: Sequence[Point]) -> Efficiency:
    """Return the efficiency over skills."""
    squares = sum(each.direct**2 for each in points)
    slope = sum(each.direct * each.merged for each in points) / squares if squares else None
    middle = mean(each.merged for each in points)
    around = sum((each.merged - middle) ** 2 for each in points)
    shares = [
        (each.merged - each.new_base) / (each.direct - each.new_base)
        for each in points
        if abs(each.direct - each.new_base) >= LEAST_GAIN
    ]
    explained = None
    if slope is not None and around and len(points) > 2:
        explained = 1 - sum((each.merged - slope * each.direct) ** 2 for each in points) / around
    return Efficiency(slope, explained, mean(shares) if shares else None)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval by Student's t; None where there is one value."""
    if len(values) not in STUDENT:
        return mean(values), None
    return mean(values), STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
