"""What a benchmark found, and how it is kept as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.contenders import Contender
    from bench.floor import Floor, Method
    from bench.measure import Measurement
    from bench.triple import TripleSpec


@dataclass(frozen=True)
class Run:
    """One timed run."""

    contender: str
    mode: str
    round: int
    result: Measurement
    bystander_share: float | None = None  # of a hot file of others: still in the page cache afterwards


@dataclass(frozen=True)
class FloorRun:
    """One timing of the disk alone, by one method."""

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

    def of(self, contender: str, mode: str) -> list[Run]:
        """Return a contender's runs in one mode."""
        return [run for run in self.runs if (run.contender, run.mode) == (contender, mode)]

    def by_round(self, contender: str, mode: str) -> dict[int, Measurement]:
        """Return what a contender's runs in one mode cost."""
        return {run.round: run.result for run in self.of(contender, mode)}

    def floor_by_round(self, mode: str) -> dict[int, Floor]:
        """Return the disk's best of each round in one mode."""
        best: dict[int, Floor] = {}
        for run in self.floors:
            if run.mode == mode and (run.round not in best or run.floor.seconds < best[run.round].seconds):
                best[run.round] = run.floor
        return best

    def floors_by_method(self, mode: str) -> dict[Method, dict[int, Floor]]:
        """Return every way of moving the bytes that was timed in one mode, by round."""
        found: dict[Method, dict[int, Floor]] = {}
        for run in self.floors:
            if run.mode == mode:
                found.setdefault(run.floor.method, {})[run.round] = run.floor
        return found

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
    about = {"contender": run.contender, "mode": run.mode, "round": run.round, "bystander_share": run.bystander_share}
    return {**about, **result, **choices(run.result)}


def choices(result: Measurement) -> dict[str, Any]:
    """Return how paramdelta chose to run, from its JSON report; nothing for the others."""
    try:
        report = json.loads(result.stdout)
    except ValueError:
        return {}
    if not isinstance(report, dict):
        return {}
    return {name: report[name] for name in ("io", "workers", "window_bytes") if name in report}
