"""The table of all tensors in a report: which columns, what their cells say, and in which order they sort."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.wording import printable
from paramdelta.insight.numbers import EXCEPTIONS, QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paramdelta.insight.numbers import Quantity

    Row = Mapping[str, Any]

_DIGITS: Final = re.compile(r"(\d+)")


class Column(NamedTuple):
    """A column: its head, what that means, its cells' text, and what sorts them, None where there is nothing to say."""

    label: str
    meaning: str
    is_number: bool
    cells: list[str]
    keys: list[Any]

    def order(self) -> tuple[list[int], int]:
        """Return rows from the smallest to the largest, then those with nothing to say; and how many the former are."""
        said = [place for place, key in enumerate(self.keys) if key is not None]
        unsaid = [place for place, key in enumerate(self.keys) if key is None]
        return sorted(said, key=self.keys.__getitem__) + unsaid, len(said)


def columns(analysis: Mapping[str, Any]) -> list[Column]:
    """Return the columns of a table of all tensors of all deltas, a row for each of each."""
    deltas = analysis["deltas"]
    rows = [row for delta in deltas for row in delta["tensors"]]
    places = [place for place, delta in enumerate(deltas, 1) for _ in delta["tensors"]]
    names = [row["name"] for row in rows]
    shapes = [row["shape"] for row in rows]
    found = [
        Column("tensor", "its name", False, [printable(name) for name in names], [_natural(name) for name in names]),
        *([Column("delta", "which delta", True, [str(place) for place in places], places)] if len(deltas) > 1 else []),
        _column(rows, "layer", "its number", is_number=True),
        _column(rows, "module", "which part of a layer"),
    ]
    for quantity in QUANTITIES:
        if quantity.field not in EXCEPTIONS or any(row[quantity.field] for row in rows):
            found.append(_quantity(rows, quantity))
    found += [
        Column("shape", "sorted by elements", False, [_shape(s) for s in shapes], [(math.prod(s), s) for s in shapes]),
        _column(rows, "dtype", "how its elements are written"),
    ]
    return found


def _column(rows: list[Row], field: str, meaning: str, *, is_number: bool = False) -> Column:
    keys = [row[field] for row in rows]
    return Column(field, meaning, is_number, ["" if key is None else printable(str(key)) for key in keys], keys)


def _quantity(rows: list[Row], quantity: Quantity) -> Column:
    keys = [row[quantity.field] for row in rows]
    return Column(quantity.label, quantity.meaning, True, [quantity.shown(key) for key in keys], keys)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts layer 9 before layer 10."""
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(_DIGITS.split(name))]


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
