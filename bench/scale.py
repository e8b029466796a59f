"""Planning at full size from headers alone: 70B (723 tensors, 30 shards) and 671B (91,000 tensors, 163 shards), thrice.

The checkpoints are sparse files: real headers, data that takes no space on disk. Each plan is made by the command line
in a process of its own; time and peak RSS are those of the whole process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.make import llama_shapes, sparse_checkpoint

from bench.machine import describe
from bench.measure import measure

SHARDS = {"70B": 30, "671B": 163}
PAGE = Path(__file__).with_name("SCALE.md")
PREAMBLE = """\
<!-- Written by `python -m bench.scale`; do not edit. -->

# Planning at full size

`paramdelta plan --json`, whole process, from headers alone (sparse files); {runs} runs. {CPU}, {cores} cores, {kernel}.

| | tensors | shards | s, median | s, range | peak RSS, MB |
|:--|--:|--:|--:|--:|--:|
"""


def shapes_70b() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of Llama-3-70B: 723 tensors, 141 GB as bf16."""
    return llama_shapes(8192, 80, 128256, 28672, kv=1024)


def shapes_671b() -> dict[str, tuple[int, ...]]:
    """Return 89,945 names and shapes of the size of a 671B mixture of 256 experts in 58 of 61 layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (129280, 7168)}
    for layer in range(61):
        stem = f"model.layers.{layer}"
        for number in range(14):
            shapes[f"{stem}.self_attn.part_{number}.weight"] = (1536, 7168)
        for expert in range(256 if layer >= 3 else 0):
            for projection, shape in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048))):
                shapes[f"{stem}.mlp.experts.{expert}.{projection}_proj.weight"] = shape
                shapes[f"{stem}.mlp.experts.{expert}.{projection}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (7168,)
    shapes["lm_head.weight"] = (129280, 7168)
    return shapes


def main() -> None:
    """Measure both sizes and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    rows = [row(size, shapes, options.runs) for size, shapes in (("70B", shapes_70b()), ("671B", shapes_671b()))]
    machine = describe(Path(tempfile.gettempdir()))
    options.out.write_text(PREAMBLE.format(runs=options.runs, **machine) + "\n".join(rows) + "\n", encoding="utf-8")


def row(size: str, shapes: dict[str, tuple[int, ...]], runs: int) -> str:
    """Return the table's row of one size."""
    root = Path(tempfile.mkdtemp(prefix="paramdelta-scale-"))
    try:
        for role in ("post", "base", "new_base"):
            sparse_checkpoint(root / role, shapes, SHARDS[size])
        command = [str(Path(sys.executable).with_name("paramdelta")), "plan", "--json"]
        for role in ("post", "base", "new_base"):
            command += [f"--{role.replace('_', '-')}", str(root / role)]
        results = [measure(command) for _ in range(runs)]
    finally:
        shutil.rmtree(root)
    if not all(result.ok for result in results):
        raise SystemExit(results[0].last_words())
    seconds = [result.wall_seconds for result in results]
    peak = max(result.peak_rss_bytes for result in results)
    return (
        f"| {size} | {len(shapes):,} | 3 × {SHARDS[size]} | {median(seconds):.2f}"
        f" | {min(seconds):.2f} - {max(seconds):.2f} | {peak / 1e6:.0f} |"
    )


if __name__ == "__main__":
    main()
