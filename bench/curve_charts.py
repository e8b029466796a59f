"""Curves as SVG."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from matplotlib.ticker import NullLocator

from bench.curve_report import of_point
from bench.drawing import MORE_COLOURS, as_svg, drawing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.curve_shapes import Curve, Sample, Series


@dataclass(frozen=True)
class Height:
    """A point of a line, and how far its runs were below and above it."""

    x: float
    middle: float
    below: float
    above: float


def heights(curve: Curve, series: Series, samples: Sequence[Sample]) -> list[Height]:
    """Return the points of a line that were measured."""
    found = []
    for point in series.points:
        seconds = [run.seconds for run in of_point(samples, curve.key, series.name, point.label)]
        if seconds:
            middle = median(seconds)
            found.append(Height(point.x, middle, middle - min(seconds), max(seconds) - middle))
    return found


def svg(curve: Curve, samples: Sequence[Sample]) -> str:
    """Draw one line for each series, with ranges; seconds start at zero, so that a flat line looks flat."""
    with drawing(6.4, 3.2) as figure:
        axes = figure.subplots()
        for series, colour in zip(curve.series, MORE_COLOURS, strict=False):
            line = heights(curve, series, samples)
            axes.errorbar(
                [each.x for each in line],
                [each.middle for each in line],
                ([each.below for each in line], [each.above for each in line]),
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.6,
                elinewidth=0.9,
                capsize=2.5,
                label=series.name,
            )
        if curve.logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        points = curve.series[0].points
        axes.set_xticks([point.x for point in points], [point.label.removesuffix(" MB") for point in points])
        axes.set_xlabel(curve.axis.replace("`", ""))
        axes.set_ylabel("s")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curve.series), borderaxespad=0)
        return as_svg(figure)
