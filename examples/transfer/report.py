"""Writes `docs/experiment.md`, its charts and `results/scores.csv` from `results/`: run it as a module."""

from __future__ import annotations

import csv
import io
import math
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from bench.report import table

from examples.transfer import charts
from examples.transfer.prose import CLOSING, OPENING
from examples.transfer.results import RESULTS, Line, read_results
from examples.transfer.skills import SKILLS
from paramdelta.insight.bootstrap import CONFIDENCE, student_quantile
from paramdelta.insight.score_table import Score
from paramdelta.insight.scores import Transfer, transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from examples.transfer.results import Results

LEAST_GAIN = 5.0  # points: of less, a share says little
PAGE = Path(__file__).parents[2] / "docs" / "experiment.md"
CHARTS = Path(__file__).with_name("charts")
DRAWN = {"scores.svg": charts.scores, "alphas.svg": charts.alphas, "layers.svg": charts.layers}
COLUMNS = {"base": "Θ_base", "post": "Θ_post", "new base": "Θ'_base", "merged": "**ParamΔ**", "direct": "direct"}


def render(results: Results) -> str:
    """Return the page."""
    parts = [
        OPENING,
        _made_with(results),
        "## General post-training, small update\n",
        _skill_table(results, "general", tuple(COLUMNS)),
        _chart("scores.svg", "ParamΔ against direct training: a dot for each skill and seed"),
        "## The same, larger update\n",
        _skill_table(results, "continual", ("new base", "merged", "direct")),
        "## All scenarios\n",
        _scenario_table(results),
        _csv_note(),
        "## Two deltas\n",
        _pair_table(results),
        _answers(results),
        "## The coefficient\n",
        _alpha_table(results),
        _chart("alphas.svg", "Scores and perplexity over α"),
        "## How the two changes lie to each other\n",
        _geometry_table(results),
        _chart("layers.svg", "Norms and cosines by layer"),
        CLOSING,
    ]
    return "\n".join(part for part in parts if part)


def scores_csv(results: Results) -> str:
    """Return merged scores beside those of direct training, as `paramdelta score` will read them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["benchmark", "group", "seed", "new_base", "merged", "reference"])
    for scenario in ("general", "continual", "task"):
        for seed, points in _points(results, scenario).items():
            for skill, point in points.items():
                numbers = (f"{number:g}" for number in (point.new_base, point.merged, point.reference))
                writer.writerow([skill, scenario, seed, *numbers])
    return text.getvalue()


def _points(
    results: Results, scenario: str, merged: dict[int, Line] | None = None, skills: list[str] | None = None
) -> dict[int, dict[str, Score]]:
    """Return what is compared in a scenario, by seed and skill."""
    low = results.find("continual" if scenario == "continual" else "general", "new base")
    high = results.find("general" if scenario == "two deltas" else scenario, "direct")
    merged = results.find(scenario, "merged") if merged is None else merged
    if skills is None:
        skills = [results.settings["sizes"]["one"]] if scenario == "task" else results.skills
    return {
        seed: {
            skill: Score(skill, "", low[seed].score(skill), merged[seed].score(skill), high[seed].score(skill))
            for skill in skills
        }
        for seed in sorted(low.keys() & merged.keys() & high.keys())
    }


def mean_and_half(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval by Student's t; None where there is one value."""
    if len(values) < 2:
        return mean(values), None
    quantile = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def _cell(values: Iterable[float | None], form: str = "{:.1f}") -> str:
    """Format a mean over seeds and its interval."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle, half = mean_and_half(known)
    return form.format(middle) + ("" if half is None else " ± " + form.format(half))


def _made_with(results: Results) -> str:
    sizes, machine, versions = (results.settings[key] for key in ("sizes", "machine", "versions"))
    seeds = sorted({line.seed for line in results.lines if line.role == "direct"})
    decoded = [line.found for line in results.lines if (line.scenario, line.role) == ("general", "decoded")]
    rows = [
        [name, f"{each['steps']}", f"{each['batch']}", f"{each['rate']:g}"]
        for name, key in (
            ("small update of the base", "small"),
            ("large update: the small one, then", "large"),
            ("post-training, all skills or all but one", "all_skills"),
            (f"post-training, `{sizes['one']}` alone", "one_skill"),
        )
        for each in (sizes[key],)
    ]
    what = [[f"`{name}`", SKILLS[name].says] for name in results.skills]
    same, asked = sum(each["same"] for each in decoded), sum(each["items"] for each in decoded)
    return "\n".join(
        [
            table(["training", "steps", "rows a step", "learning rate"], rows),
            table(["skill", ""], what),
            f"**{len(seeds)} of {len(sizes['seeds'])} seeds** are in. A seed decides what is trained on and in which"
            f" order; the {sizes['items']} held-out items of each skill are the same for all. Cells are means over"
            " seeds ± half a 95 % interval (Student's t), where there is more than one. The choice of items alone moves"
            f" a score of 50 % by ± {196 * math.sqrt(0.25 / sizes['items']):.0f} points. Answers that were decoded"
            f" token by token were right or wrong as they were scored in {same} of {asked} cases.\n",
            f"Made with Python {versions['Python']} and torch {versions['torch']} on {machine['cores']} cores"
            f" ({machine['processor']}).\n",
        ]
    )


def _skill_table(results: Results, scenario: str, roles: tuple[str, ...]) -> str:
    found = [results.find(scenario, role) for role in roles]

    def row(name: str, number: Callable[[Line], float]) -> list[str]:
        return [name, *(_cell(map(number, lines.values())) for lines in found)]

    rows = [row(f"`{skill}`", partial(Line.score, skill=skill)) for skill in results.skills]
    rows.append(row("mean, % right", lambda line: line.mean(results.skills)))
    rows.append(row("perplexity of the domain", lambda line: line.perplexity))
    return table(["% right", *(COLUMNS[role] for role in roles)], rows)


def _transfers(points: dict[int, dict[str, Score]]) -> list[Transfer]:
    return [transfer(list(each.values()), LEAST_GAIN) for each in points.values()]


def _kept(results: Results, scenario: str, role: str) -> list[float]:
    """Return how much of the update the post-trained model has, by seed: in nats of the domain's text, against Θ_post.

    Post-training on something else costs some of that loss by itself, with or without an update.
    """
    base = results.find("general", "base")
    new_base = results.find("continual" if scenario == "continual" else "general", "new base")
    post = results.find("task" if scenario == "task" else "general", "post")
    return [
        math.log(post[seed].perplexity / line.perplexity) / math.log(base[seed].perplexity / new_base[seed].perplexity)
        for seed, line in results.find(scenario, role).items()
        if seed in base and seed in new_base and seed in post
    ]


def _scenario_table(results: Results) -> str:
    rows = []
    names = {
        "general": "general post-training",
        "task": f"task-specific: `{results.settings['sizes']['one']}`",
        "continual": "continual pre-training: the larger update",
        "two deltas": "two deltas",
    }
    for scenario, name in names.items():
        coefficients: list[float | None] = [*results.alphas(scenario)]
        for alpha in coefficients or [None]:
            merged = results.find(scenario, "merged", alpha)
            points = _points(results, scenario, merged)
            found = _transfers(points)
            one = scenario == "task"
            rows.append(
                [
                    name if alpha is None else f"{name}, α = {alpha:g} each",
                    _cell(sum(p.merged for p in each.values()) / len(each) for each in points.values()),
                    _cell(sum(p.reference for p in each.values()) / len(each) for each in points.values()),
                    _cell((each.slope.value for each in found), "{:.2f}"),
                    "" if one else _cell((each.r_squared for each in found), "{:.2f}"),
                    _cell((each.recovered.value for each in found), "{:.2f}"),
                    _cell(_kept(results, scenario, "merged"), "{:.2f}"),
                    _cell(_kept(results, scenario, "direct"), "{:.2f}"),
                ]
            )
    header = ["", "ParamΔ, % right", "direct, % right", "slope", "R²", "gain recovered", "update kept", "by direct"]
    return table(header, rows)


def _csv_note() -> str:
    return (
        "Slope: of the line through the origin, ParamΔ's scores on direct training's, over skills, with its R². Gain"
        " recovered: (ParamΔ − Θ'_base) / (direct − Θ'_base), the mean over skills of which direct training gains"
        f" {LEAST_GAIN:g} points or more. Update kept: how much less loss on the domain's text than Θ_post the merged"
        " model has, and the one that was trained directly, in shares of what Θ'_base has less than Θ_base. The scores"
        " are in [scores.csv](../examples/transfer/results/scores.csv).\n"
    )


def _pair_table(results: Results) -> str:
    one = results.settings["sizes"]["one"]
    most = [skill for skill in results.skills if skill != one]
    found: dict[str, dict[int, Line]] = {
        "the first delta alone": results.find("two deltas", "merged, first alone"),
        f"the second alone (`{one}`)": results.find("task", "merged"),
    }
    for alpha in results.alphas("two deltas"):
        found[f"both, α = {alpha:g} each"] = results.find("two deltas", "merged", alpha)
    mixes = {(line.found["first"], line.found["second"]) for line in results.lines if line.role == "mixed"}
    for first, second in sorted(mixes):
        found[f"{first:g} of the first, {second:g} of the second"] = {
            line.seed: line
            for line in results.lines
            if line.role == "mixed" and (line.found["first"], line.found["second"]) == (first, second)
        }
    found["one delta of all skills"] = results.find("general", "merged")
    found["direct, all skills"] = results.find("general", "direct")
    rows = [
        [
            name,
            _cell(line.mean(most) for line in lines.values()),
            _cell(line.score(one) for line in lines.values()),
            _cell(line.perplexity for line in lines.values()),
        ]
        for name, lines in found.items()
    ]
    return table(["on Θ'_base", "first delta's skills, % right", f"`{one}`, % right", "perplexity"], rows)


def _answers(results: Results) -> str:
    """Show how two deltas lie to each other, and what their merge answers, of the first seed that was looked at."""
    lines = [line for line in results.lines if (line.scenario, line.role, line.alpha) == ("two deltas", "decoded", 1.0)]
    both = [line.geometry for line in results.find("two deltas", "merged", 1.0).values() if "between" in line.geometry]
    if not lines or not both:
        return ""
    norms = [_cell((each["total"][place]["delta_norm"] for each in both), "{:.2f}") for place in (0, 1)]
    angle = _cell((each["between"] for each in both), "{:.3f}")
    rows = [[f"`{skill}`", *(f"`{text!r}`" for text in shown)] for skill, shown in lines[0].found["shown"].items()]
    caption = f"What both, with α = 1, answer to one request of each skill (seed {lines[0].seed}):\n"
    return "\n".join(
        [
            table(["‖first delta‖", "‖second delta‖", "their cosine"], [[*norms, angle]]),
            caption,
            table(["", "request", "right", "answer"], rows),
        ]
    )


def _alpha_table(results: Results) -> str:
    curve = {0.0: results.find("general", "new base"), 1.0: results.find("general", "merged")}
    curve |= {alpha: results.find("alpha", "merged", alpha) for alpha in results.alphas("alpha")}
    rows = [
        [
            f"{alpha:g}",
            _cell(line.mean(results.skills) for line in lines.values()),
            _cell(line.perplexity for line in lines.values()),
        ]
        for alpha, lines in sorted(curve.items())
    ]
    return table(["α", "mean, % right", "perplexity"], rows)


def _geometry_table(results: Results) -> str:
    rows = []
    for name, scenario in (("small update", "general"), ("larger update", "continual")):
        totals = [line.geometry["total"][0] for line in results.find(scenario, "merged").values()]
        alike = [line.geometry["total"][0]["cosine"] for line in results.find(scenario, "likeness").values()]
        rows.append(
            [
                name,
                _cell((each["delta_norm"] for each in totals), "{:.2f}"),
                _cell((each["base_shift_norm"] for each in totals), "{:.2f}"),
                _cell((each["cosine"] for each in totals), "{:.3f}"),
                _cell(alike, "{:.3f}"),
            ]
        )
    header = ["", "‖Θ_post − Θ_base‖", "‖Θ'_base − Θ_base‖", "their cosine", "cosine of ParamΔ's and direct training's"]
    return table(header, rows)


def _chart(name: str, says: str) -> str:
    return f"![{says}](../examples/transfer/charts/{name})\n"


def main() -> None:
    """Write all of it."""
    results = read_results()
    CHARTS.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (CHARTS / name).write_text(draw(results), encoding="utf-8")
    (RESULTS / "scores.csv").write_text(scores_csv(results), encoding="utf-8")
    PAGE.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
