"""The charts of `docs/experiment.md`, as SVG."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

from bench.drawing import INK, MORE_COLOURS, as_svg, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from examples.transfer.results import Line, Results

LIMITS = (-4, 104)


def scores(results: Results) -> str:
    """Draw merged scores on those of direct training: a dot for each skill and seed."""
    with drawing(8.2, 4.0) as figure:
        for axes, (scenario, title) in zip(
            figure.subplots(1, 2, sharey=True),
            (("general", "small update of the base"), ("continual", "large update")),
            strict=True,
        ):
            merged, direct = results.find(scenario, "merged"), results.find(scenario, "direct")
            for place, skill in enumerate(results.skills):
                seeds = sorted(merged.keys() & direct.keys())
                colour, marker = _look(place)
                axes.scatter(
                    [direct[seed].score(skill) for seed in seeds],
                    [merged[seed].score(skill) for seed in seeds],
                    s=26,
                    color=colour,
                    marker=marker,
                    label=skill,
                )
            axes.plot(LIMITS, LIMITS, color=INK, linewidth=0.8, linestyle=":")
            axes.set(xlim=LIMITS, ylim=LIMITS, title=title, xlabel="direct training, % right", aspect="equal")
            axes.grid()
        figure.axes[0].set_ylabel("ParamΔ, % right")
        figure.axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return as_svg(figure)


def alphas(results: Results) -> str:
    """Draw scores and perplexity over the coefficient."""
    curve: dict[float, dict[int, Line]] = {0.0: results.find("general", "new base")}
    curve |= {alpha: results.find("alpha", "merged", alpha) for alpha in results.alphas("alpha")}
    curve[1.0] = results.find("general", "merged")
    places = sorted(alpha for alpha, lines in curve.items() if lines)
    with drawing(8.2, 3.6) as figure:
        left, right = figure.subplots(1, 2)
        for place, skill in enumerate(results.skills):
            colour, marker = _look(place)
            heights = [mean(line.score(skill) for line in curve[alpha].values()) for alpha in places]
            left.plot(places, heights, color=colour, marker=marker, markersize=4, linewidth=1, label=skill)
        left.set(xlabel="α", ylabel="% right", ylim=LIMITS)
        heights = [mean(line.perplexity for line in curve[alpha].values()) for alpha in places]
        right.plot(places, heights, color=INK, marker="o", markersize=4, linewidth=1)
        right.set(xlabel="α", ylabel="perplexity of the domain")
        for axes in (left, right):
            axes.grid()
        left.legend(loc="center right", bbox_to_anchor=(-0.18, 0.5))
        return as_svg(figure)


def layers(results: Results) -> str:
    """Draw norms and cosines by layer, of post-training and both updates."""
    with drawing(8.2, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        small, large = results.find("general", "merged"), results.find("continual", "merged")
        _layer_line(left, small, "delta_norm", "post-training", 0)
        for place, (lines, label) in enumerate(((small, "small update"), (large, "large update")), 1):
            _layer_line(left, lines, "base_shift_norm", label, place)
            _layer_line(right, lines, "cosine", label, place)
        left.set(xlabel="layer", ylabel="norm of the change")
        left.set_ylim(bottom=0)
        right.set(xlabel="layer", ylabel="cosine with post-training")
        for axes in (left, right):
            axes.grid()
            axes.legend()
        return as_svg(figure)


def _look(place: int) -> tuple[str, str]:
    return MORE_COLOURS[place % len(MORE_COLOURS)], "os"[place // len(MORE_COLOURS)]


def _layer_line(axes: Axes, lines: dict[int, Line], number: str, label: str, colour: int) -> None:
    found = [line.geometry["layers"] for line in lines.values()]
    if found:
        count = sum(name.isdigit() for name in found[0])
        heights = [mean(each[str(layer)][number] for each in found) for layer in range(count)]
        axes.plot(range(count), heights, color=MORE_COLOURS[colour], linewidth=1.2, label=label)
