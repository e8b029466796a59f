"""The domain that the base model is updated with: the sources of Python's standard library on this machine."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

BLOCK = 128
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "pydoc_data", "ensurepip"}
LEFT_OUT |= {"turtledemo", "__pycache__", "__phello__"}
HELD_OUT_EVERY = 10
EVALUATION_SEED = 0


@cache
def files() -> tuple[Path, ...]:
    """Return the sources, in an order that does not depend on the disk."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(
        path for path in sorted(root.rglob("*.py")) if LEFT_OUT.isdisjoint(path.relative_to(root).parent.parts)
    )


@cache
def digest() -> str:
    """Return what stands for the texts: another Python has others."""
    found = hashlib.sha256()
    for path in files():
        found.update(path.read_bytes())
    return found.hexdigest()


def blocks(tokenizer: Any, count: int, seed: int, held_out: bool) -> Any:
    """Return rows of tokens from whole files, shuffled: of those that are trained on, or of those that never are."""
    random = Random(seed)
    chosen = [path for path in files() if _is_held_out(path) == held_out]
    random.shuffle(chosen)
    tokens: list[int] = []
    rows: list[list[int]] = []
    for path in chosen:
        tokens += [*tokenizer(path.read_text(encoding="utf-8", errors="replace"))["input_ids"], tokenizer.eos_token_id]
        while len(tokens) >= BLOCK:
            rows.append(tokens[:BLOCK])
            del tokens[:BLOCK]
        if len(rows) >= 4 * count:  # a few files are very long: what is drawn should come from many
            break
    return torch.tensor(random.sample(rows, count))


def _is_held_out(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).digest()[0] % HELD_OUT_EVERY == 0
