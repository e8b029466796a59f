"""What a benchmark found, as Markdown."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from bench.contenders import REFERENCE
from bench.results import choices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contenders import Contender
    from bench.floor import Floor
    from bench.measure import Measurement
    from bench.results import Results, Run

FLOOR_ROWS = {"warm": "the disk alone: 1 write", "cold": "the disk alone: 3 reads and 1 write"}
INTRODUCTIONS = {
    "warm": "Inputs in the page cache.",
    "cold": "Page cache dropped before each run. (A virtual disk's host may still cache.)",
}
TIME_COLUMNS = ["", "s, median", "s, range", "/ paramdelta", "/ disk", "GB/s", "peak RSS, MB", "budget, MB", "ran as"]
MACHINE_COLUMNS = [
    "",
    "CPU s",
    "major faults",
    "read from the device, GB",
    "waiting to be written, at most, MB",
    "page cache grew by, MB",
    "hot file left in it",
]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; columns but the first are right-aligned."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"


def times(seconds: Sequence[float]) -> list[str]:
    """Format median and range."""
    return [f"{median(seconds):.2f}", f"{min(seconds):.2f} - {max(seconds):.2f}"]


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Format the median over the rounds of ours / theirs: what changes from round to round hits both."""
    shared = ours.keys() & theirs.keys()
    return f"{median(ours[each] / theirs[each] for each in shared):.2f}" if shared else ""


def walls(results: dict[int, Measurement]) -> dict[int, float]:
    """Return the wall times by round."""
    return {number: result.wall_seconds for number, result in results.items()}


def format_peak(peak: int, budget: int | None) -> str:
    """Format a peak in MB, and say so where it breaks a promised budget."""
    over = budget is not None and peak > budget
    return f"{peak / 1e6:,.0f}{' **over budget**' if over else ''}"


def contender_row(results: Results, contender: Contender, mode: str, floor: dict[int, float]) -> list[str]:
    """Format one contender's row."""
    runs = results.by_round(contender.name, mode)
    if not runs:
        return [contender.name, "failed", *[""] * (len(TIME_COLUMNS) - 2)]
    wall = walls(runs)
    moved = contender.files_moved * results.tensor_bytes
    chosen = choices(next(iter(runs.values())))
    return [
        contender.name,
        *times(list(wall.values())),
        ratio(wall, walls(results.by_round(REFERENCE, mode))),
        ratio(wall, floor) if contender.merges else "",
        f"{moved / median(wall.values()) / 1e9:.2f}",
        format_peak(max(run.peak_rss_bytes for run in runs.values()), contender.budget_bytes),
        f"{contender.budget_bytes / 1e6:,.0f}" if contender.budget_bytes else "",
        f"{chosen['io']}, {chosen['workers']} workers" if {"io", "workers"} <= chosen.keys() else "",
    ]


def floor_row(name: str, runs: dict[int, Floor], best: dict[int, float], reference: dict[int, float]) -> list[str]:
    """Format the row of the disk alone, or of one of the methods that were tried."""
    seconds = {number: each.seconds for number, each in runs.items()}
    speed = median(each.gigabytes_per_second for each in runs.values())
    cells = [name, *times(list(seconds.values())), ratio(seconds, reference), ratio(seconds, best), f"{speed:.2f}"]
    return [*cells, *[""] * (len(TIME_COLUMNS) - len(cells))]


def floor_rows(results: Results, mode: str) -> list[list[str]]:
    """Format the disk's best of each round, then every method for itself."""
    floors = results.floor_by_round(mode)
    if not floors:
        return []
    best = {number: each.seconds for number, each in floors.items()}
    reference = walls(results.by_round(REFERENCE, mode))
    methods = results.floors_by_method(mode)
    rows = [floor_row(f"*{method}*", runs, best, reference) for method, runs in methods.items()]
    return [floor_row(FLOOR_ROWS[mode], floors, best, reference), *(rows if len(rows) > 1 else [])]


def machine_row(name: str, runs: Sequence[Run]) -> list[str]:
    """Format what one contender took from the machine: medians, and the largest backlog of writes."""
    results = [run.result for run in runs]
    fetched = [result.device_read_bytes for result in results if result.device_read_bytes is not None]
    left = [run.bystander_share for run in runs if run.bystander_share is not None]
    return [
        name,
        f"{median(result.cpu_seconds for result in results):.1f}",
        f"{median(result.major_faults for result in results):,.0f}",
        f"{median(fetched) / 1e9:.2f}" if fetched else "",
        f"{max(result.dirty_peak_bytes for result in results) / 1e6:,.0f}",
        f"{median(result.cached_growth_bytes for result in results) / 1e6:,.0f}",
        f"{median(left):.0%}" if left else "",
    ]


def mode_section(results: Results, mode: str) -> str:
    """Format the tables of one mode: time, and what it takes from the machine."""
    floor = {number: each.seconds for number, each in results.floor_by_round(mode).items()}
    rows = [contender_row(results, contender, mode, floor) for contender in results.contenders]
    taken = [machine_row(each.name, runs) for each in results.contenders if (runs := results.of(each.name, mode))]
    return "\n".join(
        [
            f"## {mode.capitalize()}\n",
            f"{INTRODUCTIONS[mode]}\n",
            table(TIME_COLUMNS, [*rows, *floor_rows(results, mode)]),
            f"### What it takes from the machine, {mode}\n",
            table(MACHINE_COLUMNS, taken),
        ]
    )


def agreement_section(results: Results) -> str:
    """Say whether the outputs are the same."""
    rows = [
        [each.contender, f"{each.different:,}", f"{100 * each.different / each.total:.4f} %"]
        for each in results.agreements
    ]
    header = ["", "elements that differ from paramdelta's", "share"]
    return f"## Agreement\n\nBits of every output element, compared once.\n\n{table(header, rows)}"


def failure_section(results: Results) -> str:
    """Say what failed, and its last words."""
    parts = [
        f"{each.contender} exited with {each.exit_code}:\n\n```\n{each.last_words}\n```\n" for each in results.failures
    ]
    return "## Failures\n\n" + "\n".join(parts)


def setting_section(results: Results) -> str:
    """List triple, machine, versions, contenders."""
    rows = [[name, value] for name, value in results.machine.items()]
    rows += [[f"{name} ran with", value] for name, value in results.versions.items()]
    cold = results.floor_by_round("cold").values()
    if cold:
        best = max(cold, key=lambda each: each.gigabytes_per_second)
        rows.append(
            ["disk, best seen", f"{best.gigabytes_per_second:.2f} GB/s, reads and writes together ({best.method})"]
        )
    triple = (
        f"Triple `{results.spec.model}`: 3 x {results.tensor_bytes:,} bytes of bf16 tensors, {results.spec.shards} "
        f"file(s) per checkpoint; {results.rounds} round(s).\n"
    )
    commands = "\n".join(f"- **{each.name}**: {each.about}" for each in results.contenders)
    return f"{triple}\n{table(['', ''], rows)}\n{commands}\n"


def render(results: Results) -> str:
    """Format the whole page."""
    parts = [
        "<!-- Written by `python -m bench.run`; do not edit. -->\n",
        "# Benchmark results\n",
        "Whole processes, from start until the output is synced. [README.md](README.md) explains the columns.\n"
        "One setting, or one state of the page cache, at a time: [CURVES.md](CURVES.md).\n",
        setting_section(results),
        *(mode_section(results, mode) for mode in results.modes()),
    ]
    if results.agreements:
        parts.append(agreement_section(results))
    if results.failures:
        parts.append(failure_section(results))
    if results.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in results.notes) + "\n")
    return "\n".join(parts)
