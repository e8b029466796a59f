"""Many merges in one process: `python -m bench.batch` (`make batch`) writes BATCH.md.

Recipes of small triples, each with a post of its own and all with the same base and new base, are carried out by one
`paramdelta run`, by as many `paramdelta merge`, and moved as bytes by the disk alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.contenders import default_tools
from bench.floor import Method, Traffic, best_methods, forget, measure_floor
from bench.machine import describe
from bench.measure import measure, warm
from bench.report import table, times
from bench.run import MODES, ROOT, balanced_order, say
from bench.triple import MODELS, Triple, TripleSpec, make_triple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.contenders import Tools

PAGE = Path(__file__).with_name("BATCH.md")
SETTLE_SECONDS = 2.0
RUN, MERGES, DISK = "one `run`", "a `merge` each", "the disk alone"
PLAYERS = (RUN, MERGES, DISK)
QUIETLY = ("--json", "--quiet")
HEADER = ["", "s, median", "s, range", "s per merge", "the disk", "outside", "the rest", "CPU s per merge"]
HEAD = """\
<!-- Written by `python -m bench.batch`; do not edit. -->

# Many small merges

{count} recipes of triple `{model}` (3 x {tensor_bytes:,} bytes), done by one `paramdelta run`, by a `paramdelta merge`
each, and moved as bytes by the disk alone. Every recipe has a post of its own; base and new base are the same files.
Seconds of whole processes, every output synced, medians over {rounds} interleaved round(s).
{CPU}, {cores} cores, {RAM}, {kernel}, {filesystem}. Written by `make batch`.

The seconds of one merge consist of what the disk alone takes for its bytes; of the time outside of merges, in which
processes start and end; and of the rest: numpy and compiled loops loaded once in a process, plans, arithmetic that the
disk had to wait for, sidecars, renames and syncs.
"""
INTRODUCTIONS = {
    "warm": "All inputs are in the page cache: the disk alone writes {written:.1f} GB.",
    "cold": "Inputs are taken out of the page cache before each run: the disk alone reads {read:.1f} GB and writes"
    " {written:.1f} GB.\nBase and new base are read for every merge, since direct reads do not leave them in the page"
    " cache.",
}


@dataclass(frozen=True)
class Batch:
    """What is to be merged: triples that differ in their post, and a recipe for each."""

    posts: tuple[Path, ...]
    triple: Triple
    recipes: tuple[Path, ...]

    def inputs(self, number: int) -> list[Path]:
        """Return the weight files that one merge reads."""
        return [*sorted(self.posts[number].glob("*.safetensors")), *self.triple.files(("base", "new_base"))]

    def files(self) -> list[Path]:
        """Return all of them, each once."""
        return list(dict.fromkeys(path for number in range(len(self.posts)) for path in self.inputs(number)))


@dataclass(frozen=True)
class Sample:
    """One run of all merges. `inside` is the sum of what paramdelta says that its merges took."""

    player: str
    mode: str
    round: int
    seconds: float
    inside: float = 0.0
    cpu_seconds: float = 0.0


def make_batch(triple: Triple, count: int, directory: Path) -> Batch:
    """Copy the post so many times, durably, and write a recipe for each copy."""
    posts, recipes = [], []
    for number in range(count):
        post, recipe = directory / f"post-{number:02}", directory / f"recipe-{number:02}.yaml"
        shutil.copytree(triple.path("post"), post)
        paths = {"post": post, "base": triple.path("base"), "new_base": triple.path("new_base"), "output": name(number)}
        recipe.write_text("".join(f"{key}: {json.dumps(str(path))}\n" for key, path in paths.items()), encoding="utf-8")
        posts.append(post)
        recipes.append(recipe)
    os.sync()
    return Batch(tuple(posts), triple, tuple(recipes))


def name(number: int) -> str:
    """Return the name of one merge's output."""
    return f"merged-{number:02}"


def run_command(batch: Batch, tools: Tools, output: Path) -> list[str]:
    """Return the command that does all merges in one process."""
    return [str(tools.paramdelta), "run", *map(str, batch.recipes), "-o", str(output), *QUIETLY]


def merges_command(batch: Batch, tools: Tools, output: Path) -> list[str]:
    """Return a shell's command that does one after the other, each in a process of its own."""
    shared = ["--base", str(batch.triple.path("base")), "--new-base", str(batch.triple.path("new_base"))]
    commands = [
        [str(tools.paramdelta), "merge", "--post", str(post), *shared, "-o", str(output / name(number)), *QUIETLY]
        for number, post in enumerate(batch.posts)
    ]
    return ["sh", "-e", "-c", "\n".join(map(shlex.join, commands))]


def seconds_inside(stdout: str) -> float:
    """Add up what paramdelta says that its merges took, in one report or in one for each line."""
    reports = [json.loads(line) for line in stdout.splitlines()]
    return sum(float(merge["seconds"]) for report in reports for merge in report.get("merges", [report]))


def prepare(batch: Batch, mode: str) -> None:
    """Bring the page cache into the state that is wanted."""
    os.sync()
    if mode == "cold":
        for path in batch.files():
            forget(path)
    else:
        warm(batch.files())
    time.sleep(SETTLE_SECONDS)


def play_program(player: str, mode: str, number: int, batch: Batch, tools: Tools, scratch: Path) -> Sample:
    """Do all merges, in one process or in many."""
    output = scratch / "output"
    output.mkdir()
    prepare(batch, mode)
    command = (run_command if player == RUN else merges_command)(batch, tools, output)
    result = measure(command, output=output)
    shutil.rmtree(output)
    if not result.ok:
        raise SystemExit(f"{player} ended with {result.exit_code}: {result.last_words()}")
    return Sample(player, mode, number, result.wall_seconds, seconds_inside(result.stdout), result.cpu_seconds)


def traffic(batch: Batch, mode: str, number: int) -> Traffic:
    """Return what the device has to move for one merge."""
    return Traffic(tuple(batch.inputs(number)) if mode == "cold" else (), batch.triple.tensor_bytes)


def disk_methods(batch: Batch, mode: str, scratch: Path) -> list[Method]:
    """Return the ways to move the bytes that stand a chance. fio is none: it would be started for every merge."""
    return [method for method in best_methods(traffic(batch, mode, 0), scratch) if method.tool != "fio"]


def play_disk(mode: str, number: int, batch: Batch, methods: Sequence[Method], scratch: Path) -> Sample:
    """Move the same bytes, file by file, by each method; the best one counts."""
    found = []
    for method in methods:
        prepare(batch, mode)
        floors = [measure_floor(traffic(batch, mode, each), method, scratch) for each in range(len(batch.posts))]
        found.append(sum(floor.seconds for floor in floors))
    return Sample(DISK, mode, number, min(found))


def play(batch: Batch, tools: Tools, scratch: Path, rounds: int) -> list[Sample]:
    """Play all rounds."""
    methods = {mode: disk_methods(batch, mode, scratch) for mode in MODES}
    play_program(MERGES, "warm", -1, batch, tools, scratch)  # untimed: compiled code is kept
    samples = []
    for number in range(rounds):
        for mode in MODES:
            for place in balanced_order(len(PLAYERS), number):
                if PLAYERS[place] == DISK:
                    sample = play_disk(mode, number, batch, methods[mode], scratch)
                else:
                    sample = play_program(PLAYERS[place], mode, number, batch, tools, scratch)
                say(f"round {number + 1}, {mode}: {sample.player:15} {sample.seconds:7.2f} s")
                samples.append(sample)
    return samples


def row(player: str, samples: Sequence[Sample], count: int) -> list[str]:
    """Format what one player took in one mode, and of what that consists; differences are of the same round."""
    disk = {each.round: each.seconds for each in samples if each.player == DISK}
    runs = [each for each in samples if each.player == player]
    seconds = [each.seconds for each in runs]
    cells = [player, *times(seconds), f"{median(seconds) / count:.3f}"]
    if player == DISK:
        return [*cells, *[""] * (len(HEADER) - len(cells))]
    outside = median(each.seconds - each.inside for each in runs)
    rest = median(each.inside - disk[each.round] for each in runs)
    parts = (median(disk.values()), outside, rest, median(each.cpu_seconds for each in runs))
    return [*cells, *(f"{part / count:.3f}" for part in parts)]


def section(mode: str, samples: Sequence[Sample], batch: tuple[int, int]) -> str:
    """Format one state of the page cache; ``batch`` is the number of merges and the bytes of one checkpoint."""
    count, size = batch
    introduction = INTRODUCTIONS[mode].format(read=3 * count * size / 1e9, written=count * size / 1e9)
    rows = [row(player, [each for each in samples if each.mode == mode], count) for player in PLAYERS]
    return f"## {mode.capitalize()}\n\n{introduction}\n\n{table(HEADER, rows)}"


def render(samples: Sequence[Sample], content: Mapping[str, object], batch: tuple[int, int]) -> str:
    """Format the page."""
    head = HEAD.format(**content, count=batch[0], tensor_bytes=batch[1])
    return "\n".join([head, *(section(mode, samples, batch) for mode in MODES)])


def main() -> None:
    """Run everything in turn, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="merges")
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    directory = options.dir.resolve()
    triple = make_triple(directory / f"triple-{options.model}-1", TripleSpec(options.model, 1))
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        batch = make_batch(triple, options.count, Path(scratch))
        samples = play(batch, default_tools(ROOT), Path(scratch), options.rounds)
    content = {**describe(directory), "model": options.model, "rounds": str(options.rounds)}
    options.out.write_text(render(samples, content, (options.count, triple.tensor_bytes)), encoding="utf-8")
    say(f"written: {options.out}")


if __name__ == "__main__":
    main()
