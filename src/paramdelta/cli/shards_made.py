"""Merges of some shards of an output, and their publication: what is shown of them."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from paramdelta.checkpoint.wording import printable
from paramdelta.cli import display
from paramdelta.errors import RecipeError
from paramdelta.planning.units import format_size, parse_numbers
from paramdelta.sharing import ShardsResult, commit, merge_shards, ranges_text

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from paramdelta.engine.progress import Progress
    from paramdelta.planning.recipe import Recipe
    from paramdelta.results import MergeResult


def run(
    recipe: Recipe,
    output: str,
    shards: str,
    settings: dict[str, Any],
    cancelled: threading.Event,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make some shards, with progress on standard error, and report."""
    for name, option in (("overwrite", "--overwrite"), ("allow_nonfinite", "--allow-nonfinite")):
        if settings[name]:
            remedy = "commit takes it." if name == "allow_nonfinite" else "Choose another output, or remove that one."
            raise RecipeError(f"{option} does not go with --shards", remedy=remedy)
    numbers = parse_numbers(shards, "shards")
    limits = {name: settings[name] for name in ("memory", "workers", "io")}
    on_warning = None if quiet else display.show_warning

    def merge(on_progress: Callable[[Progress], None] | None) -> ShardsResult:
        return merge_shards(
            recipe, output, numbers, **limits, on_warning=on_warning, on_progress=on_progress, cancelled=cancelled
        )

    result = display.with_progress(merge, "merging", quiet=quiet)
    click.echo(json.dumps(asdict(result)) if as_json else _line(result))


def _line(result: ShardsResult) -> str:
    name = printable(result.output)
    if result.already_complete:
        return f"{name}: already published, nothing to do"
    made = f"made {ranges_text(result.made)}" if result.made else "nothing to make"
    rest = result.shards - result.finished
    then = f"{rest} more to make" if rest else f"publish them with: paramdelta commit {name}"
    odd = f"; {result.nonfinite:,} elements became infinite or NaN" if result.nonfinite else ""
    return (
        f"{name}: {made}, {format_size(result.bytes_written)}, {result.seconds:.1f} s,"
        f" peak RAM {format_size(result.peak_rss_bytes)}{odd};"
        f" {result.finished} of {result.shards} shards are finished: {then}"
    )


def ray_shown(
    recipe: Recipe,
    output: str,
    address: str | None,
    settings: dict[str, Any],
    cancelled: threading.Event,
    *,
    quiet: bool,
) -> MergeResult:
    """Merge with a Ray cluster, with progress on standard error."""
    if settings["overwrite"]:
        raise RecipeError(
            "--overwrite does not go with --engine ray", remedy="Choose another output, or remove that one."
        )
    limits = {name: settings[name] for name in ("memory", "workers", "io", "allow_nonfinite")}
    on_warning = None if quiet else display.show_warning

    def merge(on_progress: Callable[[Progress], None] | None) -> MergeResult:
        from paramdelta.cluster import merge_on_ray

        return merge_on_ray(
            recipe,
            output,
            address=address,
            **limits,
            on_warning=on_warning,
            on_progress=on_progress,
            cancelled=cancelled,
        )

    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what happens to its workers
        return display.with_progress(merge, "merging", quiet=quiet)


def commit_shown(output: str, cancelled: threading.Event, *, allow_nonfinite: bool, quiet: bool) -> MergeResult:
    """Publish, with progress on standard error."""
    on_warning = None if quiet else display.show_warning

    def publish(on_progress: Callable[[Progress], None] | None) -> MergeResult:
        return commit(
            output,
            allow_nonfinite=allow_nonfinite,
            on_warning=on_warning,
            on_progress=on_progress,
            cancelled=cancelled,
        )

    return display.with_progress(publish, "publishing", quiet=quiet)
