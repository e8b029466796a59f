"""Norms by layer: a line for each module, the delta on the left, the shift on the right."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from paramdelta.insight.drawing import LIGHT, tip
from paramdelta.insight.numbers import number
from paramdelta.insight.plot import LayerAxis, Plot, called
from paramdelta.insight.roles import MODULES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paramdelta.insight.plot import Row

_LOGARITHMIC: Final = 20.0  # from this ratio of largest to smallest on, a linear axis hides the small ones
_MARKERS: Final = dict(zip(MODULES, "os^Dv*", strict=True))
_FEW_DECADES: Final = 2.5
_MANY_LAYERS: Final = 48


def relative(delta: Row, place: int, suffix: str) -> Plot | None:
    """Return the plot of how long delta and shift are beside the base; None where there is nothing to draw."""
    caption = (
        "Length of the delta (post − base, left) and of the shift (new base − base, right), divided by that of the"
        " base. All tensors of a module in a layer count as one vector."
    )
    fields = {"relative_delta": "‖Δ‖ / ‖base‖", "relative_shift": "‖shift‖ / ‖base‖"}
    return _plot(delta, fields, (f"relative{suffix}", place, "Relative change by layer", caption))


def norms(delta: Row, place: int, suffix: str) -> Plot | None:
    """Return the plot of how long delta and shift are; None where there is nothing to draw."""
    caption = (
        "Length of the delta (left) and of the shift (right). All tensors of a module in a layer count as one vector,"
        " so that large modules have large norms."
    )
    fields = {"delta_norm": "‖Δ‖", "base_shift_norm": "‖shift‖"}
    return _plot(delta, fields, (f"norms{suffix}", place, "Norms by layer", caption))


def _plot(delta: Row, fields: Mapping[str, str], about: tuple[str, int, str, str]) -> Plot | None:
    groups = delta["groups"]
    values = [group[field] for field in fields for group in groups if group[field] is not None]
    if not any(values):
        return None
    smallest, largest = min(value for value in values if value), max(values)
    logarithmic = largest > _LOGARITHMIC * smallest

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (field, label) in zip(panels, fields.items(), strict=True):
            _draw(axes, groups, field, logarithmic=logarithmic)
            axes.set_title(label)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        _scale(panels[0], smallest, largest, logarithmic=logarithmic)
        handles, labels = _legend(panels)
        figure.legend(handles, labels, loc="outside upper left", ncols=len(MODULES), borderaxespad=0)

    name, place, title, caption = about
    caption += " “None” are tensors outside all layers." if any(g["layer"] is None for g in groups) else ""
    caption += " Logarithmic." if logarithmic else ""
    caption += " Zeros are not drawn." if logarithmic and not all(values) else ""
    summary = "; ".join(f"{label}: {_ranges(groups, field)}" for field, label in fields.items()) + "."
    return Plot(name, place, title, caption, summary, 3.1, draw)


def _draw(axes: Any, groups: Sequence[Row], field: str, *, logarithmic: bool) -> None:
    axis = LayerAxis.of(group["layer"] for group in groups)
    for module in MODULES:
        found = {group["layer"]: group[field] for group in groups if group["module"] == module}
        if logarithmic:
            found = {layer: value or None for layer, value in found.items()}
        style: dict[str, Any] = {"marker": _MARKERS[module], "color": LIGHT[module], "label": module}
        if axis.last >= _MANY_LAYERS:
            style |= {"markersize": 2.5, "linewidth": 0.9}
        alone = found.pop(None, None)
        if found:
            layers = range(min(found), max(found) + 1)  # where there is no such module, the line is cut
            values = [math.nan if (value := found.get(layer)) is None else value for layer in layers]
            (line,) = axes.plot(layers, values, **style)
            tip(line, *(_tip(layer, module, v) for layer, v in zip(layers, values, strict=True) if not math.isnan(v)))
        if alone is not None:
            (point,) = axes.plot([axis.place(None)], [alone], linestyle="none", **style)
            tip(point, _tip(None, module, alone))
    axis.apply(axes)


def _tip(layer: int | None, module: str, value: float) -> str:
    return f"{called(layer)}, {module}: {number(value)}"


def _scale(axes: Any, smallest: float, largest: float, *, logarithmic: bool) -> None:
    """Give the axis of values its range, and ticks that say 0.01 rather than 10⁻²."""
    if not logarithmic:
        axes.set_ylim(0, 1.08 * largest)
        return
    low, high = smallest / 1.4, largest * 1.4
    factors = (1, 2, 5) if math.log10(high / low) < _FEW_DECADES else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.minorticks_off()
    axes.set_yticks([tick for tick in ticks if low < tick < high])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Return one entry for each module, though it may be drawn several times."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    shown = [module for module in MODULES if module in found]
    return [found[module] for module in shown], [*shown]


def _ranges(groups: Sequence[Row], field: str) -> str:
    """Return from where to where each module goes, in words."""
    said = []
    for module in MODULES:
        rows = [group for group in groups if group["module"] == module and group[field] is not None]
        if not rows:
            continue
        low, high = min(rows, key=lambda row: row[field]), max(rows, key=lambda row: row[field])
        ends = [f"{number(row[field])} ({called(row['layer'])})" for row in (low, high)]
        said.append(f"{module} {ends[0]}" if low is high else f"{module} {ends[0]} to {ends[1]}")
    return ", ".join(said) or "nothing"
