"""What the merges of a run would do, from headers alone: `paramdelta run --dry-run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paramdelta import api
from paramdelta.checkpoint.wording import listed, printable
from paramdelta.cli import display
from paramdelta.cli.batch import failure, read_steps
from paramdelta.cli.steps import Step, refuse_missing, refuse_orphan
from paramdelta.engine.receipt import is_complete
from paramdelta.errors import ParamDeltaError
from paramdelta.planning.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence


def show(files: Sequence[str], directory: str | None, *, overwrite: bool, quiet: bool, as_json: bool) -> int:
    """Plan every merge of recipe files, write nothing, and report; return the first failure's exit code, or 0.

    One that reads the output of another is planned once that is merged.

    Raises:
        RecipeError: as `paramdelta.cli.batch.run`.
    """
    steps = read_steps(files, directory)
    reports: list[dict[str, Any]] = []
    failed: set[int] = set()
    there: set[int] = set()
    code = 0
    for step in steps:
        try:
            refuse_orphan(step, steps, failed)
            refuse_missing(step)
            awaited = [steps[place] for place in sorted({need.place for need in step.needs} - there)]
            if awaited:
                reports.append(_waiting(step, awaited, as_json=as_json))
                continue
            report = _planned(step, overwrite=overwrite, quiet=quiet, as_json=as_json)
            reports.append(report)
            if report["already_complete"]:
                there.add(step.place)
        except ParamDeltaError as error:
            code = code or error.exit_code
            failed.add(step.place)
            reports.append(failure(step, error, as_json=as_json))
    _report(reports, as_json=as_json)
    return code


def _planned(step: Step, *, overwrite: bool, quiet: bool, as_json: bool) -> dict[str, Any]:
    made = make_plan(step.recipe)
    memory = api.estimate_memory(made)
    warnings = api.warnings_for(made, step.output, overwrite=overwrite, memory_bytes=memory)
    complete = not overwrite and is_complete(Path(step.output), made)
    report = {"output": step.output, "already_complete": complete}
    if as_json:
        return report | display.plan_json(made, memory, warnings)
    if complete:
        click.echo(f"{_title(step)}: already holds this merge, nothing to do")
    else:
        click.echo(_title(step))
        display.show_plan(made, memory, [] if quiet else warnings)
    return report


def _waiting(step: Step, awaited: Sequence[Step], *, as_json: bool) -> dict[str, Any]:
    outputs = [other.output for other in awaited]
    if not as_json:
        click.echo(f"{_title(step)}: planned when {listed([*map(printable, outputs)])} is merged")
    return {"output": step.output, "waits_for": outputs}


def _title(step: Step) -> str:
    return f"{printable(step.output)} ({step.line})"


def _report(reports: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    failed = sum("error" in report for report in reports)
    waiting = sum("waits_for" in report for report in reports)
    planned = len(reports) - failed - waiting
    if as_json:
        click.echo(json.dumps({"merges": list(reports), "planned": planned, "waiting": waiting, "failed": failed}))
    elif len(reports) > 1:
        rest = f", {waiting} to be planned later" if waiting else ""
        click.echo(f"{planned} of {len(reports)} merges planned, {failed} failed{rest}; nothing was written")
