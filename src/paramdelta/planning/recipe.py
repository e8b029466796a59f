"""The user's request, validated: what to merge, with which coefficients, into what."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from paramdelta.errors import RecipeError
from paramdelta.planning.policies import Coefficients, Policies
from paramdelta.planning.units import parse_dtype, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping


_STRICT: Final = Policies()


@dataclass(frozen=True, slots=True)
class Delta:
    """One delta, ``alpha * (post - base)``: two checkpoints by path, and its coefficient.

    Attributes:
        alphas: other coefficients by pattern of tensor names; the last pattern that means a name counts.
    """

    post: str
    base: str
    alpha: float = 1.0
    alphas: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for field in ("post", "base"):
            object.__setattr__(self, field, checked_path(getattr(self, field), field))
        object.__setattr__(self, "alpha", _finite(self.alpha))
        object.__setattr__(self, "alphas", tuple((pattern, _finite(alpha)) for pattern, alpha in self.alphas))

    def coefficients(self) -> Coefficients:
        """Return the coefficient for each name."""
        return Coefficients(self.alpha, self.alphas)


@dataclass(frozen=True, slots=True)
class Recipe:
    """``new_base + Σ alphaᵢ · (postᵢ - baseᵢ)``, and the form of the output.

    Attributes:
        new_base: path of Θ'_base, whose shard names, tensor order, dtypes and config the output takes.
        deltas: at least one; post-training sidecars (tokenizer, chat template) come from the first one's post.
        dtype: safetensors name of the output's float dtype, or None for the new base's own.
        shard_size: most bytes of tensor data in one output shard, or None for the new base's own shards.
        policies: what to do where the checkpoints do not fit each other, and which tensors are merged.
        trust_remote_code: whether the checkpoints' own Python files go along.
    """

    new_base: str
    deltas: tuple[Delta, ...]
    dtype: str | None = None
    shard_size: int | None = None
    policies: Policies = _STRICT
    trust_remote_code: bool = False

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
        alphas: Mapping[str, float] | None = None,
        dtype: str | None = None,
        shard_size: str | int | None = None,
        policies: Policies | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Return the recipe of the main form, ``new_base + alpha * (post - base)``.

        Raises:
            RecipeError: a value does not parse; the message names the field.
        """
        delta = Delta(os.fspath(post), os.fspath(base), alpha, tuple((alphas or {}).items()))
        recipe = cls(new_base=os.fspath(new_base), deltas=(delta,))
        return replace(
            recipe,
            policies=policies or Policies(),
            trust_remote_code=trust_remote_code,
            dtype=None if dtype is None else parse_dtype(dtype, "dtype"),
            shard_size=None if shard_size is None else parse_size(shard_size, "shard-size"),
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The checkpoints, in the order of a plan's inputs: the new base, then post and base of each delta."""
        return (self.new_base, *(path for delta in self.deltas for path in (delta.post, delta.base)))

    def moved(self, moved: Mapping[str, str]) -> Self:
        """Return the recipe with other paths in place of those that ``moved`` has."""
        deltas = tuple(
            replace(delta, post=moved.get(delta.post, delta.post), base=moved.get(delta.base, delta.base))
            for delta in self.deltas
        )
        return replace(self, new_base=moved.get(self.new_base, self.new_base), deltas=deltas)

    @property
    def is_exact(self) -> bool:
        """Whether the result is ``post - base + new_base``, rounded once."""
        alphas = {delta.alpha for delta in self.deltas} | {alpha for delta in self.deltas for _, alpha in delta.alphas}
        return len(self.deltas) == 1 and alphas == {1.0}


def _finite(alpha: object) -> float:
    """Return a coefficient as a float: 2 and 2.0 are one request and have one fingerprint."""
    try:
        number = float(alpha)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"alpha: must be a finite number, not {alpha!r}")
    return number


def checked_path(path: str | os.PathLike[str], field: str) -> str:
    """Return a path as text.

    Raises:
        RecipeError: it is empty, as an unset variable of a shell is, and would mean the current directory.
    """
    if not os.fspath(path):
        raise RecipeError(f"{field}: the path is empty", remedy="Write . for the current directory.")
    return os.fspath(path)
