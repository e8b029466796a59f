"""How a merge scores, as people and scripts read it; and a table of scores that is piped in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from paramdelta.checkpoint.files import unreadable
from paramdelta.checkpoint.wording import clipped
from paramdelta.cli.display import console, plain, show_warning
from paramdelta.errors import RecipeError
from paramdelta.insight.bootstrap import CONFIDENCE, FEWEST, RESAMPLES, SEED
from paramdelta.insight.score_table import MOST_BYTES, Table, parse_table
from paramdelta.insight.scores import recovered

if TYPE_CHECKING:
    from paramdelta.insight.bootstrap import Estimate
    from paramdelta.insight.scores import Transfer, TransferReport

_PIPE = "standard input"


def piped() -> Table:
    """Return the table of scores on standard input.

    Raises:
        CheckpointError: it cannot be read.
        RecipeError: it does not parse; the message names the line.
    """
    try:
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    except OSError as error:
        raise unreadable(_PIPE, error) from error
    if len(data) > MOST_BYTES:
        raise RecipeError(f"is more than {MOST_BYTES} bytes, which is no table of scores", file=_PIPE)
    return parse_table(data, _PIPE)


def show_report(report: TransferReport) -> None:
    """Print how a merge scores; warnings go to standard error."""
    from rich.table import Table as Columns

    table = Columns(box=None, pad_edge=False)
    if report.groups:
        table.add_column("group")
    for column in ("transfer efficiency", "value", f"{CONFIDENCE:.0%} interval"):
        table.add_column(column, justify="left" if column == "transfer efficiency" else "right")
    for group, transfer in (*report.groups.items(), ("all", report.overall)):
        for place, row in enumerate(_rows(transfer)):
            named = [plain(clipped(group)) if not place else ""] if report.groups else []
            table.add_row(*named, *row)
    screen = console()
    screen.print(table)
    number = report.overall.benchmarks
    units = f"{number} benchmark{'s' if number > 1 else ''}"
    said = f"intervals by resampling them, {RESAMPLES:,} times"
    screen.print(f"{units}; {said if number >= FEWEST else f'intervals need {FEWEST}'}", highlight=False)
    for warning in report.warnings:
        show_warning(warning)


def _rows(transfer: Transfer) -> list[tuple[str, str, str]]:
    """Return what is said of scores that belong together: what, how much, between which bounds."""
    return [
        ("slope of merged over reference", *_cells(transfer.slope)),
        ("  its R²", _number(transfer.r_squared), ""),
        ("slope beside an intercept", *_cells(transfer.slope_with_intercept)),
        ("  the intercept, in points", _number(transfer.intercept), ""),
        ("  its R²", _number(transfer.r_squared_with_intercept), ""),
        ("recovered, mean over benchmarks", *_cells(transfer.recovered)),
        ("recovered, of all gains together", *_cells(transfer.recovered_of_sums)),
    ]


def _cells(estimate: Estimate) -> tuple[str, str]:
    if estimate.low is None or estimate.high is None:
        return _number(estimate.value), "none"
    return _number(estimate.value), f"{_number(estimate.low)} to {_number(estimate.high)}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:z.3f}"


def report_json(report: TransferReport, plot: str | None) -> dict[str, Any]:
    """Return how a merge scores as scripts read it."""
    return {
        "file": report.file,
        "overall": _transfer_json(report.overall),
        "groups": {group: _transfer_json(transfer) for group, transfer in report.groups.items()},
        "scores": [
            {
                "benchmark": each.benchmark,
                "group": each.group or None,
                "new_base": each.new_base,
                "merged": each.merged,
                "reference": each.reference,
                "seeds": each.seeds,
                "recovered": recovered(each, report.min_gain),
            }
            for each in report.scores
        ],
        "min_gain": report.min_gain,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "plot": plot,
        "warnings": [warning._asdict() for warning in report.warnings],
    }


def _transfer_json(transfer: Transfer) -> dict[str, Any]:
    return {
        "benchmarks": transfer.benchmarks,
        "slope": transfer.slope._asdict(),
        "r_squared": transfer.r_squared,
        "slope_with_intercept": transfer.slope_with_intercept._asdict(),
        "intercept": transfer.intercept,
        "r_squared_with_intercept": transfer.r_squared_with_intercept,
        "recovered": transfer.recovered._asdict(),
        "recovered_of_sums": transfer.recovered_of_sums._asdict(),
        "left_out": [each.benchmark for each in transfer.left_out],
    }
