"""Reads `results.json`, older ones too: what charts and the README are made of."""

from __future__ import annotations

from typing import Any


def seconds(results: dict[str, Any], name: str, mode: str) -> dict[int, float]:
    """Return a contender's whole-process seconds in one mode, by round."""
    return {
        run["round"]: run["wall_seconds"] for run in results["runs"] if (run["contender"], run["mode"]) == (name, mode)
    }


def floor_seconds(results: dict[str, Any], mode: str) -> dict[int, float]:
    """Return the disk's best seconds in one mode, by round: several methods may have been timed in each."""
    best: dict[int, float] = {}
    for floor in results["floors"]:
        if floor["mode"] == mode:
            best[floor["round"]] = min(floor["seconds"], best.get(floor["round"], floor["seconds"]))
    return best


def peak_bytes(results: dict[str, Any], name: str) -> int:
    """Return the most RAM that a contender held in any of its runs, 0 where it has none."""
    return max((int(run["peak_rss_bytes"]) for run in results["runs"] if run["contender"] == name), default=0)
