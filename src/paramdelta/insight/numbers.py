"""Numbers of an analysis as people read them, and what each is called."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

NOTHING: Final = "–"
"""Stands where there is nothing to say."""

_LARGEST_FIXED: Final = 5  # the power of ten that is still written out


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with its significant digits: ``0.01234``, ``1.234e-7``; whole ones in full."""
    if value is None:
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    power = math.floor(math.log10(abs(value))) if value else 0
    if -digits <= power <= _LARGEST_FIXED:
        return f"{value:,.{max(0, digits - 1 - power)}f}" if value else "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def cosine(value: float | None, decimals: int = 4) -> str:
    """Return a cosine, all with the same decimals."""
    return NOTHING if value is None else f"{value:z.{decimals}f}"


def share(value: float | None) -> str:
    """Return a share in per cent; it says 0 or 100 only where none or all are meant."""
    if value is None:
        return NOTHING
    if value in (0.0, 1.0):
        return f"{value:.0%}"
    return f"{min(max(value, 0.0001), 0.9999):.2%}"


class Quantity(NamedTuple):
    """A field that every row has: what it is called, and what it says."""

    field: str
    label: str
    meaning: str

    def shown(self, value: float | None) -> str:
        """Return a value of it as text."""
        if self.field.endswith("share"):
            return share(value)
        return cosine(value) if self.field.endswith("cosine") else number(value)


QUANTITIES: Final = (
    Quantity("relative_delta", "‖Δ‖\u00a0/ ‖base‖", "length of the delta, relative to the base"),
    Quantity("changed_share", "changed", "elements where post is not base"),
    Quantity("cosine", "cos(Δ, shift)", "1 where both point the same way, 0 where unrelated, −1 where opposite"),
    Quantity("delta_norm", "‖Δ‖", "length of the delta, post − base"),
    Quantity("max_abs_delta", "max |Δ|", "largest change of an element"),
    Quantity("base_shift_norm", "‖shift‖", "length of the shift, new base − base"),
    Quantity("relative_shift", "‖shift‖\u00a0/ ‖base‖", "length of the shift, relative to the base"),
    Quantity("base_cosine", "cos(base, new base)", "1 where the new base points the way of the old"),
    Quantity("base_norm", "‖base‖", "length of the base"),
    Quantity("elements", "elements", "how many there are"),
    Quantity("left_out", "left out", "elements that are in no number, for one of the three is not finite"),
    Quantity("infinities", "infinite", "elements of the output that become infinite, though no input is"),
    Quantity("nans", "NaN", "elements of the output that become NaN"),
)
EXCEPTIONS: Final = frozenset({"left_out", "infinities", "nans"})
"""Fields that are shown only where one of them is not 0."""
