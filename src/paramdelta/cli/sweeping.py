"""Several coefficients in one pass: what `paramdelta sweep` does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from paramdelta.checkpoint.wording import printable
from paramdelta.cli import display
from paramdelta.errors import ParamDeltaError, RecipeError
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Recipe, checked_path
from paramdelta.planning.units import format_size
from paramdelta.planning.variants import by_alpha, refuse_others

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from paramdelta.results import SweepResult

_OPTIONS = {"post": "--post", "base": "--base", "new_base": "--new-base"}


def requested(
    recipe: str | None,
    given: dict[str, Any],
    alphas: Sequence[tuple[str | None, float]],
    policies: dict[str, Any],
    directory: str,
) -> dict[str, Recipe]:
    """Return the recipes of a sweep by their outputs below a directory: what the options name, or a recipe file's.

    Args:
        given: the other fields of a recipe by name, None or false where they are not given.
        alphas: coefficients, and those by pattern.

    Raises:
        RecipeError: it is neither of the two, or both; or it does not parse; or the merges are not alike.
    """
    checked_path(directory, "output")
    if recipe is not None:
        if any(value not in (None, False) for value in given.values()) or alphas or Policies(**policies) != Policies():
            raise RecipeError("a recipe file says all of it: no options beside it", file=recipe)
        return _of_file(recipe, directory)
    missing = [option for name, option in _OPTIONS.items() if given[name] is None]
    coefficients = [alpha for pattern, alpha in alphas if pattern is None]
    if not coefficients:
        missing.append("--alpha")
    if missing:
        remedy = "Give all three checkpoints and each coefficient, or a recipe file."
        raise RecipeError(f"{', '.join(missing)}: missing", remedy=remedy)
    by_pattern = {pattern: alpha for pattern, alpha in alphas if pattern is not None}
    if len(by_pattern) + len(coefficients) < len(alphas):
        raise RecipeError("alpha: a pattern is given twice", remedy="The last pattern that matches counts.")
    return by_alpha(Recipe.of(**given, alphas=by_pattern, policies=Policies(**policies)), coefficients, directory)


def _of_file(file: str, directory: str) -> dict[str, Recipe]:
    from paramdelta.cli.batch import read_steps
    from paramdelta.cli.steps import refuse_missing

    steps = read_steps([file], directory)
    refuse_others([step.recipe for step in steps], [step.line for step in steps])
    refuse_missing(steps[0])
    return {step.output: step.recipe for step in steps}


def run(
    recipes: dict[str, Recipe], settings: dict[str, Any], cancelled: threading.Event, *, quiet: bool, as_json: bool
) -> int:
    """Carry out recipes in one pass and report; return the first failure's exit code, or 0.

    Raises:
        ParamDeltaError: what ends them all.
    """
    result = display.sweep_shown(recipes, settings, cancelled, quiet=quiet)
    if as_json:
        click.echo(json.dumps(_as_json(result)))
    else:
        _tell(result)
    return next((error.exit_code for error in result.failures.values()), 0)


def _as_json(result: SweepResult) -> dict[str, Any]:
    """Return what scripts read: merges as those of `paramdelta run`, and what they took together."""
    merges = [
        {"output": output, **made.to_json()} if isinstance(made, ParamDeltaError) else display.merge_json(made)
        for output, made in result.merges.items()
    ]
    return {
        "merges": merges,
        "succeeded": len(merges) - len(result.failures),
        "failed": len(result.failures),
        "not_run": 0,
        "bytes_read": result.bytes_read,
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
    }


def _tell(result: SweepResult) -> None:
    for output, made in result.merges.items():
        if isinstance(made, ParamDeltaError):
            click.echo(f"error: {printable(output)}: {made}", err=True)
        else:
            click.echo(display.merge_line(made))
    failed = len(result.failures)
    click.echo(
        f"{len(result.merges) - failed} of {len(result.merges)} merges done, {failed} failed;"
        f" {format_size(result.bytes_read)} of inputs read for all of them, {result.seconds:.1f} s"
    )
