"""Does others' page cache survive where memory is nearly full? `python -m bench.evict` (`make evict`) writes EVICT.md.

In a control group that may hold so much, the page cache included, somebody reads a file and leaves it alone. Then a
contender goes through more bytes than the group may hold, cold, and it is asked how much of that file is still in the
page cache. Needs root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.bystander import Bystander, make_bystander
from bench.contenders import Contender, default_tools, paramdelta
from bench.floor import forget
from bench.machine import describe
from bench.measure import Measurement, measure
from bench.report import table, times
from bench.run import ROOT, balanced_order, check_disk, say
from bench.squeeze import limited
from bench.triple import MODELS, ROLES, TripleSpec, make_triple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.contenders import Tools
    from bench.triple import Triple

PAGE = Path(__file__).with_name("EVICT.md")
SETTLE_SECONDS = 0.5
LEAST_BEFORE = 0.8
READS = (1, 2)
HEADER = ["", "left, read once", "range", "left, read twice", "range", "s, median", "s, range", "peak RSS, MB"]
HEAD = """\
<!-- Written by `python -m bench.evict`; do not edit. -->

# What is left of others' page cache

A control group that may hold {limit} MB, page cache included. A process in it reads a file of {hot} MB, once or
twice, and leaves it alone; then a contender runs in it over triple `{model}` (3 x {tensor_bytes:,} bytes), cold.
**Left** is the share of that file's pages that are still in the page cache afterwards, median and range over {rounds}
interleaved round(s). What was read once only is the first to go. Seconds and RAM are of all runs together.
**nothing at all** waits for two seconds: some systems page out what has not been used for a while, whoever runs.

{CPU}, {cores} cores, {kernel}, {filesystem}. Written by `make evict`.
"""


@dataclass(frozen=True)
class Sample:
    """One run: how often the hot file had been read, the share of its pages that stayed, and what the run cost."""

    contender: str
    reads: int
    left: float
    result: Measurement


def contenders(tools: Tools) -> list[Contender]:
    """Return who goes through the inputs."""
    return [
        nothing(),
        paramdelta(tools, "paramdelta", ""),
        paramdelta(tools, "paramdelta --io mmap", "", "--io", "mmap"),
        paramdelta(tools, "paramdelta --io pread", "", "--io", "pread"),
        copy_all(),
        read_all(),
    ]


def nothing() -> Contender:
    """Enter somebody who only waits: what the page cache loses by itself."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        return ["sleep", "2"]

    return Contender("nothing at all", "", command)


def copy_all() -> Contender:
    """Enter the system's own copy of all three inputs."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        paths = [str(triple.path(role)) for role in ROLES]
        return ["sh", "-c", 'mkdir "$0" && exec cp -R --reflink=never "$@" "$0"', str(output), *paths]

    return Contender("cp of the inputs", "", command)


def read_all() -> Contender:
    """Enter somebody who reads the inputs and keeps nothing."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        return ["sh", "-c", 'exec cat "$@" > /dev/null', "sh", *map(str, triple.files())]

    return Contender("cat inputs > /dev/null", "", command)


def play(contender: Contender, reads: int, triple: Triple, hot: Bystander, scratch: Path, limit: int) -> Sample:
    """Fill a new group's page cache, run one contender in it, and look."""
    output = scratch / "output"
    os.sync()
    for path in (*triple.files(), hot.path):
        forget(path)
    with limited(limit) as inside:
        subprocess.run([*inside, "cat", *[str(hot.path)] * reads], stdout=subprocess.DEVNULL, check=True)
        time.sleep(SETTLE_SECONDS)
        before = hot.share()
        if before < LEAST_BEFORE:
            raise SystemExit(f"only {before:.0%} of the hot file are in the page cache even before anybody runs")
        result = measure([*inside, *contender.command(triple, output, scratch)], output=output)
        left = hot.share() / before
    shutil.rmtree(output, ignore_errors=True)
    say(f"{contender.name:24} read {reads} x: {left:4.0%} left, {result.wall_seconds:6.2f} s, {result.exit_code}")
    return Sample(contender.name, reads, left, result)


def row(name: str, samples: Sequence[Sample]) -> list[str]:
    """Format one contender; what a run left that did not end well counts for nothing."""
    runs = [each for each in samples if each.contender == name and each.result.ok]
    if not runs:
        return [name, "failed", *[""] * (len(HEADER) - 2)]
    cells = [name]
    for reads in READS:
        left = [each.left for each in runs if each.reads == reads]
        cells += [f"{median(left):.0%}", f"{min(left):.0%} - {max(left):.0%}"] if left else ["failed", ""]
    peak = max(each.result.peak_rss_bytes for each in runs)
    return [*cells, *times([each.result.wall_seconds for each in runs]), f"{peak / 1e6:,.0f}"]


def render(names: Sequence[str], samples: Sequence[Sample], content: Mapping[str, object]) -> str:
    """Format the page."""
    return f"{HEAD.format(**content)}\n{table(HEADER, [row(name, samples) for name in names])}"


def main() -> None:
    """Run everything in turn, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=1000, help="MB that the group may hold")
    parser.add_argument("--hot", type=int, default=400, help="MB of the file that somebody has in use")
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    directory = options.dir.resolve()
    home = directory / f"triple-{options.model}-1"
    if not home.is_dir():
        check_disk(options.model, directory)
    triple = make_triple(home, TripleSpec(options.model, 1))
    known = contenders(default_tools(ROOT))
    samples = []
    with tempfile.TemporaryDirectory(dir=directory) as name:
        scratch = Path(name)
        hot = make_bystander(scratch / "hot", options.hot * 10**6)
        players = [(contender, reads) for contender in known for reads in READS]
        for number in range(options.rounds):
            for each in balanced_order(len(players), number):
                samples.append(play(*players[each], triple, hot, scratch, options.limit * 10**6))
    sizes = {"limit": options.limit, "hot": options.hot, "tensor_bytes": triple.tensor_bytes}
    content: dict[str, object] = {**describe(directory), **sizes, "model": options.model, "rounds": options.rounds}
    options.out.write_text(render([each.name for each in known], samples, content), encoding="utf-8")
    say(f"written: {options.out}")


if __name__ == "__main__":
    main()
