"""What the experiment found, read from `results/`: lines by scenario, role and seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Line:
    """What was found of one checkpoint."""

    scenario: str
    role: str
    seed: int
    alpha: float | None
    found: dict[str, Any]

    def score(self, skill: str) -> float:
        """Return the share of right answers, in per cent."""
        each = self.found["skills"][skill]
        return 100 * float(each["right"]) / float(each["items"])

    def mean(self, skills: list[str]) -> float:
        """Return the mean over skills."""
        return sum(map(self.score, skills)) / len(skills)

    @property
    def perplexity(self) -> float:
        """Return the perplexity of the domain's held-out text."""
        return float(self.found["perplexity"])

    @property
    def geometry(self) -> dict[str, Any]:
        """Return norms and angles: ``total``, one for each delta, and ``layers`` of the first."""
        return dict(self.found["geometry"])


@dataclass(frozen=True)
class Results:
    """All lines, and what they were made with."""

    lines: tuple[Line, ...]
    settings: dict[str, Any]

    @property
    def skills(self) -> list[str]:
        """Return the names of all skills."""
        return list(self.settings["sizes"]["skills"])

    def find(self, scenario: str, role: str, alpha: float | None = None) -> dict[int, Line]:
        """Return lines by seed."""
        wanted = (scenario, role, alpha)
        return {line.seed: line for line in self.lines if (line.scenario, line.role, line.alpha) == wanted}

    def alphas(self, scenario: str) -> list[float]:
        """Return the coefficients that there are lines of."""
        return sorted({line.alpha for line in self.lines if line.scenario == scenario and line.alpha is not None})


def read_results(directory: Path = RESULTS) -> Results:
    """Read what there is."""
    lines = [
        Line(line["scenario"], line["role"], line["seed"], line.get("alpha"), line)
        for path in sorted(directory.glob("seed-*.json"))
        for line in json.loads(path.read_text(encoding="utf-8"))
    ]
    return Results(tuple(lines), json.loads((directory / "settings.json").read_text(encoding="utf-8")))
