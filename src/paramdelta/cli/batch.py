"""Many merges in one process: what `paramdelta run` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paramdelta import api
from paramdelta.checkpoint.wording import printable
from paramdelta.cli import display
from paramdelta.cli.signals import cancel_on_signals
from paramdelta.errors import CancelledError, ParamDeltaError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paramdelta.planning.recipe_file import Job


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
        RecipeError: a file does not parse, a merge has no output, or two have the same.
    """
    jobs = [(job, _output(job, directory)) for file in files for job in api.read_recipes(file)]
    _refuse_twins(jobs)
    reports: list[dict[str, Any]] = []
    code = 0
    with cancel_on_signals() as cancelled:
        for number, (job, output) in enumerate(jobs, start=1):
            try:
                result = display.merge_shown(job.recipe, output, settings, cancelled, quiet=quiet)
                reports.append(display.merge_json(result))
                if not as_json:
                    click.echo(display.merge_line(result))
            except ParamDeltaError as error:
                code = code or error.exit_code
                reports.append({"output": output} | error.to_json())
                if not as_json:
                    click.echo(f"error: {printable(output)}: {error}", err=True)
                if isinstance(error, CancelledError):
                    _report(reports, len(jobs), as_json=as_json)
                    raise
                if not keep_going and number < len(jobs):
                    break
    _report(reports, len(jobs), as_json=as_json)
    return code


def _output(job: Job, directory: str | None) -> str:
    """Return where a merge goes: below the directory that was asked for, by the name of the recipe's own output."""
    if directory is None:
        if job.output is None:
            raise RecipeError(f"line {job.line}: no output", file=job.file, remedy="Give it an output, or use -o DIR.")
        return job.output
    return directory if job.output is None else str(Path(directory, Path(job.output).name))


def _refuse_twins(jobs: Sequence[tuple[Job, str]]) -> None:
    seen: dict[Path, Job] = {}
    for job, output in jobs:
        twin = seen.setdefault(Path(output).absolute(), job)
        if twin is not job:
            raise RecipeError(
                f"line {job.line}: has the same output as {twin.file}, line {twin.line}: {output}", file=job.file
            )


def _report(reports: Sequence[dict[str, Any]], jobs: int, *, as_json: bool) -> None:
    failed = sum("error" in report for report in reports)
    done = len(reports) - failed
    if as_json:
        content = {"merges": list(reports), "succeeded": done, "failed": failed, "not_run": jobs - len(reports)}
        click.echo(json.dumps(content))
    elif jobs > 1:
        rest = f", {jobs - len(reports)} not run" if len(reports) < jobs else ""
        click.echo(f"{done} of {jobs} merges done, {failed} failed{rest}")
