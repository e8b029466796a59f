"""What people see: progress, tables, one line of result. Control characters from files never reach the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from paramdelta.checkpoint.wording import clipped, listed, printable, quoted
from paramdelta.errors import ParamDeltaError
from paramdelta.planning.units import format_size

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from paramdelta.benchmark import Benchmark
    from paramdelta.checkpoint.checkpoint import Checkpoint
    from paramdelta.engine.progress import Progress
    from paramdelta.insight.notice import Notice
    from paramdelta.network import Network
    from paramdelta.planning.plan import Plan
    from paramdelta.planning.recipe import Recipe
    from paramdelta.planning.warnings import PlanWarning
    from paramdelta.results import MergeResult, SweepResult, Verification

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 5.0


def merge_shown(
    recipe: Recipe, output: str, settings: dict[str, Any], cancelled: threading.Event, *, quiet: bool
) -> MergeResult:
    """Carry a recipe out, with progress, the plan's warnings and non-finite results on standard error."""
    from paramdelta import api

    def merge(on_progress: Callable[[Progress], None] | None) -> MergeResult:
        on_warning = None if quiet else show_warning
        return api.merge_recipe(
            recipe, output, **settings, on_warning=on_warning, on_progress=on_progress, cancelled=cancelled
        )

    result = with_progress(merge, "merging", quiet=quiet)
    if not quiet:
        _show_nonfinite(result)
    return result


def sweep_shown(
    recipes: dict[str, Recipe], settings: dict[str, Any], cancelled: threading.Event, *, quiet: bool
) -> SweepResult:
    """Carry recipes out in one pass, with what `merge_shown` puts on standard error."""
    from paramdelta import api

    def sweep(on_progress: Callable[[Progress], None] | None) -> SweepResult:
        on_warning = None if quiet else show_warning
        return api.sweep_recipes(
            recipes, **settings, on_warning=on_warning, on_progress=on_progress, cancelled=cancelled
        )

    result = with_progress(sweep, "merging", quiet=quiet)
    for made in result.merges.values():
        if not quiet and not isinstance(made, ParamDeltaError):
            _show_nonfinite(made)
    return result


def verify_shown(output: str, settings: dict[str, Any], cancelled: threading.Event, *, quiet: bool) -> Verification:
    """Verify an output, with progress on standard error."""
    from paramdelta import api

    def verify(on_progress: Callable[[Progress], None] | None) -> Verification:
        return api.verify(output, **settings, on_progress=on_progress, cancelled=cancelled)

    return with_progress(verify, "verifying", quiet=quiet)


def verify_line(result: Verification) -> str:
    """Return the result of a verification: a sentence, or what failed."""
    from paramdelta.engine.failure import summed_up

    name = printable(result.output)
    if not result.ok:
        number = f"{len(result.failures):,} failures" if len(result.failures) > 1 else "1 failure"
        remedy = "Merge again with --overwrite to have it made anew."
        return f"{name}: {number}\n{summed_up(result.failures)}\n{remedy}{_strangers(result)}"
    again = f", {result.recomputed:,} tensors computed again" if result.recomputed else ""
    return (
        f"{name}: all as it was written: {result.shards} {'file' if result.shards == 1 else 'files'} of tensors,"
        f" {format_size(result.bytes_read)} read{again}, {result.seconds:.1f} s"
        f" ({format_size(result.bytes_read / result.seconds)}/s), peak RAM {format_size(result.peak_rss_bytes)}"
        f"{_strangers(result)}"
    )


def _strangers(result: Verification) -> str:
    """Return which files nobody can say are right, since the merge did not write them."""
    names = [printable(clipped(name)) for name in result.strangers]
    number = f"{len(names):,} files" if len(names) > 1 else "1 file"
    return f"\n{number} that this merge did not write: {listed(names)}" if names else ""


def verify_json(result: Verification) -> dict[str, Any]:
    """Return the result of a verification as scripts read it."""
    return asdict(result) | {"failures": [failure._asdict() for failure in result.failures]}


def with_progress(work: Callable[[Callable[[Progress], None] | None], T], doing: str, *, quiet: bool) -> T:
    """Do something under a progress bar on a terminal, under plain lines elsewhere, under nothing where ``quiet``."""
    if quiet:
        return work(None)
    if not sys.stderr.isatty():
        return work(_telling_of_resumption(_Lines(doing)))
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(doing),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shards]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, shards="")

        def show(progress: Progress) -> None:
            if bar.tasks[task].total != progress.total:  # what earlier runs have done says nothing of this one's speed
                bar.reset(task, total=progress.total, completed=progress.resumed)
            shards = f"{progress.shards_done}/{progress.shards} shards"
            bar.update(task, completed=progress.done, total=progress.total, shards=shards)

        return work(_telling_of_resumption(show))


def _telling_of_resumption(show: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Return what shows progress, and says first what an earlier run has done."""
    told = False

    def tell(progress: Progress) -> None:
        nonlocal told
        if progress.resumed and not told:
            done, total = format_size(progress.resumed), format_size(progress.total)
            print(f"goes on from an earlier run: {done} of {total} are there", file=sys.stderr, flush=True)
        told = True
        show(progress)

    return tell


class _Lines:
    """Progress as a line every few seconds, for logs."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._started = self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = max(1, progress.done - progress.resumed) / (now - self._started)
        left = (progress.total - progress.done) / rate
        print(
            f"{self._doing}: {progress.done / progress.total:.0%},"
            f" {format_size(progress.done)} of {format_size(progress.total)},"
            f" {format_size(rate)}/s, {_duration(left)} left,"
            f" {progress.shards_done}/{progress.shards} shards",
            file=sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def merge_line(result: MergeResult) -> str:
    """Return the result of a merge in a sentence."""
    if result.already_complete:
        return f"{printable(result.output)} already holds this merge: nothing to do"
    moved = result.bytes_read + result.bytes_written
    return (
        f"{printable(result.output)}: {result.tensors:,} tensors, {format_size(result.bytes_written)}"
        f" in {result.shards} {'file' if result.shards == 1 else 'files'},"
        f" {result.seconds:.1f} s ({format_size(moved / result.seconds)}/s read and written),"
        f" peak RAM {format_size(result.peak_rss_bytes)}{_resumed(result)}{_losses(result)}{_deltas(result)}"
    )


def _deltas(result: MergeResult) -> str:
    """Return a line for each delta: how long it is, how much it changes, and how it lies to what the base became."""
    several = len(result.deltas) > 1
    return "".join(
        f"\ndelta{f' {number}' if several else ''}: {delta['changed_share']:.1%} of elements changed"
        f", norm {_number(delta['delta_norm'])}; base moved by {_number(delta['base_shift_norm'])}"
        f", cosine of the two {_number(delta['cosine'])}"
        for number, delta in enumerate(result.deltas, 1)
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _resumed(result: MergeResult) -> str:
    """Return what earlier runs had done already."""
    number = result.resumed_shards
    return f"; {number} of {result.shards} shards were there from an earlier run" if number else ""


def _losses(result: MergeResult) -> str:
    """Return what block-scaled FP8 lost, where some was written."""
    lost = result.requantised
    if lost is None:
        return ""
    worst = f"{quoted(lost['worst_tensor'])} {lost['worst_relative_error']:.2%}"
    return f"; relative error of {lost['tensors']:,} weights in FP8 {lost['relative_error']:.2%} (most in {worst})"


def _show_nonfinite(result: MergeResult) -> None:
    """Print on standard error which tensors hold new infinities or NaNs."""
    tensors = [
        f"{quoted(name)} ({counts['infinities']:,} Inf, {counts['nans']:,} NaN)"
        for name, counts in result.nonfinite.items()
    ]
    if tensors:
        print(f"warning: elements became infinite or NaN in {listed(tensors)} (nonfinite)", file=sys.stderr)


def merge_json(result: MergeResult) -> dict[str, Any]:
    """Return the result of a merge as scripts read it."""
    return asdict(result)


def show_plan(plan: Plan, memory: int, warnings: Sequence[PlanWarning], network: Network | None = None) -> None:
    """Print what a merge would do."""
    from rich.table import Table

    table = Table(title=None, box=None, pad_edge=False)
    for column, justify in (
        ("output", "left"),
        ("tensors", "right"),
        ("size", "right"),
        ("operations", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for shard in plan.shards:
        ops = Counter(plan.operations[place].op for place in shard.operations)
        described = ", ".join(f"{count} {op}" for op, count in ops.items())
        table.add_row(plain(shard.name), f"{len(shard.begins):,}", format_size(shard.data_bytes), described)
    screen = console()
    screen.print(table)
    for car in plan.sidecars:
        screen.print(plain(car.name).append(f" from {car.donor}"), highlight=False)
    screen.print(
        f"{len(plan.operations):,} tensors; reads {format_size(plan.bytes_read)},"
        f" writes {format_size(plan.bytes_written)}, holds {format_size(memory)} of RAM",
        highlight=False,
    )
    if network is not None and network.bytes:
        screen.print(_network_text(network), highlight=False)
    for warning in warnings:
        show_warning(warning)


def _network_text(network: Network) -> str:
    if network.bandwidth is None or network.seconds is None:
        return f"{format_size(network.bytes)} come over the network: --bandwidth says for how long"
    spent = timedelta(seconds=max(1, round(network.seconds)))
    return f"{format_size(network.bytes)} come over the network: {spent} at {format_size(network.bandwidth)}/s"


def plan_json(plan: Plan, memory: int, warnings: Sequence[PlanWarning]) -> dict[str, Any]:
    """Return what a merge would do as scripts read it."""
    return plan.described() | {"memory_bytes": memory, "warnings": [warned._asdict() for warned in warnings]}


def show_benchmark(result: Benchmark) -> None:
    """Print what a machine can do."""
    from rich.table import Table

    measured = Table(box=None, pad_edge=False)
    for column in ("measured", "rate", "of its limit"):
        measured.add_column(column, justify="left" if column == "measured" else "right")
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    for name, rate, share in (
        (f"memcpy, {threads}", result.memcpy_rate, None),
        (f"post - base + new base in bf16, {threads}", result.kernel_rate, result.kernel_rate / result.memcpy_rate),
        ("disk: one file written", result.write_rate, None),
        ("disk: three files read", result.read_rate, None),
        ("disk: three read, one written, at once", result.disk_rate, None),
        (f"merge ({result.io})", result.merge_rate, result.share_of_disk),
    ):
        measured.add_row(name, f"{format_size(rate)}/s", "" if share is None else f"{share:.2f}")
    expected = Table(box=None, pad_edge=False)
    for column in ("a merge of", "moves", "room for the output", "takes about"):
        expected.add_column(column, justify="left" if column == "a merge of" else "right")
    for each in result.estimates:
        room, moved = format_size(each.room_bytes), format_size(each.bytes_moved)
        expected.add_row(f"three {each.model} models, bf16", moved, room, _duration(each.seconds))
    screen = console()
    screen.print(measured)
    screen.print()
    screen.print(expected)
    screen.print(
        f"four files of {format_size(result.file_bytes)} in {printable(result.directory)}, removed again;"
        f" peak RAM {format_size(result.peak_rss_bytes)}",
        highlight=False,
    )


def show_warning(warning: PlanWarning | Notice) -> None:
    """Print a warning on standard error."""
    print(f"warning: {printable(warning.message)} ({warning.code})", file=sys.stderr)


def show_checkpoint(checkpoint: Checkpoint) -> None:
    """Print what is in a checkpoint: plain columns, since a table of 90,000 rows takes rich half a minute."""
    rows = [("tensor", "dtype", "shape", "size", "file")]
    for name, ref in checkpoint.tensors.items():
        shape = " × ".join(map(str, ref.shape)) or "scalar"
        rows.append((printable(name), ref.dtype, shape, format_size(ref.nbytes), checkpoint.shards[ref.shard].name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for tensor, dtype, shape, size, file in rows:
        columns = tensor.ljust(widths[0]), dtype.ljust(widths[1]), shape.ljust(widths[2]), size.rjust(widths[3])
        print("  ".join((*columns, printable(file))))
    dtypes = Counter(ref.dtype for ref in checkpoint.tensors.values())
    total = sum(ref.nbytes for ref in checkpoint.tensors.values())
    print(
        f"{len(checkpoint.tensors):,} tensors ({', '.join(f'{n:,} {d}' for d, n in dtypes.items())}),"
        f" {format_size(total)} in {len(checkpoint.shards)} {'file' if len(checkpoint.shards) == 1 else 'files'}"
    )


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what is in a checkpoint as scripts read it."""
    return {
        "path": str(checkpoint.path),
        "index": checkpoint.index,
        "shards": [{"name": s.name, "bytes": s.identity.size, "metadata": dict(s.metadata)} for s in checkpoint.shards],
        "tensors": [
            {
                "name": name,
                "dtype": ref.dtype,
                "shape": list(ref.shape),
                "bytes": ref.nbytes,
                "shard": checkpoint.shards[ref.shard].name,
                "offset": ref.offset,
            }
            for name, ref in checkpoint.tensors.items()
        ],
        "bytes": sum(ref.nbytes for ref in checkpoint.tensors.values()),
        "config": _standard(checkpoint.config),
    }


def _standard(value: Any) -> Any:
    """Return a value of Python's json with NaN and infinities, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Any:
    """Return where tables are printed: standard output, as wide as the terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def plain(name: str) -> Any:
    """Return a name from a file as text that carries neither markup nor control characters."""
    from rich.text import Text

    return Text(printable(name))
