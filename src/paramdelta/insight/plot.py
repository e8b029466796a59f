"""What a plot is, and the axis that most of them share: layers, and beside them what belongs to none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paramdelta.insight import drawing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Analysis = Mapping[str, Any]
    Row = Mapping[str, Any]
    Draw = Callable[[Any], None]

WIDTH: Final = 9.6  # inches
_MOST_TICKS: Final = 14
OUTSIDE: Final = "none"


@dataclass(frozen=True)
class Plot:
    """One plot. Nothing in it comes from a file but numbers: deltas are called by their place.

    Attributes:
        name: what its file is called, without the suffix.
        delta: the place of the delta that it is of; None where it is of all of them.
        title: what it shows.
        caption: how to read it.
        summary: what one sees, for those who do not.
        height: in inches.
        draw: draws it on a figure.
    """

    name: str
    delta: int | None
    title: str
    caption: str
    summary: str
    height: float
    draw: Draw

    def svg(self) -> str:
        """Return it as SVG, in the colours of `drawing.LIGHT`."""
        with drawing.drawing(WIDTH, self.height) as figure:
            self.draw(figure)
            return drawing.as_svg(figure, self.name, f"{self.title}. {self.summary}")

    def png(self) -> bytes:
        """Return it as PNG."""
        with drawing.drawing(WIDTH, self.height) as figure:
            self.draw(figure)
            return drawing.as_png(figure)


@dataclass(frozen=True)
class LayerAxis:
    """Where layers lie on an axis; what belongs to none lies behind the last, with a gap between."""

    last: int
    outside: bool

    @classmethod
    def of(cls, layers: Iterable[int | None]) -> LayerAxis:
        """Return the axis for these layers."""
        found = set(layers)
        return cls(max((layer for layer in found if layer is not None), default=-1), None in found)

    def place(self, layer: int | None) -> float:
        """Return where a layer lies."""
        return self.last + max(2, round(0.12 * self.last)) if layer is None else layer

    def width(self, layer: int | None) -> float:
        """Return how wide a cell is: one by itself is not to be overlooked beside many layers."""
        return max(1.0, 0.025 * self.last) if layer is None else 1.0

    def apply(self, axes: Any) -> None:
        """Label an axis, and make it as long as it must be."""
        step = steps(self.last / _MOST_TICKS)
        ticks: list[int | None] = [*range(0, self.last + 1, step), *([None] if self.outside else [])]
        axes.set_xticks([self.place(tick) for tick in ticks], [OUTSIDE if t is None else str(t) for t in ticks])
        first, end = 0 if self.last >= 0 else None, None if self.outside else self.last
        axes.set_xlim(self.place(first) - 0.7, self.place(end) + max(0.7, 0.6 * self.width(end)))
        axes.set_xlabel("layer")


def steps(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, … that is not below ``least``."""
    power: int = 10 ** max(0, math.floor(math.log10(max(least, 1.0))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def called(layer: int | None) -> str:
    """Return how a layer is called in a sentence."""
    return "in no layer" if layer is None else f"layer {layer}"
