"""Recipes that differ in coefficients alone: told from others, named, and planned for one pass."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from paramdelta.errors import InputChangedError, RecipeError
from paramdelta.planning.plan import Plan, make_plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from paramdelta.planning.parts import Operation
    from paramdelta.planning.recipe import Recipe


def by_alpha(recipe: Recipe, alphas: Iterable[float], directory: str) -> dict[str, Recipe]:
    """Return a recipe of one delta with each of these coefficients, by the output below a directory.

    Coefficients by pattern stay as they are.

    Raises:
        RecipeError: a coefficient is given twice, or is no finite number.
    """
    [delta] = recipe.deltas
    found: dict[str, Recipe] = {}
    for alpha in alphas:
        varied = replace(recipe, deltas=(replace(delta, alpha=alpha),))
        name = alpha_name(varied.deltas[0].alpha)
        if name in found:
            raise RecipeError(f"alpha: {name} is given twice", remedy="Give each of them once.")
        found[name] = varied
    return {os.path.join(directory, name): varied for name, varied in found.items()}  # noqa: PTH118 (text, as given)


def alpha_name(alpha: float) -> str:
    """Return what the output of a coefficient is called: the shortest decimal that means this very number."""
    return f"alpha-{alpha!r}".removesuffix(".0")


def difference(first: Recipe, other: Recipe) -> str | None:
    """Return in what two recipes differ beside their coefficients, as recipes spell it; None where they do not."""
    return next(_differences(first, other), None)


def _differences(first: Recipe, other: Recipe) -> Iterator[str]:
    for field in ("new_base", "dtype", "shard_size", "trust_remote_code"):
        if getattr(first, field) != getattr(other, field):
            yield field
    policies = asdict(other.policies)
    yield from (field for field, value in asdict(first.policies).items() if value != policies[field])
    if len(first.deltas) != len(other.deltas):
        yield "the number of deltas"
        return
    for number, (delta, another) in enumerate(zip(first.deltas, other.deltas, strict=True), start=1):
        suffix = f" of delta {number}" if len(first.deltas) > 1 else ""
        yield from (f"{name}{suffix}" for name in ("post", "base") if getattr(delta, name) != getattr(another, name))


def refuse_others(recipes: Sequence[Recipe], names: Sequence[str]) -> None:
    """See that recipes differ in their coefficients, and in nothing else.

    Args:
        names: what a message calls each.

    Raises:
        RecipeError: two have the same coefficients, or differ in something else.
    """
    seen: dict[object, str] = {}
    for recipe, name in zip(recipes, names, strict=True):
        differing = difference(recipes[0], recipe)
        if differing is not None:
            raise RecipeError(
                f"{name}: differs from {names[0]} in {differing}: one pass makes merges that differ in alphas alone",
                remedy="Carry it out by itself; paramdelta run does so for any number of merges.",
            )
        twin = seen.setdefault(tuple((delta.alpha, delta.alphas) for delta in recipe.deltas), name)
        if twin is not name:
            raise RecipeError(f"{name}: has the same coefficients as {twin}", remedy="Give each of them once.")


def make_plans(recipes: Sequence[Recipe]) -> list[Plan]:
    """Return the plans of recipes that differ in coefficients alone. What is the same in them is in memory once.

    Raises:
        InputChangedError: an input changed while the plans were made.
        CheckpointError: as `make_plan`, and MismatchError too.
    """
    first = make_plan(recipes[0])
    return [first, *(_sharing(first, make_plan(recipe)) for recipe in recipes[1:])]


def _sharing(first: Plan, plan: Plan) -> Plan:
    """Return a plan with what it has in common with the first one."""
    operations = tuple(map(_shared, first.operations, plan.operations))
    shared = replace(first, recipe=plan.recipe, operations=operations, sidecars=plan.sidecars, warnings=plan.warnings)
    if shared != plan:
        raise InputChangedError(
            "the inputs changed while the merges were planned",
            remedy="Leave the inputs alone while a merge runs, then start again.",
        )
    return shared


def _shared(first: Operation, operation: Operation) -> Operation:
    if first == operation:
        return first
    parts = tuple(own._replace(alphas=part.alphas) for own, part in zip(first.parts, operation.parts, strict=False))
    return first._replace(parts=parts)
