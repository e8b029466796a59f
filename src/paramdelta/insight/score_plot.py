"""A chart of benchmark scores and of what a merge recovers: needs matplotlib."""

from __future__ import annotations

import io
import itertools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.wording import clipped, printable, quoted
from paramdelta.errors import RecipeError
from paramdelta.insight.drawing import require_matplotlib
from paramdelta.insight.files import replace_file
from paramdelta.planning.recipe import checked_path

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from paramdelta.insight.score_table import Score
    from paramdelta.insight.scores import Transfer, TransferReport

# What each format would say of when and by what it was made, and so change with.
_METADATA: Final[dict[str, dict[str, None]]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_INK: Final = "#7d8590"  # readable on white and on black: there is no background
_FAINT: Final = "#7d859055"
_COLOURS: Final = ("#4a90d9", "#e0873a", "#5aa469", "#b07cc6", "#c65b7c", "#8a7a4a")
_STYLE: Final = {
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "paramdelta",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_MOST_ROWS: Final = 60
_MOST_LABELS: Final = 12
_LONGEST_NAME: Final = 32


def checked_plot(file: str | os.PathLike[str]) -> Path:
    """Return the path of a chart that can be drawn.

    Raises:
        RecipeError: it does not end in a format that is drawn.
        OutputError: matplotlib is not installed.
    """
    path = Path(checked_path(file, "plot"))
    if _format(path) not in _METADATA:
        endings = ", ".join(f".{name}" for name in _METADATA)
        raise RecipeError(f"plot: {quoted(path.name)} ends in none of {endings}", remedy="The ending says the format.")
    require_matplotlib()
    return path


def write_plot(report: TransferReport, path: Path) -> None:
    """Write the chart of a report; what lies at ``path`` is replaced once the new file is complete.

    Args:
        path: as `checked_plot` returns it.

    Raises:
        OutputError: it cannot be written.
    """
    replace_file(path, drawn(report, _format(path)))


def drawn(report: TransferReport, kind: str) -> bytes:
    """Return the chart of a report, the same bytes every time.

    On the left every score is a point, merged over reference, with the line of each group; the dashed one is the
    reference itself. On the right every benchmark is a row, from the new base to the reference.

    Args:
        kind: ``svg``, ``png`` or ``pdf``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    order = {group: place for place, group in enumerate(report.groups)}
    shown = sorted(report.scores, key=lambda each: order.get(each.group, 0))
    rows = len(shown) if len(shown) <= _MOST_ROWS else 0
    buffer = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # such a name shows boxes, and is no reason to complain
        figure = Figure(figsize=(9.6 if rows else 4.8, max(4.6, 1 + rows / 5)), layout="constrained")
        axes, *others = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
        colours = dict(zip(report.groups or [""], itertools.cycle(_COLOURS), strict=False))
        _draw_lines(axes, report, colours)
        for beside in others:
            _draw_rows(beside, shown, colours)
        figure.savefig(buffer, format=kind, dpi=200, transparent=True, metadata=_METADATA[kind])
    return buffer.getvalue()


def _draw_lines(axes: Any, report: TransferReport, colours: Mapping[str, str]) -> None:
    """Draw merged scores over reference scores, and the line of each group."""
    values = [value for each in report.scores for value in (each.merged, each.reference)]
    low, high = min(0.0, *values), max(0.0, *values)
    high = high if high > low else low + 1.0
    axes.plot([low, high], [low, high], color=_INK, linewidth=0.8, linestyle="--")
    handles, labels = [], []
    for group, transfer in report.groups.items() or [("", report.overall)]:
        members = [each for each in report.scores if each.group == group]
        references = [each.reference for each in members]
        if transfer.slope.value is not None:
            ends = [min(0.0, *references), max(0.0, *references)]
            axes.plot(ends, [transfer.slope.value * end for end in ends], color=colours[group], linewidth=1)
        merged = [each.merged for each in members]
        handles.append(axes.scatter(references, merged, color=colours[group], s=20, zorder=3))
        labels.append(_legend(group, transfer))
    margin = (high - low) / 20
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
    axes.set(xlabel="reference: post-trained directly", ylabel="merged")
    shown = slice(_MOST_LABELS)
    legend = axes.legend(handles[shown], labels[shown], loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_rows(axes: Any, scores: Sequence[Score], colours: Mapping[str, str]) -> None:
    """Draw a row for each benchmark: a line from new base to reference, and the merged score."""
    places, tints = range(len(scores)), [colours.get(each.group, _INK) for each in scores]
    bases, references = [each.new_base for each in scores], [each.reference for each in scores]
    axes.hlines(places, bases, references, color=_FAINT, linewidth=3)
    marks = [
        axes.scatter(bases, places, marker="|", color=_INK, s=50),
        axes.scatter([each.merged for each in scores], places, color=tints, s=20, zorder=3),
        axes.scatter(references, places, marker="|", color=tints, s=90, zorder=3),
    ]
    axes.set_yticks(places, [_short(each.benchmark) for each in scores], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("score")
    labels = ["new base", "merged", "reference"]
    axes.legend(marks, labels, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3)


def _short(name: str) -> str:
    shown = printable(clipped(name))
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


def _legend(group: str, transfer: Transfer) -> str:
    numbers = [("slope", transfer.slope.value), ("R²", transfer.r_squared), ("recovered", transfer.recovered.value)]
    said = ", ".join(f"{name} {value:.3f}" for name, value in numbers if value is not None)
    # matplotlib leaves out what begins with an underscore
    return f"{' ' if group.startswith('_') else ''}{_short(group)}: {said}" if group else said or "merged"


def _format(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()
