"""The user's request, validated: what to merge, with which coefficients, into what."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Self

from paramdelta.errors import RecipeError
from paramdelta.planning.units import parse_dtype, parse_size


@dataclass(frozen=True, slots=True)
class Delta:
    """One delta, ``alpha * (post - base)``: two checkpoints by path, and its coefficient."""

    post: str
    base: str
    alpha: float = 1.0

    def __post_init__(self) -> None:
        for field in ("post", "base"):
            object.__setattr__(self, field, checked_path(getattr(self, field), field))
        try:
            alpha = float(self.alpha)  # 2 and 2.0 are one request and have one fingerprint
        except (TypeError, ValueError, OverflowError):
            alpha = math.nan
        if not math.isfinite(alpha):
            raise RecipeError(f"alpha: must be a finite number, not {self.alpha!r}")
        object.__setattr__(self, "alpha", alpha)


@dataclass(frozen=True, slots=True)
class Recipe:
    """``new_base + Σ alphaᵢ · (postᵢ - baseᵢ)``, and the form of the output.

    Attributes:
        new_base: path of Θ'_base, whose shard names, tensor order, dtypes and config the output takes.
        deltas: at least one; post-training sidecars (tokenizer, chat template) come from the first one's post.
        dtype: safetensors name of the output's float dtype, or None for the new base's own.
        shard_size: most bytes of tensor data in one output shard, or None for the new base's own shards.
    """

    new_base: str
    deltas: tuple[Delta, ...]
    dtype: str | None = None
    shard_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "new_base", checked_path(self.new_base, "new-base"))
        if not self.deltas:
            raise RecipeError("deltas: at least one is needed")
        if self.dtype is not None and self.dtype != parse_dtype(self.dtype, "dtype"):
            raise RecipeError(f"dtype: {self.dtype!r} is not as safetensors spells it", remedy="Use Recipe.of.")
        if self.shard_size is not None and self.shard_size <= 0:
            raise RecipeError(f"shard-size: must be more than zero, not {self.shard_size}")

    @classmethod
    def of(
        cls,
        post: str | os.PathLike[str],
        base: str | os.PathLike[str],
        new_base: str | os.PathLike[str],
        *,
        alpha: float = 1.0,
        dtype: str | None = None,
        shard_size: str | int | None = None,
    ) -> Self:
        """Return the recipe of the main form, ``new_base + alpha * (post - base)``.

        Raises:
            RecipeError: a value does not parse; the message names the field.
        """
        recipe = cls(new_base=os.fspath(new_base), deltas=(Delta(os.fspath(post), os.fspath(base), alpha),))
        return replace(
            recipe,
            dtype=None if dtype is None else parse_dtype(dtype, "dtype"),
            shard_size=None if shard_size is None else parse_size(shard_size, "shard-size"),
        )

    @property
    def is_exact(self) -> bool:
        """Whether the result is ``post - base + new_base``, rounded once."""
        return len(self.deltas) == 1 and self.deltas[0].alpha == 1.0


def checked_path(path: str | os.PathLike[str], field: str) -> str:
    """Return a path as text.

    Raises:
        RecipeError: it is empty, as an unset variable of a shell is, and would mean the current directory.
    """
    if not os.fspath(path):
        raise RecipeError(f"{field}: the path is empty", remedy="Write . for the current directory.")
    return os.fspath(path)
