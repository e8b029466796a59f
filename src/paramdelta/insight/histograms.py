"""How much of a model changes by how much: tensors counted by their elements."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final

from paramdelta.insight.drawing import LIGHT, tip
from paramdelta.insight.numbers import number, share
from paramdelta.insight.plot import Plot
from paramdelta.insight.roles import MODULES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paramdelta.insight.plot import Row

_BINS_PER_DECADE: Final = 16
_MOST_BINS: Final = 64
_SHARES: Final = 20
_FEW_DECADES: Final = 2


def changes(delta: Row, place: int, suffix: str) -> Plot | None:
    """Return the histograms of relative change and of the share of changed elements."""
    tensors = delta["tensors"]
    elements = sum(row["elements"] for row in tensors)
    drawn = [row for row in tensors if row["relative_delta"] and row["elements"]]
    if not drawn:
        return None
    edges = _edges([row["relative_delta"] for row in drawn])
    shares = [step / _SHARES for step in range(_SHARES + 1)]
    counted = [row for row in tensors if row["changed_share"] is not None]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw(left, drawn, "relative_delta", edges, elements, number)
        _draw(right, counted, "changed_share", shares, elements, share)
        left.set_xscale("log")
        left.minorticks_off()
        left.set_xlim(edges[0], edges[-1])
        left.set_xticks(_ticks(edges))
        left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_xlabel("‖Δ‖ / ‖base‖, logarithmic")
        left.set_ylim(bottom=0)
        left.set_ylabel("share of elements")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        right.set_xlim(0, 1)
        right.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        right.set_xlabel("elements of the tensor that changed")
        handles = [left.bar([edges[0]], [0], color=LIGHT[module]) for module in _modules(tensors)]
        figure.legend(handles, _modules(tensors), loc="outside upper left", ncols=len(MODULES), borderaxespad=0)

    still = elements - sum(row["elements"] for row in drawn)
    caption = (
        "Every tensor is counted by its elements, at its own relative change (left) and at the share of its elements"
        " that post-training changed (right)."
    )
    caption += (
        f" Not drawn left: tensors that do not change, or whose base is zero: {share(still / elements)} of elements."
        if still
        else ""
    )
    summary = (
        f"Half of the elements are in tensors that change by less than {number(_median(drawn, 'relative_delta'))},"
        f" and in tensors of which less than {share(_median(counted, 'changed_share'))} of elements change."
    )
    return Plot(f"changes{suffix}", place, "How much changes by how much", caption, summary, 2.9, draw)


def _modules(tensors: Sequence[Row]) -> list[str]:
    there = {row["module"] for row in tensors}
    return [module for module in MODULES if module in there]


def _edges(values: Sequence[float]) -> list[float]:
    """Return edges of bins that hold all values, an equal ratio apart."""
    low, high = math.log10(min(values)), math.log10(max(values))
    step = 1 / _BINS_PER_DECADE
    while (high - low) / step > _MOST_BINS:
        step *= 2
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return [10 ** (place * step) for place in range(first, last + 1)]


def _ticks(edges: Sequence[float]) -> list[float]:
    """Return round numbers between edges."""
    low, high = math.log10(edges[0]), math.log10(edges[-1])
    factors = (1, 2, 5) if high - low <= _FEW_DECADES else (1,)
    ticks = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [tick for tick in ticks if edges[0] <= tick <= edges[-1]]


def _draw(
    axes: Any,
    rows: Sequence[Row],
    field: str,
    edges: Sequence[float],
    elements: int,
    shown: Callable[[float], str],
) -> None:
    """Draw bars, the modules of each on top of each other."""
    bins = len(edges) - 1
    counts = {module: [0] * bins for module in _modules(rows)}
    for row in rows:
        place = sum(row[field] >= edge for edge in edges[1:-1])
        counts[row["module"]][place] += row["elements"]
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        bottom = 0.0
        for module, found in counts.items():
            if found[place]:
                height = found[place] / elements
                (patch,) = axes.bar(
                    [low],
                    [height],
                    width=high - low,
                    bottom=[bottom],
                    align="edge",
                    color=LIGHT[module],
                    edgecolor=LIGHT["paper"],
                    linewidth=0.5,
                )
                tip(patch, f"{shown(low)} to {shown(high)}, {module}: {share(height)} of elements")
                bottom += height
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _median(rows: Sequence[Row], field: str) -> float | None:
    """Return where half of the elements are below."""
    left = sum(row["elements"] for row in rows) / 2
    for row in sorted(rows, key=lambda row: row[field]):
        left -= row["elements"]
        if left <= 0:
            return float(row[field])
    return None
