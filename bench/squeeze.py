"""A merge in very little memory: `python -m bench.squeeze` (`make squeeze`) writes SQUEEZE.md.

The control group of a process may hold so much, the page cache that it fills included: what a small virtual machine or
a container gives. paramdelta runs inside and outside of one in turn, cold; mergekit runs inside. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.contenders import REFERENCE, Contender, all_contenders, default_tools
from bench.machine import describe
from bench.measure import Measurement, drop_caches, measure
from bench.report import table
from bench.run import ROOT, SETTLE_SECONDS, check_disk, say
from bench.triple import MODELS, TripleSpec, make_triple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.triple import Triple

PAGE = Path(__file__).with_name("SQUEEZE.md")
GROUPS = Path("/sys/fs/cgroup")
LIMIT_FILES = (("memory", "memory.limit_in_bytes"), ("", "memory.max"), ("unified", "memory.max"))
JOIN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Cell:
    """One run: of what, in the group or not, and what it cost."""

    contender: str
    squeezed: bool
    result: Measurement


@contextlib.contextmanager
def limited(limit: int) -> Iterator[list[str]]:
    """Make a control group that may hold so many bytes; yield the words that start a command inside it."""
    for controller, name in LIMIT_FILES:
        group = GROUPS / controller / f"paramdelta-squeeze-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            try:
                (group / name).write_text(str(limit))
            except OSError:
                continue
            yield ["sh", "-c", JOIN, str(group / "cgroup.procs")]
            return
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
    raise SystemExit("no memory control group can be made here: that needs root, and a kernel with them")


def run_once(contender: Contender, triple: Triple, scratch: Path, inside: list[str]) -> Measurement:
    """Run a contender cold."""
    output = scratch / "output"
    shutil.rmtree(output, ignore_errors=True)
    drop_caches()
    time.sleep(SETTLE_SECONDS)
    command = [*inside, *contender.command(triple, output, scratch)]
    result = measure(command, output=output, environment=dict(contender.environment))
    shutil.rmtree(output, ignore_errors=True)
    say(f"{contender.name:20} {'inside' if inside else 'outside':8} {result.wall_seconds:7.2f} s, {result.exit_code}")
    return result


def rows(cells: list[Cell]) -> list[list[str]]:
    """Format a row for each contender, outside and inside; ratios are of runs that followed each other."""
    found = []
    for name, squeezed in dict.fromkeys((cell.contender, cell.squeezed) for cell in cells):
        results = [cell.result for cell in cells if (cell.contender, cell.squeezed) == (name, squeezed)]
        outside = [cell.result for cell in cells if (cell.contender, cell.squeezed) == (name, False)]
        good = [result for result in results if result.ok]
        killed = f"ended with {results[0].exit_code} (-9: killed)" if not good else f"{len(good)} of {len(results)}"
        speed = [a.wall_seconds / b.wall_seconds for a, b in zip(outside, results, strict=False) if a.ok and b.ok]
        found.append(
            [
                f"{name}, {'inside' if squeezed else 'outside'}",
                killed,
                f"{median(result.wall_seconds for result in good):.2f}" if good else "",
                f"{median(speed):.2f}" if squeezed and speed else "",
                f"{max(result.peak_rss_bytes for result in results) / 1e6:,.0f}",
            ]
        )
    return found


def main() -> None:
    """Run everything in turn, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=300, help="MB that the group may hold")
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    home = options.dir / f"triple-{options.model}-1"
    if not home.is_dir():
        check_disk(options.model, options.dir)
    triple = make_triple(home, TripleSpec(options.model, 1))
    contenders = {contender.name: contender for contender in all_contenders(default_tools(ROOT))}
    ours, theirs = contenders[REFERENCE], contenders["mergekit"]
    cells = []
    with tempfile.TemporaryDirectory(dir=options.dir) as name, limited(options.limit * 10**6) as inside:
        scratch = Path(name)
        for _ in range(options.rounds):
            cells.append(Cell(ours.name, False, run_once(ours, triple, scratch, [])))
            cells.append(Cell(ours.name, True, run_once(ours, triple, scratch, inside)))
        cells.append(Cell(theirs.name, True, run_once(theirs, triple, scratch, inside)))
    machine = describe(options.dir)
    header = ["", "ended well", "s, median", "speed, of outside", "peak RSS, MB"]
    options.out.write_text(
        "<!-- Written by `python -m bench.squeeze`; do not edit. -->\n\n# In very little memory\n\n"
        f"A control group that may hold {options.limit} MB, page cache included; triple `{options.model}` (3 x"
        f" {triple.tensor_bytes:,} bytes), cold, {options.rounds} rounds. {machine['CPU']}, {machine['cores']} cores,"
        f" {machine['kernel']}.\n\n{table(header, rows(cells))}",
        encoding="utf-8",
    )
    say(f"written: {options.out}")


if __name__ == "__main__":
    main()
