"""The model card of an output: a README.md whose front matter the Hub understands, and how the model was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from paramdelta.planning.provenance import input_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from paramdelta.planning.plan import Input, Plan
    from paramdelta.planning.recipe import Delta

_ABOUT = """\
# {title}

A merge made with paramdelta, without training: what post-training taught a model was put onto an updated base
([ParamΔ](https://arxiv.org/abs/2504.21023)).

    {formula}

| | |
|:--|:--|
{rows}

{arithmetic}

`recipe.yaml` beside this file makes the same weights again, as long as the inputs are where it says:
`paramdelta run recipe.yaml -o OUTPUT`.
"""


def model_card(plan: Plan, lost: float | None = None) -> str:
    """Return the card: inputs by the names that the Hub or their directories give them, never by their paths.

    Args:
        lost: relative error of the weights that are written in block-scaled FP8.
    """
    names = {source.role: input_name(source) for source in plan.inputs}
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys(_without_revision(name) for name in names.values())),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "paramdelta", "model-merging"],
    }
    deltas = plan.recipe.deltas
    numbers = [f" {place}" for place in range(1, len(deltas) + 1)] if len(deltas) > 1 else [""]
    terms = [f"{_factor(delta.alpha)}(post{n} − base{n})" for n, delta in zip(numbers, deltas, strict=True)]
    exact = "Every element is the exact result, rounded once." if plan.recipe.is_exact else "Accumulated in f64."
    if lost is not None:
        exact = f"{exact[:-1]}, but for weights in block-scaled FP8: their relative error is {lost:.2%}."
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n" + _ABOUT.format(
        title=_title(plan),
        formula="\n    ".join([" ".join(["new base", *terms]), *_by_pattern(deltas, numbers)]),
        rows="\n".join(f"| {role} | `{name}` |" for role, name in names.items()),
        arithmetic=exact,
    )


def _title(plan: Plan) -> str:
    new_base, posts = _plain(plan.inputs[0]), [_plain(source) for source in plan.inputs[1::2]]
    if all(delta.alpha > 0 for delta in plan.recipe.deltas):
        return f"{new_base} with the post-training of {' and '.join(posts)}"
    return f"{new_base} and the deltas of {' and '.join(posts)}"


def _by_pattern(deltas: Iterable[Delta], numbers: Iterable[str]) -> Iterator[str]:
    """Yield a line for each coefficient that holds for some tensors only."""
    for delta, number in zip(deltas, numbers, strict=True):
        for pattern, alpha in delta.alphas:
            yield f"{alpha:g} · (post{number} − base{number}) where a name is like {pattern}"


def _plain(source: Input) -> str:
    """Return the last part of an input's name."""
    return _without_revision(input_name(source)).rpartition("/")[2]


def _without_revision(name: str) -> str:
    return name.partition("@")[0]


def _factor(alpha: float) -> str:
    sign = "−" if alpha < 0 else "+"
    return f"{sign} " if abs(alpha) == 1.0 else f"{sign} {abs(alpha):g} · "
