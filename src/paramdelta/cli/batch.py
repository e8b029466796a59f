"""Many merges in one process: what `paramdelta run` does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from paramdelta.checkpoint.wording import printable
from paramdelta.cli import display
from paramdelta.cli.signals import cancel_on_signals
from paramdelta.cli.steps import Step, refuse_missing, refuse_orphan, steps_of
from paramdelta.errors import CancelledError, ParamDeltaError
from paramdelta.planning.recipe_file import read_recipes

if TYPE_CHECKING:
    from collections.abc import Sequence


def run(
    files: Sequence[str],
    directory: str | None,
    settings: dict[str, Any],
    *,
    keep_going: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Carry out the merges of recipe files and report; return the first failure's exit code, or 0.

    Raises:
        RecipeError: a file does not parse, a merge has no output, two have the same, or one comes before what it reads.
    """
    steps = read_steps(files, directory)
    reports: list[dict[str, Any]] = []
    failed: set[int] = set()
    code = 0
    for step in steps:
        try:
            with cancel_on_signals() as cancelled:
                refuse_orphan(step, steps, failed)
                refuse_missing(step)
                result = display.merge_shown(step.recipe, step.output, settings, cancelled, quiet=quiet)
            reports.append(display.merge_json(result))
            if not as_json:
                click.echo(display.merge_line(result))
        except ParamDeltaError as error:
            code = code or error.exit_code
            failed.add(step.place)
            reports.append(failure(step, error, as_json=as_json))
            if isinstance(error, CancelledError):
                code = error.exit_code
            if isinstance(error, CancelledError) or not keep_going:
                break
    _report(reports, len(steps), as_json=as_json)
    return code


def read_steps(files: Sequence[str], directory: str | None) -> list[Step]:
    """Return the merges of recipe files, all of them read before anything is done."""
    return steps_of([job for file in files for job in read_recipes(file)], directory)


def failure(step: Step, error: ParamDeltaError, *, as_json: bool) -> dict[str, Any]:
    """Return what scripts read of a merge that failed; tell people."""
    if not as_json:
        click.echo(f"error: {step.line}: {printable(step.output)}: {error}", err=True)
    told = error.to_json()["error"] | {"recipe": step.job.file, "line": step.job.line}
    return {"output": step.output, "error": told}


def _report(reports: Sequence[dict[str, Any]], jobs: int, *, as_json: bool) -> None:
    failed = sum("error" in report for report in reports)
    done = len(reports) - failed
    if as_json:
        content = {"merges": list(reports), "succeeded": done, "failed": failed, "not_run": jobs - len(reports)}
        click.echo(json.dumps(content))
    elif jobs > 1:
        rest = f", {jobs - len(reports)} not run" if len(reports) < jobs else ""
        click.echo(f"{done} of {jobs} merges done, {failed} failed{rest}")
