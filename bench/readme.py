"""Writes the figures between the markers in the project's README from `results.json`: ``python -m bench.readme``."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- figures: written by bench/readme.py -->", "<!-- end of figures -->"
NAMES = {"paramdelta": "**paramdelta**", "mergekit": "mergekit, `linear`, bf16", "torch": "a torch script"}


def render(results: dict[str, Any]) -> str:
    """Return the table: whole-process seconds, how many times paramdelta's, and the most RAM held."""
    lines = [
        "| | warm | cold | peak RAM |",
        "|:--|--:|--:|--:|",
        *(_row(results, name) for name in NAMES),
        _floor_row(results),
    ]
    size = results["triple"]["tensor_bytes"] / 1e9
    machine = results["machine"]
    versions = results["versions"]["peers"]
    return "\n".join(
        [
            *lines,
            "",
            f"Llama-3.2-1B shapes, 3 × {size:.2f} GB read, {size:.2f} GB written and synced; whole processes, medians"
            f" of {results['rounds']} interleaved rounds, inputs in the page cache (warm) or not (cold), on"
            f" {machine['cores']} cores with {machine['RAM']} ({machine['CPU']}, {machine['kernel']},"
            f" {machine['filesystem']}). Peers: {versions}."
            " More in [bench/RESULTS.md](bench/RESULTS.md), written by `make bench`.",
        ]
    )


def _row(results: dict[str, Any], name: str) -> str:
    cells = [_times(results, name, mode) for mode in ("warm", "cold")]
    peak = max(run["peak_rss_bytes"] for run in results["runs"] if run["contender"] == name)
    return f"| {NAMES[name]} | {cells[0]} | {cells[1]} | {peak / 1e9:.2f} GB |"


def _times(results: dict[str, Any], name: str, mode: str) -> str:
    theirs, ours = _seconds(results, name, mode), _seconds(results, "paramdelta", mode)
    if name == "paramdelta":
        return f"**{median(ours.values()):.1f} s**"
    ratio = median(theirs[number] / ours[number] for number in theirs.keys() & ours.keys())
    return f"{median(theirs.values()):.1f} s ({ratio:.1f} ×)"


def _seconds(results: dict[str, Any], name: str, mode: str) -> dict[int, float]:
    return {
        run["round"]: run["wall_seconds"] for run in results["runs"] if (run["contender"], run["mode"]) == (name, mode)
    }


def _floor_row(results: dict[str, Any]) -> str:
    floors = {floor["round"]: floor["seconds"] for floor in results["floors"] if floor["mode"] == "cold"}
    ours = _seconds(results, "paramdelta", "cold")
    ratio = median(floors[number] / ours[number] for number in floors.keys() & ours.keys())
    return (
        f"| *the disk alone: the same bytes, nothing computed* | | {median(floors.values()):.1f} s ({ratio:.2f} ×) | |"
    )


def updated(text: str, results: dict[str, Any]) -> str:
    """Return the README with its figures written anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{render(results)}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(
        updated(README.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8"
    )
