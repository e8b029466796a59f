"""How fast inputs come that are not on this machine: `python -m bench.remote` (`make remote`) writes REMOTE.md.

A server on loopback has the triple in its page cache. A merge that reads it from there runs in turn with the client
library alone, which fetches the same ranges and drops them; with and without 50 ms before each answer.
"""

from __future__ import annotations

import argparse
import contextlib
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

from bench.contenders import default_tools
from bench.machine import describe
from bench.measure import Measurement, measure, warm
from bench.report import table, times
from bench.run import ROOT, balanced_order, check_disk, say
from bench.triple import MODELS, Triple, TripleSpec, make_triple
from paramdelta.engine.budget import LARGEST_WINDOW, REMOTE_WORKERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.contenders import Tools

PAGE = Path(__file__).with_name("REMOTE.md")
MERGE, LOCAL, LIBRARY = "merge", "merge, local files", "client library alone"
PLAYERS = (MERGE, LOCAL, LIBRARY)
LATENCIES = (0.0, 0.05)
SETTLE_SECONDS = 1.0
HEAD = """\
<!-- Written by `python -m bench.remote`; do not edit. -->

# Inputs from a server

Triple `{model}`, 3 x {tensor_bytes:,} bytes, served on loopback from the page cache; seconds of whole processes,
synced, medians over {rounds} interleaved round(s). The client library alone fetches the same ranges ({at_once} at once,
{window:,} bytes each) and drops them: no arithmetic, nothing written. The ratio is the median of those within a round:
above 1 the merge is the faster one.
{CPU}, {cores} cores, {RAM}, {kernel}, {filesystem}. Written by `make remote`.
"""


@dataclass(frozen=True)
class Sample:
    """One run."""

    player: str
    latency: float
    round: int
    seconds: float
    peak_rss_bytes: int


@contextlib.contextmanager
def serving(root: Path, latency: float) -> Iterator[str]:
    """Serve a directory in a process of its own; yield its address."""
    command = [sys.executable, "-m", "bench.range_server", str(root), "--latency", str(latency)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def command_of(player: str, triple: Triple, url: str, tools: Tools, output: Path) -> list[str]:
    """Return the command of a player."""
    if player == LIBRARY:
        paths = triple.files()
        files = [f"{url}/{path.relative_to(triple.directory)}:{path.stat().st_size}" for path in paths]
        sizes = ["--range", str(LARGEST_WINDOW), "--at-once", str(3 * REMOTE_WORKERS)]
        return [sys.executable, "-m", "bench.fetch_only", *files, *sizes]
    names = {"post": "post", "base": "base", "new-base": "new_base"}
    places = {
        role: str(triple.path(name)) if player == LOCAL else f"{url}/{triple.path(name).relative_to(triple.directory)}"
        for role, name in names.items()
    }
    inputs = [f"--{role}={place}" for role, place in places.items()]
    return [str(tools.paramdelta), "merge", *inputs, "-o", str(output), "--json"]


def play(player: str, latency: float, number: int, triple: Triple, tools: Tools, scratch: Path) -> Sample:
    """Run once."""
    output = scratch / "output"
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    warm(triple.files())
    time.sleep(SETTLE_SECONDS)
    with serving(triple.directory, latency) as url:
        result: Measurement = measure(command_of(player, triple, url, tools, output), output=output)
    if not result.ok:
        raise SystemExit(f"{player} ended with {result.exit_code}: {result.last_words()}")
    if player == MERGE and json.loads(result.stdout)["io"] != "remote":
        raise SystemExit("the merge did not read from the server")
    shutil.rmtree(output, ignore_errors=True)
    say(f"{latency * 1000:.0f} ms, round {number + 1}: {player:22} {result.wall_seconds:6.2f} s")
    return Sample(player, latency, number, result.wall_seconds, result.peak_rss_bytes)


def rows(samples: Sequence[Sample]) -> list[list[str]]:
    """Format a row for each player and latency."""
    found = []
    for latency in LATENCIES:
        alone = {each.round: each.seconds for each in samples if (each.player, each.latency) == (LIBRARY, latency)}
        for player in PLAYERS:
            runs = [each for each in samples if (each.player, each.latency) == (player, latency)]
            ratio = median(alone[each.round] / each.seconds for each in runs)
            peak = max(each.peak_rss_bytes for each in runs) / 1e6
            cells = times([each.seconds for each in runs])
            found.append([f"{latency * 1000:.0f} ms: {player}", *cells, f"{ratio:.2f}", f"{peak:.0f}"])
    return found


def main() -> None:
    """Run everything in turn, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    home = options.dir.resolve() / f"triple-{options.model}-1"
    if not home.is_dir():
        check_disk(options.model, options.dir)
    triple, tools = make_triple(home, TripleSpec(options.model, 1)), default_tools(ROOT)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        samples = [
            play(PLAYERS[place], latency, number, triple, tools, Path(scratch))
            for number in range(-1, options.rounds)  # the first one compiles, and does not count
            for latency in LATENCIES
            for place in balanced_order(len(PLAYERS), max(0, number))
        ]
    counted = [each for each in samples if each.round >= 0]
    content = {"rounds": options.rounds, "model": options.model, "tensor_bytes": triple.tensor_bytes}
    content |= {"window": LARGEST_WINDOW, "at_once": 3 * REMOTE_WORKERS}
    header = ["", "s, median", "s, range", "library / this", "peak RSS, MB"]
    head = HEAD.format(**{**describe(home), **content})
    options.out.write_text(f"{head}\n{table(header, rows(counted))}", encoding="utf-8")
    say(f"written: {options.out}")


if __name__ == "__main__":
    main()
