"""Draws `charts/peers.svg` from `results.json`: ``python -m bench.charts``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import NullLocator

from bench.drawing import COLOURS, INK, as_svg, drawing
from bench.stored import floor_seconds, peak_bytes, seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

RESULTS = Path(__file__).with_name("results.json")
CHARTS = Path(__file__).with_name("charts")
PLAYERS = {
    "paramdelta": "paramdelta",
    "torch": "a torch script",
    "mergekit": "mergekit, bf16",
    "mergekit-f32": "mergekit, f32",
    "sd-mecha": "sd-mecha, f32",
    "cp": "cp of one input",
}
DISK = "the disk alone"
THICKNESS = 0.36
TICKS = [step * 10**power for power in range(-3, 4) for step in (1, 2, 5)]


@dataclass(frozen=True)
class Bars:
    """What is drawn of one contender: all of its seconds by mode, and its peak RSS where it has one."""

    name: str
    seconds: dict[str, list[float]]
    peak_bytes: int


def bars(results: dict[str, Any]) -> list[Bars]:
    """Return what there is to draw, from the top down; what was not measured is left out."""
    found = [
        Bars(label, {mode: list(seconds(results, name, mode).values()) for mode in COLOURS}, peak_bytes(results, name))
        for name, label in PLAYERS.items()
    ]
    found.append(Bars(DISK, {mode: list(floor_seconds(results, mode).values()) for mode in COLOURS}, 0))
    return [each for each in found if any(each.seconds.values())]


def logarithmic(axes: Axes, values: Sequence[float], label: str) -> None:
    """Make the values' axis logarithmic, with ticks at 1, 2 and 5."""
    low, high = min(values) / 1.6, max(values) * 2.2  # room for a figure behind the longest bar
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks([tick for tick in TICKS if low < tick < high], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def draw_bar(axes: Axes, place: float, value: float, colour: str, thickness: float, text: str, end: float) -> None:
    """Draw one bar, and its figure behind its end."""
    axes.barh(place, value, thickness, color=colour)
    axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)


def draw_seconds(axes: Axes, shown: list[Bars]) -> None:
    """Draw medians as bars and ranges as lines, two for each contender."""
    for place, each in enumerate(shown):
        for shift, (mode, times) in zip((-0.5, 0.5), each.seconds.items(), strict=True):
            if times:
                height = place + shift * THICKNESS
                middle, end = median(times), max(times)
                draw_bar(axes, height, middle, COLOURS[mode], THICKNESS, f"{middle:.1f} s", end)
                axes.plot([min(times), end], [height, height], color=INK, linewidth=1)
    logarithmic(axes, [time for each in shown for times in each.seconds.values() for time in times], "s, logarithmic")
    axes.set_yticks(range(len(shown)), [each.name for each in shown])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    handles = [axes.barh([0], [0], color=COLOURS[mode]) for mode in COLOURS]
    axes.legend(handles, list(COLOURS), loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def draw_memory(axes: Axes, shown: list[Bars]) -> None:
    """Draw one bar for each contender."""
    peaks = {place: each.peak_bytes / 1e9 for place, each in enumerate(shown) if each.peak_bytes}
    for place, peak in peaks.items():
        draw_bar(axes, place, peak, INK, 2 * THICKNESS, f"{peak:.2g} GB", peak)
    logarithmic(axes, list(peaks.values()), "peak RAM, GB, logarithmic")
    axes.tick_params(axis="y", length=0)


def peers(results: dict[str, Any]) -> str:
    """Return the chart of all contenders as SVG."""
    shown = bars(results)
    with drawing(8.2, 0.9 + 0.45 * len(shown)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        draw_seconds(left, shown)
        draw_memory(right, shown)
        return as_svg(figure)


if __name__ == "__main__":
    CHARTS.mkdir(exist_ok=True)
    (CHARTS / "peers.svg").write_text(peers(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
