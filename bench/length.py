"""Does RAM stay flat over the full length of 70B? `python -m bench.length` (`make length`) writes LENGTH.md.

423 GB of inputs are sparse files: real headers, data that takes no space; the output is dropped as it is made, window
by window. All else is a merge: planning, budget, reads, arithmetic, digests. Each length in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from tests.make import sparse_checkpoint

from bench.machine import describe
from bench.report import table
from bench.scale import shapes_70b
from bench.triple import MODELS
from paramdelta.engine import pipeline
from paramdelta.merging import budget_of
from paramdelta.planning.plan import make_plan
from paramdelta.planning.recipe import Recipe
from paramdelta.storage.process import peak_rss

if TYPE_CHECKING:
    from paramdelta.engine.progress import FinishedShard, Progress
    from paramdelta.planning.layout import OutputShard

PAGE = Path(__file__).with_name("LENGTH.md")
SHARDS = {"1B": 1, "70B": 30}
ROLES = ("post", "base", "new_base")


class Nowhere:
    """A sink that drops what is written to it."""

    def write(self, offset: int, window: memoryview) -> None:
        """Drop a window."""

    def finish(self) -> None:
        """Nothing is there to finish."""

    def abandon(self) -> None:
        """Nothing is there to leave."""


class Dropped:
    """A target that keeps nothing."""

    def create(self, shard: OutputShard) -> Nowhere:  # noqa: ARG002
        """Return where a shard goes."""
        return Nowhere()

    def completed(self, finished: FinishedShard, /) -> None:
        """Keep nothing of a finished shard either."""


def shapes_of(length: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model."""
    return shapes_70b() if length == "70B" else {each.name: each.shape for each in MODELS["1b"].tensors()}


def run_here(root: Path) -> dict[str, object]:
    """Merge the three below a directory into nothing; return what that cost, and RSS along the way."""
    started = time.perf_counter()
    plan = make_plan(Recipe.of(*(root / role for role in ROLES)))
    budget = budget_of([plan], None, None, "auto")
    process, along = psutil.Process(), list[int]()

    def look(progress: Progress) -> None:
        if progress.done * 10 // progress.total > len(along):
            along.append(process.memory_info().rss)

    pipeline.run(plan, budget, "auto", Dropped(), look)
    moved = plan.bytes_read + plan.bytes_written
    return {
        "seconds": time.perf_counter() - started,
        "moved": moved,
        "peak": peak_rss(),
        "along": along,
        "tensors": len(plan.operations),
    }


def run_apart(length: str, directory: Path) -> dict[str, object]:
    """Make sparse checkpoints of a length, and merge them in a process of its own."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        for role in ROLES:
            sparse_checkpoint(Path(name, role), shapes_of(length), SHARDS[length])
        command = [sys.executable, "-m", "bench.length", "--here", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main() -> None:
    """Run both lengths and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", type=Path, help="merge the three below a directory, in this process")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.here is not None:
        print(json.dumps(run_here(options.here)))
        return
    rows = []
    for length in SHARDS:
        found = run_apart(length, options.dir)
        along = found["along"]
        assert isinstance(along, list)
        rows.append(
            [
                length,
                f"{found['tensors']:,}",
                f"{float(str(found['moved'])) / 1e9:,.0f}",
                f"{float(str(found['seconds'])):.1f}",
                f"{float(str(found['peak'])) / 1e6:.0f}",
                ", ".join(f"{rss / 1e6:.0f}" for rss in along),
            ]
        )
    machine = describe(options.dir)
    header = ["", "tensors", "GB moved", "s", "peak RSS, MB", "RSS at each tenth, MB"]
    options.out.write_text(
        "<!-- Written by `python -m bench.length`; do not edit. -->\n\n# RAM over the length of a merge\n\n"
        "Sparse inputs, an output that is dropped as it is made; default budget."
        f" {machine['CPU']}, {machine['cores']} cores, {machine['kernel']}.\n\n{table(header, rows)}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
