"""An analysis on a terminal of 80 columns: a line for every few layers, in it a number, a bar and a cosine a module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.wording import printable
from paramdelta.cli.display import show_warning
from paramdelta.insight.norms import ratio_of
from paramdelta.insight.notice import Notice
from paramdelta.insight.numbers import NOTHING, cosine, number, share
from paramdelta.insight.roles import MODULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    Analysis = Mapping[str, Any]
    Row = Mapping[str, Any]

_WIDTH: Final = 80
_MOST_LINES: Final = 16
_LABEL: Final = 9
_BESIDE_BAR: Final = 17  # columns of a number and a cosine, and what is between them
_LONGEST_BAR: Final = 12
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


class _Together(NamedTuple):
    """What groups of tensors come to together, None where one of them has nothing to say."""

    relative: float | None
    cosine: float | None


def show_analysis(analysis: Analysis, *, tensors: bool = False) -> None:
    """Print an analysis, compactly or with a line for each tensor, too; warnings go to standard error."""
    from rich.console import Console

    for warning in analysis["warnings"]:
        show_warning(Notice(warning["code"], warning["message"]))
    console = Console(width=_WIDTH, highlight=False)
    several = len(analysis["deltas"]) > 1
    for place, delta in enumerate(analysis["deltas"], 1):
        _show_delta(console, delta, f"delta {place}" if several else "delta")
    if tensors:
        _show_tensors(analysis["deltas"])
    _show_totals(console, analysis["deltas"])
    for pair in analysis["pairs"]:
        console.print(_pair_line(pair))


def _show_delta(console: Console, delta: Row, name: str) -> None:
    post, base, new_base = (printable(delta[role]) for role in ("post", "base", "new_base"))
    console.print(f"{name}: {post} - {base}", style="bold", markup=False, soft_wrap=True)
    console.print(f"for {new_base}, alpha {delta['alpha']:g}", markup=False, soft_wrap=True)
    console.print("change relative to the base, and its cosine to what the base has become\n")
    groups = delta["groups"]
    modules = [m for m in MODULES if any(g["module"] == m and g["layer"] is not None for g in groups)]
    ranges = _ranges(sorted({group["layer"] for group in groups if group["layer"] is not None}))
    lines = [
        (label, [_together([g for g in groups if g["layer"] in layers and g["module"] == m]) for m in modules])
        for label, layers in ranges
    ]
    outside = [
        (module, _together([group for group in groups if group["layer"] is None and group["module"] == module]))
        for module in MODULES
    ]
    outside = [(module, found) for module, found in outside if found is not None]
    everything = [*(found for _, row in lines for found in row), *(found for _, found in outside)]
    longest = max((found.relative or 0.0 for found in everything if found), default=0.0)
    if lines:
        _show_table(console, ("layer", modules), lines, longest)
    if outside:
        _show_table(console, ("no layer", ["relative"]), [(name, [found]) for name, found in outside], longest)


def _ranges(layers: Sequence[int]) -> list[tuple[str, set[int]]]:
    """Return layers in a few groups of neighbours, and what each is called."""
    size = max(1, math.ceil(len(layers) / _MOST_LINES))
    groups = [layers[first : first + size] for first in range(0, len(layers), size)]
    return [(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}", set(g)) for g in groups]


def _together(groups: Sequence[Row]) -> _Together | None:
    """Return what groups come to as one vector; None where there are none."""
    if not groups:
        return None
    delta, shift, base = (_norm(g[key] for g in groups) for key in ("delta_norm", "base_shift_norm", "base_norm"))
    products = [_product(group) for group in groups]
    size = (delta or 0.0) * (shift or 0.0)
    known = [product for product in products if product is not None]
    angle = math.fsum(known) / size if size and len(known) == len(products) else None
    return _Together(None if delta is None or base is None else ratio_of(delta, base), angle)


def _norm(norms: Iterable[float | None]) -> float | None:
    found = list(norms)
    known = [norm for norm in found if norm is not None]
    return math.hypot(*known) if len(known) == len(found) else None


def _product(group: Row) -> float | None:
    """Return the product of delta and shift; what has no direction adds nothing."""
    size = (group["delta_norm"] or 0.0) * (group["base_shift_norm"] or 0.0)
    if group["cosine"] is None:
        return None if size or group["delta_norm"] is None or group["base_shift_norm"] is None else 0.0
    return float(group["cosine"]) * size


def _show_table(
    console: Console,
    head: tuple[str, Sequence[str]],
    lines: Iterable[tuple[str, Sequence[_Together | None]]],
    longest: float,
) -> None:
    """Print a line for each label: relative change, as a number and as a bar, and cosine of delta and shift."""
    from rich.table import Table
    from rich.text import Text

    label, modules = head
    bar = min(_LONGEST_BAR, (_WIDTH + 1 - _LABEL - _BESIDE_BAR * len(modules)) // len(modules))
    fine = _can_show(console.encoding)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(label, min_width=_LABEL - 1, no_wrap=True)
    for module in modules:
        table.add_column(f" {module}", min_width=9 + bar, no_wrap=True)
        table.add_column("cosine", justify="right", min_width=6, no_wrap=True)
    for name, row in lines:
        cells = [Text(name)]
        for found in row:
            value = Text(f" {_plain(number(found.relative, 3)):8}" if found else "")
            value.append(_bar((found and found.relative) or 0.0, longest, bar, fine=fine), style="cyan")
            cells += [value, Text(_plain(cosine(found.cosine, 3)) if found else "")]
        table.add_row(*cells)
    console.print(table)
    console.print()


def _can_show(encoding: str) -> bool:
    try:
        _EIGHTHS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _bar(value: float, longest: float, width: int, *, fine: bool) -> str:
    """Return a bar, in eighths of a column where the terminal has these."""
    size = width * value / longest if longest else 0.0
    if not fine:
        return "#" * round(size)
    whole, eighths = divmod(round(8 * size), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def _show_tensors(deltas: Sequence[Row]) -> None:
    """Print plain columns: rich would take half a minute for 90,000 rows."""
    rows: list[tuple[str, ...]] = [("delta", "tensor", "relative", "norm", "largest", "changed", "cosine")]
    rows += [
        (
            str(place),
            printable(row["name"]),
            *(_plain(number(row[key])) for key in ("relative_delta", "delta_norm", "max_abs_delta")),
            _plain(share(row["changed_share"])),
            _plain(cosine(row["cosine"])),
        )
        for place, delta in enumerate(deltas, 1)
        for row in delta["tensors"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for place, name, *numbers in rows:
        columns = (text.rjust(width) for text, width in zip(numbers, widths[2:], strict=True))
        print("  ".join((place.rjust(widths[0]), name.ljust(widths[1]), *columns)))
    print()


def _show_totals(console: Console, deltas: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for label in ("delta", "elements", "relative", "norm", "largest", "changed", "base moved", "cosine"):
        table.add_column(label, justify="left" if label == "delta" else "right", no_wrap=True)
    for place, delta in enumerate(deltas, 1):
        total = delta["total"]
        cells = (
            number(total["elements"]),
            number(total["relative_delta"]),
            number(total["delta_norm"]),
            number(total["max_abs_delta"]),
            share(total["changed_share"]),
            number(total["base_shift_norm"]),
            cosine(total["cosine"]),
        )
        table.add_row(str(place), *map(_plain, cells))
    console.print(table)
    for place, delta in enumerate(deltas, 1):
        total = delta["total"]
        counts = (("left_out", "left out"), ("infinities", "infinite"), ("nans", "NaN"))
        said = [f"{total[key]:,} {label}" for key, label in counts if total[key]]
        if said:
            console.print(f"delta {place}, elements: {', '.join(said)}")


def _pair_line(pair: Row) -> str:
    names = f"deltas {pair['first'] + 1} and {pair['second'] + 1}"
    line = f"cosine of {names}: {_plain(cosine(pair['cosine']))}"
    known = [row for row in pair["layers"] if row["cosine"] is not None and row["layer"] is not None]
    if not known:
        return line
    if len({row["cosine"] for row in known}) == 1:
        return line
    low, high = (pick(known, key=lambda row: row["cosine"]) for pick in (min, max))
    ends = " to ".join(f"{cosine(row['cosine'])} (layer {row['layer']})" for row in (low, high))
    return f"{line}; by layer {ends}"


def _plain(text: str) -> str:
    """Return text that every terminal can show."""
    return text.replace(NOTHING, "-")
