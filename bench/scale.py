"""Planning at full size from headers alone: 70B (723 tensors, 30 shards) and 671B (91,000 tensors, 163 shards), thrice.

The checkpoints are sparse files: real headers, data that takes no space on disk. Each plan is made by the command line
in a process of its own; time and peak RSS are those of the whole process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.make import llama_shapes, sparse_checkpoint

from bench.measure import measure

SHARDS = {"70B": 30, "671B": 163}


def shapes_70b() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of Llama-3-70B: 723 tensors, 141 GB as bf16."""
    return llama_shapes(8192, 80, 128256, 28672, kv=1024)


def shapes_671b() -> dict[str, tuple[int, ...]]:
    """Return 91,000 names and shapes of the size of a 671B mixture of 256 experts in 58 of 61 layers."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    for size, shapes in (("70B", shapes_70b()), ("671B", shapes_671b())):
        root = Path(tempfile.mkdtemp(prefix="paramdelta-scale-"))
        try:
            for role in ("post", "base", "new_base"):
                sparse_checkpoint(root / role, shapes, SHARDS[size])
            command = [str(Path(sys.executable).with_name("paramdelta")), "plan", "--json"]
            for role in ("post", "base", "new_base"):
                command += [f"--{role.replace('_', '-')}", str(root / role)]
            results = [measure(command) for _ in range(runs)]
            print(
                json.dumps(
                    {
                        "size": size,
                        "tensors": len(shapes),
                        "exit_codes": sorted({result.exit_code for result in results}),
                        "median_seconds": round(median(result.wall_seconds for result in results), 3),
                        "peak_rss_mb": round(max(result.peak_rss_bytes for result in results) / 1e6, 1),
                    }
                )
            )
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
