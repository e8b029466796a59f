"""Has paramdelta become slower? `python -m bench.check` compares a few ratios with those in `check.json`.

Ratios within a run depend less on the machine than seconds do, but they do: what is expected is wide, and falling short
is told, not failed, unless --strict is given.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.contenders import REFERENCE, Tools, default_tools
from bench.report import table, walls
from bench.run import MODES, ROOT, Options, run, say
from bench.triple import MODELS

if TYPE_CHECKING:
    from bench.results import Results

EXPECTED = Path(__file__).with_name("check.json")
PEER = "torch"


@dataclass(frozen=True)
class Check:
    """One ratio, how many times as long as paramdelta the other one took: more is better."""

    name: str
    measured: float | None
    expected: float | None
    tolerance: float

    @property
    def least(self) -> float | None:
        """Return what is still good enough."""
        return None if self.expected is None else self.expected * self.tolerance

    @property
    def verdict(self) -> str:
        """Say how it compares."""
        if self.measured is None:
            return "not measured"
        if self.least is None:
            return "nothing to compare with"
        return "ok" if self.measured >= self.least else "**falls short**"

    def row(self) -> list[str]:
        """Format the ratio as the row of a table."""
        return [self.name, *map(figure, (self.measured, self.expected, self.least)), self.verdict]


def figure(value: float | None) -> str:
    """Format a ratio, nothing where there is none."""
    return "" if value is None else f"{value:.2f}"


def ratios(results: Results) -> dict[str, float]:
    """Return the medians over the rounds of what the torch script and the disk took, divided by paramdelta's time."""
    found = {}
    for mode in MODES:
        ours = walls(results.by_round(REFERENCE, mode))
        floor = {number: each.seconds for number, each in results.floor_by_round(mode).items()}
        for name, theirs in (("torch script", walls(results.by_round(PEER, mode))), ("disk alone", floor)):
            shared = ours.keys() & theirs.keys()
            if shared:
                found[f"{name}, {mode}"] = median(theirs[number] / ours[number] for number in shared)
    return found


def compare(measured: dict[str, float], expected: dict[str, float], tolerance: float) -> list[Check]:
    """Put every ratio that is expected or measured beside its counterpart."""
    names = dict.fromkeys([*expected, *measured])
    return [Check(name, measured.get(name), expected.get(name), tolerance) for name in names]


def render(checks: list[Check]) -> str:
    """Format all ratios."""
    return table(["time / paramdelta's", "measured", "expected", "at least", ""], [check.row() for check in checks])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    tools = default_tools(ROOT)
    parser = argparse.ArgumentParser(description="Compare ratios on a small triple with those of check.json.")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a ratio falls short or is missing")
    parser.add_argument("--record", action="store_true", help="write what is measured to check.json")
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--paramdelta", type=Path, default=tools.paramdelta, help="the paramdelta program")
    parser.add_argument("--peers", type=Path, default=tools.peers, help="bin directory of the peers' environment")
    return parser.parse_args()


def main() -> None:
    """Measure, compare, and print."""
    given = parse_arguments()
    results = run(
        Options(
            model=given.model,
            shards=1,
            rounds=given.rounds,
            directory=given.dir.resolve(),
            modes=MODES,
            only=(REFERENCE, PEER),
            tools=Tools(given.paramdelta, given.peers),
            out=Path(),
            clean=True,
        )
    )
    stored = json.loads(EXPECTED.read_text(encoding="utf-8"))
    measured = ratios(results)
    checks = compare(measured, stored["ratios"], stored["tolerance"])
    print(render(checks))
    for note in [*results.notes, *(f"{each.contender} failed: {each.last_words}" for each in results.failures)]:
        say(note)
    if given.record:
        stored["ratios"] |= {name: round(ratio, 2) for name, ratio in measured.items()}
        EXPECTED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    if given.strict and any(check.verdict != "ok" for check in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
