"""An analysis on request: what is asked for, where it goes, progress while it is made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paramdelta.cli.display import show_warning, with_progress
from paramdelta.errors import OutputError, RecipeError
from paramdelta.insight.drawing import require_matplotlib
from paramdelta.insight.files import replace_file
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Recipe

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

    from paramdelta.engine.progress import Progress
    from paramdelta.insight.analysis import Analysis

_NEVER = frozenset({".safetensors", ".json", ".yaml", ".yml"})
"""Endings of checkpoints' files, and of recipes."""

_OPTIONS = {"post": "--post", "base": "--base", "new_base": "--new-base"}


class Wanted(NamedTuple):
    """What an analysis is written to, beside the terminal: files and a directory, as the user spelt them."""

    csv: str | None
    html: str | None
    plots: str | None
    plot_format: str


def requested(recipe: str | None, given: dict[str, str | None], policies: dict[str, Any]) -> Recipe:
    """Return what is to be analysed: what the options name, or a recipe file.

    Raises:
        RecipeError: it is neither of the two, or both; or the file does not parse, or holds several merges.
        CheckpointError: the file is missing.
    """
    named = [name for name, path in given.items() if path is not None]
    if recipe is None:
        missing = [option for name, option in _OPTIONS.items() if name not in named]
        if missing:
            raise RecipeError(f"{', '.join(missing)}: missing", remedy="Give all three checkpoints, or a recipe file.")
        return Recipe.of(str(given["post"]), str(given["base"]), str(given["new_base"]), policies=Policies(**policies))
    if named or Policies(**policies) != Policies():
        raise RecipeError("a recipe file says all of it: no options beside it", file=recipe)
    from paramdelta.planning.recipe_file import read_recipes

    merges = read_recipes(recipe)
    if len(merges) != 1:
        raise RecipeError(f"holds {len(merges)} merges", file=recipe, remedy="Analyse them one by one.")
    return merges[0].recipe


def analyze_shown(
    recipe: Recipe, settings: dict[str, Any], wanted: Wanted, cancelled: threading.Event, *, quiet: bool
) -> Analysis:
    """Analyse, with progress and the plan's warnings on standard error, and write what is wanted."""
    from paramdelta import api

    _require_places(wanted, recipe)

    def analyze(on_progress: Callable[[Progress], None] | None) -> Analysis:
        on_warning = None if quiet else show_warning
        return api.analyze_recipe(
            recipe, **settings, on_warning=on_warning, on_progress=on_progress, cancelled=cancelled
        )

    found = with_progress(analyze, "analysing", quiet=quiet)
    _write(found.to_json(), wanted)
    return found


def as_json(found: Analysis) -> dict[str, Any]:
    """Return an analysis as scripts read it: with one delta, what is said of that is there by itself, too."""
    data = found.to_json()
    [first, *others] = data["deltas"]
    return data if others else data | {field: first[field] for field in ("tensors", "groups", "total")}


def _require_places(wanted: Wanted, recipe: Recipe) -> None:
    """Refuse at once what would be refused after an hour of reading, and what would replace an input."""
    if wanted.html or wanted.plots:
        require_matplotlib()
    if wanted.csv and wanted.html and Path(wanted.csv).resolve() == Path(wanted.html).resolve():
        raise OutputError("is named twice", file=wanted.html, remedy="Name two files.")
    inputs = [recipe.new_base, *(path for delta in recipe.deltas for path in (delta.post, delta.base))]
    for file in filter(None, (wanted.csv, wanted.html, wanted.plots)):
        _refuse_input(file, inputs)
    for file in filter(None, (wanted.csv, wanted.html)):
        path = Path(file)
        if path.is_dir():
            raise OutputError("is a directory", file=file, remedy="Name a file.")
        if not path.parent.is_dir():
            raise OutputError("its directory does not exist", file=file, remedy="Make it, or name another file.")
    if wanted.plots and Path(wanted.plots).exists() and not Path(wanted.plots).is_dir():
        raise OutputError("is not a directory", file=wanted.plots, remedy="Name a directory.")


def _refuse_input(file: str, inputs: Iterable[str]) -> None:
    """Raise OutputError where a file lies in an input, is one, or is one of those that inputs are made of."""
    path = Path(file).resolve()
    for name in inputs:
        root = Path(name).resolve()
        if path == root or (root.is_dir() and path.is_relative_to(root)):
            raise OutputError("is an input, or lies in one", file=file, remedy="Name a file elsewhere.")
    if path.exists() and path.suffix in _NEVER:
        raise OutputError(f"is there, and {path.suffix} files are not replaced", file=file, remedy="Name another file.")


def _write(found: dict[str, Any], wanted: Wanted) -> None:
    if wanted.csv:
        from paramdelta.insight.csv_table import write_csv

        table = io.StringIO(newline="")
        write_csv(found, table)
        replace_file(Path(wanted.csv), table.getvalue().encode())
    if wanted.html:
        from paramdelta.insight.report import html_report

        replace_file(Path(wanted.html), html_report(found).encode())
    if wanted.plots:
        from paramdelta.insight.plots import export_plots

        export_plots(found, Path(wanted.plots), f".{wanted.plot_format}")
