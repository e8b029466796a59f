"""The merges of one run, in order: where each writes, and which outputs of earlier ones it reads.

An input that names the output of another merge means that output wherever it is written: ``-o DIR`` moves both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint import hub
from paramdelta.checkpoint.wording import printable
from paramdelta.errors import CheckpointError, RecipeError
from paramdelta.planning.recipe_file import absolute
from paramdelta.storage.remote.address import is_remote

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    from paramdelta.planning.recipe import Recipe
    from paramdelta.planning.recipe_file import Job

_CHECKPOINT_FILES = (".safetensors", ".json")


class Need(NamedTuple):
    """An input that another merge of the run writes: its field in the recipe, and the place of that merge."""

    field: str
    place: int


@dataclass(frozen=True, slots=True)
class Step:
    """One merge of a run.

    Attributes:
        place: among the merges of the run.
        recipe: the job's, with inputs where other merges really write them.
        needs: what must have been merged before.
    """

    place: int
    job: Job
    recipe: Recipe
    output: str
    needs: tuple[Need, ...]

    @property
    def line(self) -> str:
        """Where the merge is asked for: file and line."""
        return f"{self.job.file}: line {self.job.line}"


def steps_of(jobs: Sequence[Job], directory: str | None) -> list[Step]:
    """Return the merges of a run, each with its output: below ``directory`` where that is given.

    Raises:
        RecipeError: a merge has no output, two have the same, or one reads what only a later one writes.
    """
    outputs = [_output(job, directory) for job in jobs]
    _refuse_twins(jobs, outputs, directory)
    places = {absolute(output): place for place, output in enumerate(outputs)}
    places |= {absolute(job.output): place for place, job in enumerate(jobs) if job.output is not None}
    return [_step(place, jobs, outputs, places) for place in range(len(jobs))]


def _step(place: int, jobs: Sequence[Job], outputs: Sequence[str], places: Mapping[str, int]) -> Step:
    job, needs = jobs[place], []
    moved: dict[str, str] = {}
    for field, path in _inputs(job.recipe):
        found = _written_by(path, places)
        if found is None:
            continue
        needed, file = found
        if needed >= place:
            raise _too_early(job, field, path, jobs[needed])
        needs.append(Need(field, needed))
        moved[path] = str(Path(outputs[needed], file))
    return Step(place, job, job.recipe.moved(moved), outputs[place], tuple(needs))


def _inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield field and path of every input; numbered where there are several deltas."""
    yield "new_base", recipe.new_base
    for number, delta in enumerate(recipe.deltas, start=1):
        suffix = f" of delta {number}" if len(recipe.deltas) > 1 else ""
        yield f"post{suffix}", delta.post
        yield f"base{suffix}", delta.base


def _written_by(path: str, places: Mapping[str, int]) -> tuple[int, str] | None:
    """Return which merge writes an input, and the file in its output that the input names, if it names one."""
    if path.startswith("hf://"):
        return None
    name = absolute(path)
    if name in places:
        return places[name], ""
    parent, file = os.path.split(name)
    if parent in places and file.endswith(_CHECKPOINT_FILES):
        return places[parent], Path(path).name
    return None


def _too_early(job: Job, field: str, path: str, other: Job) -> RecipeError:
    if other is job:
        message, remedy = "is the output of this very merge", "Give it another output."
    else:
        message = f"is the output of a merge that comes later ({other.file}: line {other.line})"
        remedy = "Put that merge first."
    name = _as_written(job, path)
    if hub.is_name(name):
        remedy += f" If it is a model in the Hub's cache, write hf://{name}."
    return RecipeError(f"line {job.line}: {field} {message}: {printable(path)}", file=job.file, remedy=remedy)


def _output(job: Job, directory: str | None) -> str:
    """Return where a merge goes: below the directory that was asked for, by the name of the recipe's own output."""
    if directory is None:
        if job.output is None:
            raise RecipeError(f"line {job.line}: no output", file=job.file, remedy="Give it an output, or use -o DIR.")
        return job.output
    return directory if job.output is None else str(Path(directory, Path(job.output).name))


def _refuse_twins(jobs: Sequence[Job], outputs: Sequence[str], directory: str | None) -> None:
    remedy = "Give each an output of its own."
    if directory is not None:
        remedy = (
            "-o DIR keeps the last part of an output's name alone, and a merge without one goes to DIR itself:"
            " give each an output, with a last part of its own."
        )
    seen: dict[str, Job] = {}
    for job, output in zip(jobs, outputs, strict=True):
        twin = seen.setdefault(absolute(output), job)
        if twin is not job:
            message = f"line {job.line}: has the same output as {twin.file}: line {twin.line}: {printable(output)}"
            raise RecipeError(message, file=job.file, remedy=remedy)


def refuse_orphan(step: Step, steps: Sequence[Step], failed: Container[int]) -> None:
    """Refuse a merge that reads the output of one that failed: what is there instead is of an earlier run.

    Raises:
        CheckpointError: it does.
    """
    for need in step.needs:
        if need.place in failed:
            other = steps[need.place]
            raise CheckpointError(
                f"not merged: {need.field} is the output of a merge that failed ({other.line})",
                file=printable(other.output),
                remedy="Nothing older that may lie there was used.",
            )


def refuse_missing(step: Step) -> None:
    """Say of an input that is not there what a path in a recipe is relative to.

    Raises:
        CheckpointError: an input that no merge of the run writes is missing.
    """
    written = {need.field for need in step.needs}
    for field, path in _inputs(step.recipe):
        if field not in written:
            _refuse_missing(step.job, field, path)


def _refuse_missing(job: Job, field: str, path: str) -> None:
    here = f"Paths in a recipe are relative to its own directory, {_directory(job)}."
    if path.startswith("hf://"):
        try:
            hub.locate(path)
        except CheckpointError as error:
            name = path.removeprefix("hf://")
            remedy = here if os.path.lexists(name) else f"{error.remedy}\nIf it is a path, write ./{name}"
            raise CheckpointError(f"{error.message} ({field})", file=error.file, remedy=remedy) from error
    elif not is_remote(path) and not os.path.lexists(path):
        name = _as_written(job, path)
        remedy = here if os.path.lexists(name) else "Check the spelling."
        if hub.is_name(name):
            remedy += f" If it is a model in the Hub's cache, write hf://{name}."
        raise CheckpointError(f"no such file or directory ({field})", file=printable(path), remedy=remedy)


def _directory(job: Job) -> str:
    return printable(str(Path(job.file).absolute().parent))


def _as_written(job: Job, path: str) -> str:
    """Return a path as the recipe has it."""
    directory = Path(job.file).parent
    return str(Path(path).relative_to(directory)) if Path(path).is_relative_to(directory) else path
