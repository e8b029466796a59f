"""Runs the experiment: ``python -m examples.transfer.experiment [--quick] [--dir DIR]``.

What is done already is not done again: interrupt it at any time, start it again, and it goes on with the stage that it
was in. Each score is written to `results/` as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.transfer import corpus
from examples.transfer.actions import ACTIONS, RESULT
from examples.transfer.plan import Plan, Sizes, Training
from examples.transfer.stages import Workshop

if TYPE_CHECKING:
    from examples.transfer.plan import Entry

RESULTS = Path(__file__).with_name("results")
FULL = Sizes(
    seeds=(1, 2, 3),
    skills=("record", "tool", "titles", "sort", "chain", "days", "reverse"),
    one="reverse",
    small=Training(steps=30, batch=8, rate=1e-4),
    large=Training(steps=50, batch=8, rate=3e-4),
    all_skills=Training(steps=70, batch=16, rate=1e-4),
    one_skill=Training(steps=30, batch=16, rate=1e-4),
    items=100,
    blocks=64,
    alphas=(0.25, 0.5, 0.75, 1.25, 1.5),
    pairs=(1.0, 0.5),
    mixes=((1.0, 0.25), (1.0, 0.5), (0.5, 1.0)),
)
QUICK = Sizes(
    seeds=(1,),
    skills=("record", "tool"),
    one="tool",
    small=Training(steps=30, batch=8, rate=1e-4),
    large=Training(steps=1, batch=1, rate=0.0),
    all_skills=Training(steps=40, batch=16, rate=1e-4),
    one_skill=Training(steps=1, batch=1, rate=0.0),
    items=50,
    blocks=32,
    scenarios=("general",),
)


def run(plan: Plan, workshop: Workshop, results: Path) -> None:
    """Do what is not done yet, and write down what comes of it."""
    entries = plan.entries()
    for number, entry in enumerate(entries):
        workshop.tidy(each.stage for each in entries)
        for stage in workshop.todo(entry.stage):
            begin = time.monotonic()
            workshop.do(stage)
            say(f"[{number + 1}/{len(entries)}] {stage.name}: {time.monotonic() - begin:.0f} s")
        note(entry, workshop, results)
    workshop.tidy(each.stage for each in entries)


def note(entry: Entry, workshop: Workshop, results: Path) -> None:
    """Put one line of the results into its seed's file."""
    path = results / f"seed-{entry.seed}.json"
    lines: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = json.loads((workshop.place(entry.stage) / RESULT).read_text(encoding="utf-8"))
    named = {"scenario": entry.scenario, "role": entry.role, "seed": entry.seed, **entry.about}
    lines = [line for line in lines if any(line.get(key) != value for key, value in named.items())]
    store(path, [*lines, {**named, "key": entry.stage.key, **found}])


def store(path: Path, found: Any) -> None:
    """Write JSON, whole or not at all: one line of the results a line."""
    unfinished = path.with_suffix(".part")
    lines = ",\n".join(json.dumps(each) for each in found) if isinstance(found, list) else ""
    unfinished.write_text(f"[\n{lines}\n]\n" if lines else json.dumps(found, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def settings(sizes: Sizes) -> dict[str, Any]:
    """Return what the results were made with."""
    return {
        "sizes": asdict(sizes),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "threads": torch.get_num_threads()},
        "versions": {"Python": platform.python_version(), "torch": torch.__version__},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def shortcomings(results: Path) -> list[str]:
    """Return what the quick run does not show of what it should."""
    lines = json.loads((results / "seed-1.json").read_text(encoding="utf-8"))
    found = {line["role"]: line for line in lines}
    right = {
        role: sum(each["right"] for each in found[role]["skills"].values()) for role in ("new base", "merged", "post")
    }
    perplexity = {role: found[role]["perplexity"] for role in ("base", "new base", "post", "merged")}
    decoded = found["decoded"]
    say(f"right answers: {right}; perplexity: {perplexity}; decoded as scored: {decoded['same']}/{decoded['items']}")
    gain = perplexity["base"] - perplexity["new base"]
    kept = perplexity["post"] - perplexity["merged"]  # post-training costs some by itself, update or not
    checks = {
        "post-training taught nothing": right["post"] > right["new base"] + QUICK.items // 2,
        "the merge does not have most of what post-training taught": right["merged"] - right["new base"]
        > (right["post"] - right["new base"]) / 2,
        "the update of the base taught nothing": gain > 0,
        "the merge lost half of what the update taught": kept > gain / 2,
        "answers that are decoded are not as they are scored": decoded["same"] >= 0.9 * decoded["items"],
    }
    return [problem for problem, holds in checks.items() if not holds]


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="ParamΔ in miniature, on SmolLM2-135M.")
    parser.add_argument("--quick", action="store_true", help="five minutes: two skills, one seed; fails if it fails")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-transfer"))
    parser.add_argument("--seeds", type=int, nargs="+", help="of the full one, these alone: results are kept by seed")
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    results = given.dir / "quick" if given.quick else RESULTS
    results.mkdir(parents=True, exist_ok=True)
    store(results / "settings.json", settings(sizes))
    plan = Plan(replace(sizes, seeds=tuple(given.seeds)) if given.seeds else sizes, corpus.digest())
    workshop = Workshop(given.dir / ("quick-stages" if given.quick else "stages"), ACTIONS)
    workshop.directory.mkdir(parents=True, exist_ok=True)
    run(plan, workshop, results)
    if given.quick:
        problems = shortcomings(results)
        for problem in problems:
            say(f"FAILED: {problem}")
        raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
