"""Writes the figures between the markers in the project's README from `results.json`: ``python -m bench.readme``."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from bench.stored import floor_seconds, peak_bytes, seconds

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- figures: written by bench/readme.py -->", "<!-- end of figures -->"
NAMES = {
    "paramdelta": "**paramdelta**",
    "mergekit": "mergekit, `linear`, bf16",
    "mergekit-f32": "mergekit, `linear`, in f32",
    "sd-mecha": "sd-mecha, in f32",
    "torch": "a torch script",
    "cp": "*`cp` of one input: a third of the reads*",
}
CHART = "bench/charts/peers.svg"
ALTERNATIVE = "Seconds warm and cold, and peak RAM, of paramdelta and its peers"


def render(results: dict[str, Any]) -> str:
    """Return the table: whole-process seconds, how many times paramdelta's, and the most RAM held."""
    lines = [
        "| | warm | cold | peak RAM |",
        "|:--|--:|--:|--:|",
        *(_row(results, name) for name in NAMES if seconds(results, name, "warm")),
        _floor_row(results),
    ]
    size = results["triple"]["tensor_bytes"] / 1e9
    machine = results["machine"]
    versions = results["versions"]["peers"]
    return "\n".join(
        [
            f"![{ALTERNATIVE}]({CHART})",
            "",
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
    return f"| {NAMES[name]} | {cells[0]} | {cells[1]} | {peak_bytes(results, name) / 1e9:.2f} GB |"


def _times(results: dict[str, Any], name: str, mode: str) -> str:
    theirs, ours = seconds(results, name, mode), seconds(results, "paramdelta", mode)
    if name == "paramdelta":
        return f"**{median(ours.values()):.1f} s**"
    shared = theirs.keys() & ours.keys()
    if not shared:
        return "failed"
    ratio = median(theirs[number] / ours[number] for number in shared)
    return f"{median(theirs.values()):.1f} s ({ratio:.1f} ×)"


def _floor_row(results: dict[str, Any]) -> str:
    floors = floor_seconds(results, "cold")
    ours = seconds(results, "paramdelta", "cold")
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
