"""What the statistics of deltas cost: `python -m bench.statistics_cost` (`make statistics`) writes STATISTICS.md.

The same program runs in turn with the loops that it has and with loops that add nothing up (`bench.bare`): whole
merges, warm and cold, and the arithmetic alone beside memcpy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.contenders import REFERENCE, default_tools, paramdelta
from bench.machine import describe
from bench.measure import drop_caches, measure, warm
from bench.report import table, times
from bench.run import MODES, ROOT, balanced_order, check_disk, say
from bench.triple import MODELS, Triple, TripleSpec, make_triple
from paramdelta.engine.machine_code import CACHE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.contenders import Tools

PAGE = Path(__file__).with_name("STATISTICS.md")
SETTLE_SECONDS = 1.0
WITH, WITHOUT = "with statistics", "without"
PLAYERS = (WITH, WITHOUT)
KERNEL_MEGABYTES = 128
HEAD = """\
<!-- Written by `python -m bench.statistics_cost`; do not edit. -->

# What the statistics cost

A merge adds up norms, angles and counts of its deltas while they are in the cache. Here the same program runs in turn
with its own loops and with loops that do the same arithmetic and add nothing up.
{CPU}, {cores} cores, {RAM}, {kernel}, {filesystem}. Written by `make statistics`.
"""
MERGES = """\
## Whole merges

Triple `{model}`, 3 x {tensor_bytes:,} bytes; seconds of whole processes, synced, medians over {rounds} interleaved
round(s). The ratio is the median of those within a round.
"""
KERNELS = f"""\
## The arithmetic alone

GB/s read and written, {KERNEL_MEGABYTES} MB per operand, and beside memcpy on as many threads; medians over {{rounds}}
round(s).
"""


@dataclass(frozen=True)
class Sample:
    """One merge."""

    player: str
    mode: str
    round: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Speed:
    """One row of `bench.kernel`."""

    player: str
    round: int
    name: str
    threads: int
    gigabytes: float
    of_memcpy: float


Environments = dict[str, dict[str, str]]


def environments(bare: Path) -> Environments:
    """Compile the loops that add nothing up; return what makes the program run with which loops."""
    subprocess.run([sys.executable, "-m", "bench.bare", str(bare)], check=True, cwd=ROOT)
    return {WITH: {}, WITHOUT: {CACHE_VARIABLE: str(bare)}}


def merge(
    player: str, mode: str, number: int, triple: Triple, tools: Tools, places: tuple[Path, Environments]
) -> Sample:
    """Merge once."""
    scratch, settings = places
    output = scratch / "output"
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    if mode == "cold":
        drop_caches()
    else:
        warm(triple.files())
    time.sleep(SETTLE_SECONDS)
    command = paramdelta(tools, REFERENCE, "").command(triple, output, scratch)
    result = measure(command, output=output, environment=settings[player])
    shutil.rmtree(output, ignore_errors=True)
    if not result.ok:
        raise SystemExit(f"{player} ended with {result.exit_code}: {result.last_words()}")
    say(f"{mode}, round {number + 1}: {player:15} {result.wall_seconds:6.2f} s")
    return Sample(player, mode, number, result.wall_seconds, result.cpu_seconds)


def play(triple: Triple, modes: Sequence[str], rounds: int, scratch: Path, settings: Environments) -> list[Sample]:
    """Play all rounds of whole merges."""
    tools = default_tools(ROOT)
    for player in PLAYERS:  # untimed: the other loops are compiled
        merge(player, "warm", -1, triple, tools, (scratch, settings))
    return [
        merge(PLAYERS[place], mode, number, triple, tools, (scratch, settings))
        for mode in modes
        for number in range(rounds)
        for place in balanced_order(len(PLAYERS), number)
    ]


def run_kernels(player: str, number: int, settings: Environments) -> list[Speed]:
    """Run the arithmetic alone."""
    command = [sys.executable, "-m", "bench.kernel", str(KERNEL_MEGABYTES), "--only", "weights", "--json"]
    environment = {**os.environ, **settings[player]}
    done = subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    say(f"kernels, round {number + 1}: {player}")
    return [
        Speed(player, number, row["name"], int(threads), speed, row["of_memcpy"][threads])
        for row in json.loads(done.stdout)
        for threads, speed in row["gigabytes_per_second"].items()
    ]


def merge_rows(samples: Sequence[Sample], modes: Sequence[str]) -> list[list[str]]:
    """Format whole merges."""
    found = []
    for mode in modes:
        for player in PLAYERS:
            runs = {each.round: each for each in samples if (each.player, each.mode) == (player, mode)}
            others = {each.round: each for each in samples if (each.player, each.mode) == (WITHOUT, mode)}
            ratios = [runs[number].seconds / others[number].seconds for number in runs]
            cells = times([each.seconds for each in runs.values()])
            cpu = median(each.cpu_seconds for each in runs.values())
            found.append([f"{mode}, {player}", *cells, f"{median(ratios):.3f}", f"{cpu:.2f}"])
    return found


def kernel_rows(speeds: Sequence[Speed]) -> list[list[str]]:
    """Format the arithmetic: one row for each dtype and number of threads."""
    found = []
    for name, threads in dict.fromkeys((each.name, each.threads) for each in speeds):
        cells = [name, str(threads)]
        for player in PLAYERS:
            runs = [each for each in speeds if (each.player, each.name, each.threads) == (player, name, threads)]
            cells += [
                f"{median(each.gigabytes for each in runs):.1f}",
                f"{median(each.of_memcpy for each in runs):.2f}",
            ]
        found.append(cells)
    return found


def render(samples: Sequence[Sample], speeds: Sequence[Speed], content: Mapping[str, object]) -> str:
    """Format the page."""
    modes = list(dict.fromkeys(each.mode for each in samples))
    merges = table(["", "s, median", "s, range", "/ without", "CPU s"], merge_rows(samples, modes))
    header = ["operands", "threads", "with, GB/s", "of memcpy", "without, GB/s", "of memcpy"]
    parts = [HEAD, MERGES, KERNELS]
    head, of_merges, of_kernels = (part.format(**content) for part in parts)
    return "\n".join([head, of_merges, merges, of_kernels, table(header, kernel_rows(speeds))])


def main() -> None:
    """Run everything in turn, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    home = options.dir.resolve() / f"triple-{options.model}-1"
    if not home.is_dir():
        check_disk(options.model, options.dir)
    triple = make_triple(home, TripleSpec(options.model, 1))
    modes = MODES if drop_caches() else MODES[:1]
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        bare = Path(scratch, "bare")
        bare.mkdir()
        settings = environments(bare)
        samples = play(triple, modes, options.rounds, Path(scratch), settings)
        rounds = range(max(1, options.rounds // 3))
        speeds = [speed for number in rounds for player in PLAYERS for speed in run_kernels(player, number, settings)]
    content = {"rounds": options.rounds, "model": options.model, "tensor_bytes": triple.tensor_bytes}
    options.out.write_text(render(samples, speeds, {**describe(home), **content}), encoding="utf-8")
    say(f"written: {options.out}")


if __name__ == "__main__":
    main()
