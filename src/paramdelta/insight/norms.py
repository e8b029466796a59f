"""Norms of deltas, and the angles between them and what the base has become: from sums to numbers that people read."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any, Final

from paramdelta.engine.sums import DeltaSums

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

AVERAGED: Final = (
    "delta_norm",
    "base_shift_norm",
    "base_norm",
    "relative_delta",
    "relative_shift",
    "cosine",
    "base_cosine",
    "changed_share",
)
"""Of what a mean over tensors says something: each then counts alike, however many elements it has."""


def describe(sums: DeltaSums, elements: int) -> dict[str, Any]:
    """Return what one delta comes to in ``elements`` elements, as plain data.

    ``delta_norm`` is ‖post - base‖, ``base_shift_norm`` ‖new base - base‖, ``base_norm`` ‖base‖; ``relative_delta`` and
    ``relative_shift`` are the first two divided by the third, ``cosine`` is that of the angle between the first two,
    ``base_cosine`` that between base and new base (None where either is zero), ``max_abs_delta`` the largest change;
    ``changed`` counts elements where post is not base, ``left_out`` those that are not finite in one of the three and
    so in none of the numbers. What f64 does not hold is None.
    """
    norm, shift, base = (math.sqrt(each) for each in (sums.squares, sums.shift_squares, sums.base_squares))
    new_base = math.sqrt(max(0.0, sums.base_squares + 2.0 * sums.base_products + sums.shift_squares))
    return {
        "delta_norm": _finite(norm),
        "base_shift_norm": _finite(shift),
        "base_norm": _finite(base),
        "relative_delta": ratio_of(norm, base),
        "relative_shift": ratio_of(shift, base),
        "cosine": cosine_of(sums.products, norm, shift),
        "base_cosine": cosine_of(sums.base_squares + sums.base_products, base, new_base),
        "max_abs_delta": sums.largest,
        "changed": sums.changed,
        "changed_share": sums.changed / elements if elements else 0.0,
        "left_out": sums.left_out,
    }


def total(tensors: Iterable[DeltaSums]) -> DeltaSums:
    """Return what a delta comes to in several tensors together, as one vector."""
    rows = tuple(tensors)
    return DeltaSums(
        sum_of(row.squares for row in rows),
        sum_of(row.shift_squares for row in rows),
        sum_of(row.products for row in rows),
        sum_of(row.base_squares for row in rows),
        sum_of(row.base_products for row in rows),
        max((row.largest for row in rows), default=0.0),
        sum(row.changed for row in rows),
        sum(row.left_out for row in rows),
    )


def mean_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the means over tensors of what `describe` says of each; None where none of them says anything."""
    numbers = {field: array("d") for field in AVERAGED}
    for row in rows:
        for field, known in numbers.items():
            if row[field] is not None:
                known.append(row[field])
    return {field: _finite(sum_of(known) / len(known)) if known else None for field, known in numbers.items()}


def sum_of(numbers: Iterable[float]) -> float:
    """Return the sum, rounded once; NaN where f64 does not hold it or a number."""
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):
        return math.nan


def cosine_of(product: float, one: float, other: float) -> float | None:
    """Return that of the angle between two vectors, given their product and norms; rounding never leads beyond 1."""
    size = one * other
    return max(-1.0, min(1.0, product / size)) if 0.0 < size < math.inf and math.isfinite(product) else None


def ratio_of(part: float, whole: float) -> float | None:
    """Return a ratio, None where there is none."""
    return _finite(part / whole) if 0.0 < whole < math.inf else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
