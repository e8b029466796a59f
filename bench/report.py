"""What a benchmark found, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.contenders import REFERENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contenders import Contender
    from bench.floor import Floor
    from bench.measure import Measurement
    from bench.triple import TripleSpec

FILES_MOVED = 4  # three checkpoints read, one written
FLOOR_ROWS = {"warm": "the disk alone: 1 direct write", "cold": "the disk alone: 3 direct reads and 1 direct write"}
INTRODUCTIONS = {
    "warm": "Inputs in the page cache.",
    "cold": "Page cache dropped before each run. (A virtual disk's host may still cache.)",
}


@dataclass(frozen=True)
class Run:
    """One timed run."""

    contender: str
    mode: str
    round: int
    result: Measurement


@dataclass(frozen=True)
class FloorRun:
    """One timing of the disk alone."""

    mode: str
    round: int
    floor: Floor


@dataclass(frozen=True)
class Agreement:
    """How many elements of a contender's output differ from paramdelta's."""

    contender: str
    different: int
    total: int


@dataclass(frozen=True)
class Failure:
    """A contender that did not make it."""

    contender: str
    exit_code: int
    last_words: str


@dataclass(frozen=True)
class Results:
    """Everything that was found."""

    spec: TripleSpec
    tensor_bytes: int
    rounds: int
    machine: dict[str, str]
    versions: dict[str, str]
    contenders: list[Contender]
    runs: list[Run]
    floors: list[FloorRun]
    agreements: list[Agreement]
    failures: list[Failure]
    notes: list[str]

    def modes(self) -> list[str]:
        """Return the modes that were run, in order."""
        return list(dict.fromkeys(run.mode for run in self.runs))

    def by_round(self, contender: str, mode: str) -> dict[int, Measurement]:
        """Return a contender's runs in one mode."""
        return {run.round: run.result for run in self.runs if (run.contender, run.mode) == (contender, mode)}

    def floor_by_round(self, mode: str) -> dict[int, Floor]:
        """Return the disk's runs in one mode."""
        return {run.round: run.floor for run in self.floors if run.mode == mode}

    def over_budget(self) -> list[str]:
        """Return the contenders that held more RAM than their budget allows."""
        budgets = {contender.name: contender.budget_bytes for contender in self.contenders}
        broken = [run for run in self.runs if run.result.peak_rss_bytes > (budgets.get(run.contender) or 2**63)]
        return sorted({run.contender for run in broken})

    def to_json(self) -> str:
        """Return the numbers, without what the contenders printed."""
        content: dict[str, Any] = {
            "triple": {**asdict(self.spec), "tensor_bytes": self.tensor_bytes},
            "rounds": self.rounds,
            "machine": self.machine,
            "versions": self.versions,
            "runs": [run_to_dict(run) for run in self.runs],
            "floors": [
                {"mode": run.mode, "round": run.round, "method": str(run.floor.method), "seconds": run.floor.seconds}
                for run in self.floors
            ],
            "agreements": [asdict(agreement) for agreement in self.agreements],
            "failures": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
        }
        return json.dumps(content, indent=1) + "\n"


def run_to_dict(run: Run) -> dict[str, Any]:
    """Describe a run as JSON, with the choices that paramdelta reports of itself."""
    result = {name: value for name, value in asdict(run.result).items() if name not in ("stdout", "stderr")}
    return {"contender": run.contender, "mode": run.mode, "round": run.round, **result, **choices(run.result)}


def choices(result: Measurement) -> dict[str, Any]:
    """Return how paramdelta chose to run, from its JSON report; nothing for the others."""
    try:
        report = json.loads(result.stdout)
    except ValueError:
        return {}
    if not isinstance(report, dict):
        return {}
    return {name: report[name] for name in ("io", "workers", "window_bytes", "peak_rss_bytes") if name in report}


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
        return [contender.name, "failed", *[""] * 8]
    wall = walls(runs)
    moved = FILES_MOVED * results.tensor_bytes
    chosen = choices(next(iter(runs.values())))
    return [
        contender.name,
        *times(list(wall.values())),
        ratio(wall, walls(results.by_round(REFERENCE, mode))),
        ratio(wall, floor),
        f"{moved / median(wall.values()) / 1e9:.2f}",
        f"{median(run.cpu_seconds for run in runs.values()):.1f}",
        format_peak(max(run.peak_rss_bytes for run in runs.values()), contender.budget_bytes),
        f"{contender.budget_bytes / 1e6:,.0f}" if contender.budget_bytes else "",
        f"{chosen['io']}, {chosen['workers']} workers" if {"io", "workers"} <= chosen.keys() else "",
    ]


def mode_section(results: Results, mode: str) -> str:
    """Format the table of one mode."""
    floors = results.floor_by_round(mode)
    floor = {number: each.seconds for number, each in floors.items()}
    rows = [contender_row(results, contender, mode, floor) for contender in results.contenders]
    if floors:
        speed = median(each.gigabytes_per_second for each in floors.values())
        reference = walls(results.by_round(REFERENCE, mode))
        rows.append(
            [FLOOR_ROWS[mode], *times(list(floor.values())), ratio(floor, reference), "1.00", f"{speed:.2f}", *[""] * 4]
        )
    header = [
        "",
        "s, median",
        "s, range",
        "/ paramdelta",
        "/ disk",
        "GB/s",
        "CPU s",
        "peak RSS, MB",
        "budget, MB",
        "ran as",
    ]
    return f"## {mode.capitalize()}\n\n{INTRODUCTIONS[mode]}\n\n{table(header, rows)}"


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
        "Whole processes, from start until the output is synced. [README.md](README.md) explains the columns.\n",
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
