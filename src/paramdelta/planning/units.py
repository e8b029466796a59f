"""Sizes and dtypes as people write them."""

from __future__ import annotations

import math
import re
from typing import Final

from paramdelta.errors import RecipeError

_FACTORS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    **{prefix + "b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{prefix + "ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
    **{prefix: 1000**power for power, prefix in enumerate("kmgtp", start=1)},
}

_DTYPES: Final = {
    "BF16": ("bf16", "bfloat16"),
    "F16": ("f16", "fp16", "float16", "half"),
    "F32": ("f32", "fp32", "float32", "float"),
    "F64": ("f64", "fp64", "float64", "double"),
}
_SPELLINGS: Final = {spelling: name for name, spellings in _DTYPES.items() for spelling in spellings}


def parse_size(text: str | int, field: str) -> int:
    """Return a size in bytes: ``512MB`` (10⁶), ``1.5GiB`` (2³⁰), ``4096``.

    Raises:
        RecipeError: the text is not a positive size; the message names ``field``.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*", str(text))
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise RecipeError(f"{field}: {text!r} is not a size", remedy="Write it like 512MB, 1.5GiB or 4096.")
    size = math.floor(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if size <= 0:
        raise RecipeError(f"{field}: must be more than zero, not {text!r}")
    return size


def parse_numbers(text: str, field: str) -> tuple[int, ...]:
    """Return numbers from 1 on that a text like ``1-10,17`` names, in order, each once.

    Raises:
        RecipeError: the text names none; the message names ``field``.
    """
    found: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?\s*", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise RecipeError(f"{field}: {text!r} names no numbers", remedy="Write them like 3 or 1-10,17, from 1 on.")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def parse_dtype(text: str, field: str) -> str:
    """Return the safetensors name of a float dtype spelled as safetensors, torch or numpy do.

    Raises:
        RecipeError: no such dtype; the message names ``field``.
    """
    name = _SPELLINGS.get(text.lower().removeprefix("torch."))
    if name is None:
        raise RecipeError(
            f"{field}: {text!r} is not a dtype that a merge can write", remedy="Use bf16, f16, f32 or f64."
        )
    return name


def format_size(size: float) -> str:
    """Return a size as people read it, in powers of ten: ``2.47 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
