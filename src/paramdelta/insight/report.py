"""An analysis as one HTML page that opens from a disk, loads nothing, and runs nothing but its own table."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.wording import printable
from paramdelta.insight.drawing import DARK, LIGHT, themed, variables
from paramdelta.insight.numbers import EXCEPTIONS, QUANTITIES
from paramdelta.insight.plots import plots
from paramdelta.insight.tensor_table import columns
from paramdelta.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from paramdelta.insight.numbers import Quantity
    from paramdelta.insight.plot import Plot
    from paramdelta.insight.tensor_table import Column

    Analysis = Mapping[str, Any]
    Row = Mapping[str, Any]

MOST_ROWS: Final = 2000
"""Rows that are in the page at once: a browser lays out more only slowly."""

_BESIDE_EACH_OTHER: Final = 3


def html_report(analysis: Analysis) -> str:
    """Return the page: the same text for the same analysis.

    Raises:
        OutputError: matplotlib is not there.
    """
    drawn = plots(analysis)
    sections = [
        _warnings(analysis["warnings"]),
        _compared(analysis["deltas"]),
        _totals(analysis["deltas"]),
        _figures("between", "Between the deltas", [plot for plot in drawn if plot.delta is None]),
        *(_delta_figures(analysis, place, drawn) for place in range(len(analysis["deltas"]))),
        _tensors(analysis),
    ]
    return _page(_title(analysis["deltas"]), "\n".join(section for section in sections if section))


def _page(title: str, content: str) -> str:
    folder = files("paramdelta.insight") / "page"
    style = (
        f":root {{ {variables(LIGHT)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n"
        f"{(folder / 'page.css').read_text(encoding='utf-8')}"
    )
    script = (folder / "page.js").read_text(encoding="utf-8")
    allowed = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="paramdelta {VERSION}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{content}
</main>
<footer>Written by paramdelta {VERSION}. This page is one file; it loads nothing from anywhere.</footer>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    """Return what a policy calls a script or style that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(deltas: Iterable[Row]) -> str:
    names = dict.fromkeys(printable(delta["post"].rstrip("/").rpartition("/")[2] or delta["post"]) for delta in deltas)
    return f"What post-training changed: {', '.join(names)}"


def _section(name: str, title: str, content: str) -> str:
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{content}</section>'


def _warnings(warnings: Iterable[Row]) -> str:
    items = "".join(
        f"<li>{escape(printable(warning['message']))} <code>{escape(printable(warning['code']))}</code></li>\n"
        for warning in warnings
    )
    return _section("warnings", "Warnings", f"<ul>\n{items}</ul>\n") if items else ""


def _compared(deltas: Iterable[Row]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{place}</th>'
        + "".join(f'<td class="path">{escape(printable(delta[role]))}</td>' for role in ("post", "base", "new_base"))
        + f'<td class="number">{delta["alpha"]:g}</td></tr>\n'
        for place, delta in enumerate(deltas, 1)
    )
    head = "".join(f'<th scope="col">{label}</th>' for label in ("delta", "post", "base", "new base"))
    return _section(
        "compared",
        "What was compared",
        "<p>A delta Δ is what post-training changed, post − base. The shift is what the base has become since,"
        " new base − base. A merge adds alpha · Δ to the new base.</p>\n"
        f'<div class="wide"><table>\n<thead><tr>{head}<th scope="col" class="number">alpha</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n",
    )


def _totals(deltas: list[Row]) -> str:
    tables = "".join(_totals_table(deltas, first) for first in range(0, len(deltas), _BESIDE_EACH_OTHER))
    counts = " or ".join(f"{count:,}" for count in dict.fromkeys(delta["total"]["tensors"] for delta in deltas))
    return _section(
        "totals",
        "Totals",
        f"<p>All {counts} tensors together as one vector, and beside it the mean over tensors, in which small ones"
        f" count as much as large ones.</p>\n{tables}",
    )


def _totals_table(deltas: list[Row], first: int) -> str:
    """Return a table of a few deltas, from the first on: more do not fit beside each other on paper."""
    shown = deltas[first : first + _BESIDE_EACH_OTHER]
    heads = "".join(
        f'<th scope="col" class="number">{f"delta {place}" if len(deltas) > 1 else "all tensors"}</th>'
        '<th scope="col" class="number quiet">mean over tensors</th>'
        for place in range(first + 1, first + 1 + len(shown))
    )
    rows = "".join(
        f'<tr><th scope="row">{quantity.label}</th><td class="quiet meaning">{quantity.meaning}</td>'
        + "".join(
            f'<td class="number">{quantity.shown(delta["total"][quantity.field])}</td>'
            f'<td class="number quiet">{_mean(delta["total"]["mean"], quantity)}</td>'
            for delta in shown
        )
        + "</tr>\n"
        for quantity in QUANTITIES
        if quantity.field not in EXCEPTIONS or any(delta["total"][quantity.field] for delta in deltas)
    )
    return (
        '<div class="wide"><table>\n<thead><tr><th scope="col">quantity</th><th scope="col">meaning</th>'
        f"{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _mean(mean: Row, quantity: Quantity) -> str:
    return quantity.shown(mean[quantity.field]) if quantity.field in mean else ""


def _delta_figures(analysis: Analysis, place: int, drawn: Iterable[Plot]) -> str:
    several = len(analysis["deltas"]) > 1
    return _figures(
        f"delta-{place + 1}",
        f"Delta {place + 1}: {escape(_title([analysis['deltas'][place]]).partition(': ')[2])}" if several else "Plots",
        [plot for plot in drawn if plot.delta == place],
    )


def _figures(name: str, title: str, drawn: Iterable[Plot]) -> str:
    content = "".join(
        f"<figure>\n<h3>{plot.title}</h3>\n"
        f'<div class="wide">{themed(plot.svg())}</div>\n<figcaption>{plot.caption}</figcaption>\n</figure>\n'
        for plot in drawn
    )
    return _section(name, title, content) if content else ""


def _tensors(analysis: Analysis) -> str:
    found = columns(analysis)
    rows = len(found[0].cells)
    shown = min(rows, MOST_ROWS)
    head = "".join(
        f'<th scope="col" title="{escape(column.meaning)}"{_class(column)}>{escape(column.label)}</th>'
        for column in found
    )
    body = "".join(f"<tr>{_cells(found, place)}</tr>\n" for place in range(shown))
    said = f"The first {shown:,} of {rows:,} rows" if shown < rows else f"{rows:,} rows"
    several = len(analysis["deltas"]) > 1
    return _section(
        "tensors",
        "Tensors",
        '<div id="controls" hidden><label>Filter by name <input type="search" id="filter" spellcheck="false"'
        ' autocomplete="off" placeholder="layers.3. q_proj"></label></div>\n'
        f'<p id="shown" role="status">{said}{", one for each tensor of each delta" if several else ""}.</p>\n'
        '<div class="wide tall" role="region" aria-labelledby="tensors-title" tabindex="0">'
        f'<table id="table" data-most="{MOST_ROWS}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
        f'<script type="application/json" id="data">{_data(found, shown)}</script>\n',
    )


def _class(column: Column) -> str:
    return ' class="number"' if column.is_number else ""


def _cells(found: list[Column], place: int) -> str:
    first, *others = found
    cells = "".join(f"<td{_class(column)}>{escape(column.cells[place])}</td>" for column in others)
    return f'<th scope="row">{escape(first.cells[place])}</th>{cells}'


def _data(found: list[Column], shown: int) -> str:
    """Return what the script needs beside the rows that are there: the others' cells, and each column's order."""
    orders = [column.order() for column in found]
    rest = [column.cells[shown:] for column in found]
    data = {"rest": rest, "orders": [order for order, _ in orders], "said": [said for _, said in orders]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
