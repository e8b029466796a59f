"""What the user decides where checkpoints do not fit each other, and which tensors take part in the merge."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from paramdelta.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable

Vocab = Literal["error", "pad", "truncate", "new-base", "post"]
OnMissing = Literal["error", "new-base", "post", "skip"]
OnMismatch = Literal["error", "new-base", "post"]
Fp8 = Literal["dequantise", "requantise"]

CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "vocab": get_args(Vocab),
    "on_missing": get_args(OnMissing),
    "on_mismatch": get_args(OnMismatch),
    "fp8": get_args(Fp8),
}


@dataclass(frozen=True, slots=True)
class Policies:
    """The strict defaults, and what may be asked for instead.

    Attributes:
        vocab: where embeddings or head differ in their rows: how many the output has, and whose tokenizer it gets.
            ``pad``: the most of post and new base, post's tokenizer. ``truncate``: the fewest of all, the tokenizer of
            the smaller one. ``new-base``, ``post``: as many as that one has, and its tokenizer.
        on_missing: where a tensor is not in every checkpoint: ``new-base`` takes that one's, or leaves it out where it
            has none; ``post`` takes that one's, or the new base's where it has none; ``skip`` leaves it out.
        on_mismatch: where shapes or kinds of dtype differ: whose tensor is taken as it is.
        fp8: how weights are written that the new base has in block-scaled FP8: ``dequantise``, in BF16 or the dtype
            asked for; ``requantise``, in the new base's form, with new scales.
        include: patterns of the names that are merged; all where there are none. The others are the new base's.
        exclude: patterns of names that are not merged even so.
    """

    vocab: Vocab = "error"
    on_missing: OnMissing = "error"
    on_mismatch: OnMismatch = "error"
    fp8: Fp8 = "dequantise"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise RecipeError(f"{field.replace('_', '-')}: {value!r} is none of {', '.join(choices)}")
        for field in ("include", "exclude"):
            for pattern in getattr(self, field):
                if not pattern:
                    raise RecipeError(f"{field}: an empty pattern matches nothing")


class _Pattern:
    """A pattern of tensor names as shells have them: ``*`` any characters, dots too; ``?`` one; ``[0-9]`` some."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.used = False
        self._match = re.compile(fnmatch.translate(text)).match

    def matches(self, name: str) -> bool:
        """Return whether a whole name is meant, and remember that the pattern was of use."""
        found = self._match(name) is not None
        self.used = self.used or found
        return found


class Selection:
    """Which tensors are merged, by name."""

    def __init__(self, policies: Policies) -> None:
        self._include = [_Pattern(text) for text in policies.include]
        self._exclude = [_Pattern(text) for text in policies.exclude]

    def has(self, name: str) -> bool:
        """Return whether the tensor takes part in the merge."""
        included = _matching(self._include, name)
        excluded = _matching(self._exclude, name)
        return (bool(included) or not self._include) and not excluded

    def unused(self) -> list[str]:
        """Return the patterns that no name asked about has matched: they are misspelled."""
        return [pattern.text for pattern in (*self._include, *self._exclude) if not pattern.used]


class Coefficients:
    """A delta's coefficient for each tensor: that of the last pattern that means its name, or the general one."""

    def __init__(self, general: float, by_pattern: Iterable[tuple[str, float]]) -> None:
        self._general = general
        self._by_pattern = [(_Pattern(text), alpha) for text, alpha in by_pattern]

    def __call__(self, name: str) -> float:
        """Return the coefficient of a tensor."""
        alpha = self._general
        for pattern, other in self._by_pattern:
            if pattern.matches(name):
                alpha = other
        return alpha

    def unused(self) -> list[str]:
        """Return the patterns that no name asked about has matched."""
        return [pattern.text for pattern, _ in self._by_pattern if not pattern.used]


def _matching(patterns: Iterable[_Pattern], name: str) -> list[_Pattern]:
    """Return the patterns that mean a name; all are asked, so that none is called useless wrongly."""
    return [pattern for pattern in patterns if pattern.matches(name)]
