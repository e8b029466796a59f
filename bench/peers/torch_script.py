"""The script that many would write first: load, add, save. `torch_script.py POST BASE NEW_BASE OUT`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def load(checkpoint: Path) -> dict[str, Any]:
    """Load all tensors of a checkpoint directory."""
    tensors: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def main(post_path: Path, base_path: Path, new_base_path: Path, output: Path) -> None:
    """Merge in the tensors' own dtype and write one file."""
    post, base, new_base = load(post_path), load(base_path), load(new_base_path)
    merged = {name: post[name] - base[name] + new_base[name] for name in new_base}
    output.mkdir(parents=True)
    save_file(merged, output / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(new_base_path / "config.json", output)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
