"""Cosines as colours: of delta and shift by layer and module, and of deltas with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.insight.drawing import LIGHT, tip
from paramdelta.insight.numbers import NOTHING, cosine
from paramdelta.insight.plot import LayerAxis, Plot, called
from paramdelta.insight.roles import MODULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from paramdelta.insight.plot import Analysis, Row

_SCALES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_STRONGEST: Final = 0.9
_STRONGEST_BELOW_TEXT: Final = 0.55  # so that it can be read
_MOST_WRITTEN: Final = 10  # deltas whose cosines fit into their cells
_FEW: Final = 4  # deltas whose cosines fit with all their decimals
_WIDEST_OUTLINED: Final = 40
_KEY_STEPS: Final = 5


class _Cell(NamedTuple):
    x: float
    y: float
    value: float | None
    tip: str
    width: float = 1.0


def cosines(delta: Row, place: int, suffix: str) -> Plot | None:
    """Return the heat map of how a delta lies to the shift; None where there is nothing to draw."""
    groups = delta["groups"]
    modules = [module for module in MODULES if any(group["module"] == module for group in groups)]
    values = [group["cosine"] for group in groups if group["cosine"] is not None]
    if not values:
        return None
    axis = LayerAxis.of(group["layer"] for group in groups)
    cells = [
        _Cell(
            axis.place(group["layer"]),
            modules.index(group["module"]),
            group["cosine"],
            f"{called(group['layer'])}, {group['module']}: {cosine(group['cosine'])}",
            axis.width(group["layer"]),
        )
        for group in groups
    ]
    scale = _scale(values)

    def draw(figure: Any) -> None:
        axes, key = figure.subplots(1, 2, width_ratios=(40, 1))
        _draw(axes, cells, scale, _STRONGEST)
        axis.apply(axes)
        _rows(axes, modules)
        _draw_key(key, scale, _STRONGEST)

    low, high = (pick(groups, key=lambda group: _or(group["cosine"], other)) for pick, other in ((min, 2), (max, -2)))
    summary = (
        f"From {cosine(low['cosine'])} ({called(low['layer'])}, {low['module']})"
        f" to {cosine(high['cosine'])} ({called(high['layer'])}, {high['module']})."
    )
    caption = (
        "Cosine of the angle between delta and shift: 1 where post-training went the way that the base went, 0 where"
        f" the two are unrelated, −1 where they are opposite. Colours end at ±{scale:g}; “{NOTHING}” where one of the"
        " two is zero."
    )
    height = 0.75 + 0.27 * max(3, len(modules))
    return Plot(f"cosine{suffix}", place, "Cosine of delta and shift", caption, summary, height, draw)


def pairs(analysis: Analysis) -> Plot:
    """Return the heat maps of how deltas lie to each other: over all tensors, and by layer."""
    deltas, found = len(analysis["deltas"]), analysis["pairs"]
    whole = [
        _Cell(x, y, pair["cosine"], f"{_names(pair)}: {cosine(pair['cosine'])}")
        for pair in found
        for x, y in ((pair["first"], pair["second"]), (pair["second"], pair["first"]))
    ]
    axis = LayerAxis.of(row["layer"] for pair in found for row in pair["layers"])
    layers = [
        _Cell(
            axis.place(row["layer"]),
            y,
            row["cosine"],
            f"{_names(pair)}, {called(row['layer'])}: {_said(row)}",
            axis.width(row["layer"]),
        )
        for y, pair in enumerate(found)
        for row in pair["layers"]
    ]
    scale = _scale([cell.value for cell in (*whole, *layers) if cell.value is not None])

    def draw(figure: Any) -> None:
        left, right, key = figure.subplots(1, 3, width_ratios=(max(9, min(2.4 * deltas, 24)), 30, 1))
        decimals = None if deltas > _MOST_WRITTEN else 2 if deltas > _FEW else 4
        _draw(left, whole, scale, _STRONGEST_BELOW_TEXT, decimals)
        names = [str(place + 1) for place in range(deltas)]
        left.set_xticks(range(deltas), names)
        left.set_xlim(-0.5, deltas - 0.5)
        left.set_xlabel("delta")
        _rows(left, names)
        left.set_title("all tensors")
        _draw(right, layers, scale, _STRONGEST_BELOW_TEXT)
        axis.apply(right)
        _rows(right, [_names(pair) for pair in found])
        right.set_title("by layer")
        _draw_key(key, scale, _STRONGEST_BELOW_TEXT)

    caption = (
        "Cosine of the angle between two deltas: near 0 where they change the model in unrelated ways and so add up"
        f" with little interference. Colours end at ±{scale:g}."
    )
    summary = "; ".join(f"deltas {_names(pair)}: {_said(pair)}" for pair in found) + "."
    height = 0.95 + max(0.27 * max(deltas, 3), 0.2 * len(found))
    return Plot("pairs", None, "Cosines of deltas with each other", caption, summary, height, draw)


def _names(pair: Row) -> str:
    return f"{pair['first'] + 1} and {pair['second'] + 1}"


def _said(row: Row) -> str:
    return cosine(row["cosine"])


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _scale(values: Iterable[float]) -> float:
    """Return where colours end: a round number that no value exceeds."""
    largest = max(map(abs, values), default=0.0)
    return next((scale for scale in _SCALES if scale >= largest), 1.0)


def _draw(axes: Any, cells: Sequence[_Cell], scale: float, strongest: float, decimals: int | None = None) -> None:
    """Draw cells: the hue says which sign, the strength how far from zero, and a number both, where it has decimals."""
    many = max((cell.x for cell in cells), default=0.0) > _WIDEST_OUTLINED
    for cell in cells:
        value = cell.value or 0.0
        (patch,) = axes.bar(
            [cell.x],
            [0.94],
            width=cell.width - (0.0 if many else 0.06),
            bottom=[cell.y - 0.47],
            facecolor=(LIGHT["positive" if value >= 0 else "negative"], strongest * abs(value) / scale),
            edgecolor=(LIGHT["quiet"], 0.4),
            linewidth=0.1 if many else 0.4,
        )
        tip(patch, cell.tip)
        if decimals is not None or cell.value is None:
            axes.text(cell.x, cell.y, cosine(cell.value, decimals or 0), ha="center", va="center", fontsize=7.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _rows(axes: Any, names: Sequence[str]) -> None:
    """Name the rows, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _draw_key(axes: Any, scale: float, strongest: float) -> None:
    """Draw which colours stand for what."""
    levels = [step / _KEY_STEPS * scale for step in range(-_KEY_STEPS, _KEY_STEPS + 1)]
    _draw(axes, [_Cell(0, place, level, cosine(level)) for place, level in enumerate(levels)], scale, strongest)
    axes.set_xticks([])
    axes.set_xlim(-0.5, 0.5)
    axes.set_ylim(-0.5, len(levels) - 0.5)
    ends = (0, _KEY_STEPS, 2 * _KEY_STEPS)
    axes.set_yticks(ends, [f"{levels[place]:+g}".replace("-", "−") if levels[place] else "0" for place in ends])
    axes.yaxis.tick_right()
