"""What deltas come to, added up as windows go by: the numbers of which norms and angles are made."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.engine.scratch import PAIR, PRODUCTS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paramdelta.planning.parts import Part
    from paramdelta.planning.plan import Plan


class DeltaSums(NamedTuple):
    """Sums over elements of a tensor, of b = base, d = post - base and v = new base - base, in f64.

    Attributes:
        squares: the sum of d².
        shift_squares: the sum of v².
        products: the sum of dv.
        base_squares: the sum of b².
        base_products: the sum of bv.
        largest: the largest |d|.
        changed: elements where d is not 0.
        left_out: elements where d or v is not finite; they are in none of the others.
    """

    squares: float
    shift_squares: float
    products: float
    base_squares: float
    base_products: float
    largest: float
    changed: int
    left_out: int

    @classmethod
    def parse(cls, numbers: Sequence[Any]) -> DeltaSums:
        """Return what a record holds. Raises TypeError and ValueError where it is none."""
        d_d, v_v, d_v, b_b, b_v, largest, changed, left_out = map(float, numbers)
        return cls(d_d, v_v, d_v, b_b, b_v, largest, int(changed), int(left_out))


def is_measured(plan: Plan, part: Part) -> bool:
    """Return whether a part's deltas are added up: it has all of the recipe's. Rows that a post lacks do not."""
    return 0 < len(part.alphas) == len(plan.recipe.deltas)


class Measured(NamedTuple):
    """What the deltas of one tensor come to.

    Attributes:
        deltas: each.
        products: sums of products of the elements of deltas 1 and 0, 2 and 0, 2 and 1, 3 and 0, …; where one of the two
            is left out, its element counts as 0.
    """

    deltas: tuple[DeltaSums, ...]
    products: tuple[float, ...]


class Sums:
    """Numbers for one tensor, in memory that loops add to: see `STATISTICS` and `PAIR`."""

    def __init__(self, deltas: int) -> None:
        self.number: Final = deltas  # what the size of the memory goes by
        self._numbers = array("d", bytes(8 * (deltas * STATISTICS + deltas * (deltas - 1) // 2 * PAIR)))

    @property
    def address(self) -> int:
        """Where the numbers are."""
        return self._numbers.buffer_info()[0]

    def add(self, other: Sums) -> None:
        """Add those of other elements of the same tensor."""
        mine, more = self._numbers, other._numbers
        for at in range(0, self.number * STATISTICS, STATISTICS):
            for place in range(at, at + PRODUCTS):
                _add_up(mine, place, place + PRODUCTS, more[place], more[place + PRODUCTS])
            largest, changed, left_out = range(at + 2 * PRODUCTS, at + STATISTICS)
            mine[largest] = max(mine[largest], more[largest])
            mine[changed] += more[changed]
            mine[left_out] += more[left_out]
        for place in range(self.number * STATISTICS, len(mine), PAIR):
            _add_up(mine, place, place + 1, more[place], more[place + 1])

    @property
    def measured(self) -> Measured:
        """What they say."""
        end = self.number * STATISTICS
        rows = (self._numbers[at : at + STATISTICS] for at in range(0, end, STATISTICS))
        return Measured(
            tuple(map(_delta_sums, rows)),
            tuple(sum(self._numbers[at : at + PAIR]) for at in range(end, len(self._numbers), PAIR)),
        )


def _delta_sums(row: array[float]) -> DeltaSums:
    products = (total + lost for total, lost in zip(row[:PRODUCTS], row[PRODUCTS : 2 * PRODUCTS], strict=True))
    return DeltaSums.parse((*products, *row[2 * PRODUCTS :]))


def _add_up(numbers: array[float], place: int, lost: int, more: float, more_lost: float) -> None:
    """Add to a sum, and what that loses to another (TwoSum; Knuth)."""
    a = numbers[place]
    s = a + more
    t = s - a
    numbers[place] = s
    numbers[lost] += (a - (s - t)) + (more - t) + more_lost
