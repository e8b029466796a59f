"""How all charts look: small SVG files, the same bytes from the same numbers, readable on white and on black."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

INK = "#7d8590"  # halfway between black and white, for there is no background
FAINT = "#7d859055"
COLOURS = {"warm": "#e0873a", "cold": "#4a90d9"}
MORE_COLOURS = ("#e0873a", "#4a90d9", "#5aa469", "#b07cc6")
STYLE = {
    "svg.fonttype": "none",  # text, not outlines: a tenth of the size, and it can be read aloud
    "svg.hashsalt": "paramdelta",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Give a figure to draw on, in inches."""
    with rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: Figure) -> str:
    """Return the figure as SVG, without date and version, so that it changes only with what it shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE)
