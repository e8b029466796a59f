"""Curves as Markdown."""

from __future__ import annotations

from itertools import chain
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.report import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.curve_shapes import Curve, Sample, Series

HEAD = """\
<!-- Written by `python -m bench.curves`; do not edit. -->

# Curves

One setting or one state of the page cache is varied at a time, all else is the default. Seconds of whole processes,
synced, medians with their ranges over {rounds} interleaved round(s); triple `{model}`, 3 x {tensor_bytes:,} bytes.
{CPU}, {cores} cores, {RAM}, {kernel}, {filesystem}. Written by `make curves`.
"""


def of_point(samples: Sequence[Sample], curve: str, series: str, point: str) -> list[Sample]:
    """Return the runs of one point."""
    return [each for each in samples if (each.curve, each.series, each.point) == (curve, series, point)]


def cell(runs: Sequence[Sample]) -> str:
    """Format median and range; nothing where there is none."""
    if not runs:
        return ""
    seconds = [run.seconds for run in runs]
    return f"{median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"


def ran_as(runs: Sequence[Sample]) -> str:
    """Say what paramdelta chose for a point, most of the time."""
    if not runs:
        return ""
    chosen = [f"{run.io}, {run.workers} × {run.window_bytes / 2**20:.1f} MiB" for run in runs]
    return max(dict.fromkeys(chosen), key=chosen.count)


def peak(runs: Sequence[Sample]) -> str:
    """Format the largest peak in MB."""
    return f"{max(run.peak_rss_bytes for run in runs) / 1e6:,.0f}" if runs else ""


def told(curve: Curve) -> tuple[Series, ...]:
    """Return the series of which it is shown how they ran: the first one where they are many."""
    return curve.series if len(curve.series) <= 2 else curve.series[:1]


def rows(curve: Curve, samples: Sequence[Sample]) -> list[list[str]]:
    """Format one row for each point; the most RAM is that of all series together."""
    found = []
    for point in curve.series[0].points:
        runs = {series.name: of_point(samples, curve.key, series.name, point.label) for series in curve.series}
        chosen = [ran_as(runs[series.name]) for series in told(curve)]
        found.append([point.label, *map(cell, runs.values()), *chosen, peak([*chain(*runs.values())])])
    return found


def section(curve: Curve, samples: Sequence[Sample]) -> str:
    """Format chart, explanation and table of one curve."""
    seconds, chosen = [f"{each.name}, s" for each in curve.series], [f"{each.name} ran as" for each in told(curve)]
    header = ["", *seconds, *chosen, "peak RSS, MB"]
    chart = f"![{curve.title}](charts/{curve.key}.svg)"
    return f"## {curve.title}\n\n{chart}\n\n{curve.explanation}\n\n{table(header, rows(curve, samples))}"


def render(curves: Sequence[Curve], samples: Sequence[Sample], content: dict[str, Any]) -> str:
    """Format the whole page."""
    head = HEAD.format(**content["machine"], **{name: content[name] for name in ("rounds", "model", "tensor_bytes")})
    return "\n".join([head, *(section(curve, samples) for curve in curves)])
