"""sd-mecha's recipe for the same merge: in f32, written as bf16. `sd_mecha_script.py POST BASE NEW_BASE OUT`.

Single files only: sd-mecha knows no shards. Buffers, threads and checks are as it has them by itself.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import sd_mecha
import torch


def model(checkpoint: Path) -> sd_mecha.RecipeNode:
    """Open the one weight file of a checkpoint directory."""
    (path,) = checkpoint.glob("*.safetensors")
    return sd_mecha.model(path)


def main(post: Path, base: Path, new_base: Path, output: Path) -> None:
    """Merge one file of each checkpoint into one file."""
    recipe = sd_mecha.add_difference(model(new_base), model(post), model(base))
    output.mkdir(parents=True)
    sd_mecha.merge(
        recipe,
        merge_dtype=torch.float32,
        output_dtype=torch.bfloat16,
        output=output / "model.safetensors",
    )
    shutil.copy(new_base / "config.json", output)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
