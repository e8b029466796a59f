"""The commands and their options. What a command needs is imported when it runs: ``--help`` is fast."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import sys
import traceback
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

import click

from paramdelta.errors import CancelledError, ParamDeltaError, RecipeError, VerificationError
from paramdelta.planning.policies import CHOICES, Policies
from paramdelta.storage.source import IO_CHOICES
from paramdelta.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from paramdelta.planning.recipe import Recipe


def main() -> NoReturn:
    """Run the command line and exit with the code that the README documents."""
    gc.set_threshold(100_000)  # what is told of large plans holds no cycles: the usual pace costs a third more
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal cannot show is no reason to fail
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in sys.argv
    try:
        commands(prog_name="paramdelta", standalone_mode=False)
        sys.stdout.flush()
        sys.stderr.flush()
    except click.ClickException as error:
        if not as_json:
            error.show()
            sys.exit(error.exit_code)
        _fail(RecipeError(error.format_message()), as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        _fail(CancelledError("stopped at once"), as_json=as_json)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    os._exit(0)  # to take a large process apart, piece by piece, takes as long as a small merge


def _output_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has, and turn errors into messages and exit codes."""

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        as_json, debug = options["as_json"], options.pop("debug")
        try:
            command(**options)
        except ParamDeltaError as error:
            if debug:
                traceback.print_exc()
            _fail(error, as_json=as_json)
        except (BrokenPipeError, click.ClickException):
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            bug = f"this is a bug in paramdelta: {type(error).__name__}: {error}"
            _fail(ParamDeltaError(bug, remedy="Run again with --debug and report it."), as_json=as_json)

    wrapped = click.option("--debug", is_flag=True, help="Show a traceback with any error.")(wrapped)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(wrapped)


def _fail(error: ParamDeltaError, *, as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps(error.to_json()))
    else:
        click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


class _Alpha(click.ParamType):  # type: ignore[type-arg]
    """A coefficient, or a pattern of tensor names and the coefficient of these."""

    name = "alpha"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str | None, float]:
        pattern, equals, number = str(value).rpartition("=")
        try:
            return (pattern if equals else None), float(number)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor PATTERN=NUMBER", param, ctx)


def _inputs(*, required: bool) -> list[Callable[..., Any]]:
    """Return the options that name the three checkpoints."""
    return [
        click.option("--post", required=required, metavar="P", help="The post-trained checkpoint."),
        click.option("--base", required=required, metavar="B", help="The base that it was trained from."),
        click.option("--new-base", required=required, metavar="N", help="The updated base that gets the delta."),
    ]


def _fits() -> list[Callable[..., Any]]:
    """Return the options that say which tensors are merged, and what to do where checkpoints do not fit."""
    return [
        click.option("--include", multiple=True, metavar="PATTERN", help="Merge only these tensors; may be repeated."),
        click.option(
            "--exclude", multiple=True, metavar="PATTERN", help="Leave these as the new base has them; may be repeated."
        ),
        click.option(
            "--vocab",
            type=click.Choice(CHOICES["vocab"]),
            default="error",
            show_default=True,
            help="Which rows embeddings and head get where their numbers differ.",
        ),
        click.option(
            "--on-missing",
            type=click.Choice(CHOICES["on_missing"]),
            default="error",
            show_default=True,
            help="Whose tensor is taken where some have none.",
        ),
        click.option(
            "--on-mismatch",
            type=click.Choice(CHOICES["on_mismatch"]),
            default="error",
            show_default=True,
            help="Whose tensor is taken where shapes or kinds of dtype differ.",
        ),
    ]


def _added(options: list[Callable[..., Any]], command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with options, in their order."""
    for option in reversed(options):
        command = option(command)
    return command


def _recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what to merge, and pass them on as one request."""

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        names = ("post", "base", "new_base", "dtype", "shard_size", "trust_remote_code")
        given = {name: options.pop(name) for name in names}
        named = ("vocab", "on_missing", "on_mismatch", "fp8", "include", "exclude")
        policies = {name: options.pop(name) for name in named}
        alphas = options.pop("alpha")

        def request() -> dict[str, Any]:
            general = [alpha for pattern, alpha in alphas if pattern is None]
            by_pattern = {pattern: alpha for pattern, alpha in alphas if pattern is not None}
            if len(by_pattern) + len(general) < len(alphas):
                raise RecipeError("alpha: a pattern is given twice", remedy="The last pattern that matches counts.")
            alpha = general[-1] if general else 1.0
            return {**given, "alpha": alpha, "alphas": by_pattern, "policies": Policies(**policies)}

        command(request=request, **options)

    told = "Coefficient of the delta, or of tensors whose names match; may be repeated.  [default: 1]"
    return _added([*_inputs(required=True), _alphas(told), *_fits(), *_forms()], wrapped)


def _alphas(told: str) -> Callable[..., Any]:
    """Return the option that gives coefficients."""
    return click.option("--alpha", type=_Alpha(), multiple=True, metavar="[PATTERN=]FLOAT", help=told)


def _forms() -> list[Callable[..., Any]]:
    """Return the options that say in what form an output is written."""
    return [
        click.option(
            "--fp8",
            type=click.Choice(CHOICES["fp8"]),
            default="dequantise",
            show_default=True,
            help="How weights are written that the new base has in block-scaled FP8: in bf16, or in FP8 again.",
        ),
        click.option(
            "--dtype",
            metavar="DTYPE",
            help="Output dtype: bf16, f16, f32 or f64; bfloat16, fp16, half … are understood too."
            "  [default: the new base's]",
        ),
        click.option(
            "--shard-size",
            metavar="SIZE",
            help="Most data in one file, like 5GB.  [default: as the new base]",
        ),
        click.option("--trust-remote-code", is_flag=True, help="Take the checkpoints' own Python files along."),
    ]


def _sweep_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what to sweep over, and pass them on as recipes to be read."""

    @functools.wraps(command)
    def wrapped(*, recipe: str | None, output: str, **options: Any) -> None:
        names = ("post", "base", "new_base", "dtype", "shard_size", "trust_remote_code")
        given = {name: options.pop(name) for name in names}
        named = ("vocab", "on_missing", "on_mismatch", "fp8", "include", "exclude")
        policies = {name: options.pop(name) for name in named}
        alphas = options.pop("alpha")

        def read() -> dict[str, Recipe]:
            from paramdelta.cli import sweeping

            return sweeping.requested(recipe, given, alphas, policies, output)

        command(read=read, **options)

    argument = click.argument("recipe", metavar="[RECIPE]", required=False)
    told = "A coefficient of the delta, one output each; or of tensors whose names match, in all outputs. Repeat it."
    return _added([argument, *_inputs(required=False), _alphas(told), *_fits(), *_forms()], wrapped)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how merges are carried out, and pass them on as one."""

    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        names = ("memory", "workers", "io", "overwrite", "allow_nonfinite")
        command(settings={name: options.pop(name) for name in names}, **options)

    options = [
        *_limits(),
        click.option("--overwrite", is_flag=True, help="Replace what an earlier merge wrote to OUT."),
        click.option(
            "--allow-nonfinite", is_flag=True, help="Publish a result in which elements became infinite or NaN."
        ),
        click.option("--quiet", is_flag=True, help="No progress, no warnings."),
    ]
    return _added(options, wrapped)


def _limits() -> list[Callable[..., Any]]:
    """Return the options that say what a run may take of the machine."""
    return [
        click.option(
            "--memory",
            metavar="SIZE",
            help="Most RAM of the whole process.  [default: 400MB, less where little is free]",
        ),
        click.option("--workers", type=click.IntRange(1, 256), metavar="N", help="Worker threads.  [default: chosen]"),
        click.option(
            "--io", type=click.Choice(IO_CHOICES), default="auto", show_default=True, help="How inputs are read."
        ),
    ]


def _analysis_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what to analyse, and pass them on as a recipe to be read."""

    @functools.wraps(command)
    def wrapped(*, recipe: str | None, **options: Any) -> None:
        names = ("post", "base", "new_base")
        given = {name: options.pop(name) for name in names}
        policies = {name: options.pop(name) for name in ("include", "exclude", "vocab", "on_missing", "on_mismatch")}
        settings = {name: options.pop(name) for name in ("memory", "workers", "io")}

        def read() -> Recipe:
            from paramdelta.cli import analysis

            return analysis.requested(recipe, given, policies)

        command(read=read, settings=settings, **options)

    argument = click.argument("recipe", metavar="[RECIPE]", required=False)
    return _added([argument, *_inputs(required=False), *_fits(), *_limits()], wrapped)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
def commands() -> None:
    """Give an updated base model the post-training of its predecessor: post - base + new_base.

    P, B and N are checkpoints: a directory of .safetensors files, an index, or one file. They may be far larger than
    RAM. Results go to standard output, progress and messages to standard error.
    """


@commands.command()
@_recipe_options
@click.option("-o", "--output", required=True, metavar="OUT", help="Directory to write; must not exist, or be empty.")
@click.option(
    "--shards",
    metavar="NUMBERS",
    help="Make only these shards of OUT, like 1-10,17, in the order of plan; commit publishes once all are made.",
)
@click.option(
    "--engine",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="Where shards are made: here, or as tasks of a Ray cluster, whose nodes all see inputs and OUT.",
)
@click.option("--address", metavar="ADDRESS", help="The Ray cluster.  [default: RAY_ADDRESS, or one of this machine]")
@_run_options
@_output_options
def merge(
    *,
    request: Callable[[], dict[str, Any]],
    output: str,
    shards: str | None,
    engine: str,
    address: str | None,
    settings: dict[str, Any],
    quiet: bool,
    as_json: bool,
) -> None:
    """Write new_base + alpha * (post - base) to OUT.

    With alpha 1 every element is the exact result, rounded once.

    Exit codes: 0 done, or already done; 2 usage; 3 an input is missing, damaged or not supported; 4 the checkpoints do
    not fit each other; 5 the output cannot be written; 6 an input changed; 8 non-finite results; 9 the memory budget is
    too small; 130 or 143 stopped by Ctrl-C or SIGTERM; 1 a bug.
    """
    from paramdelta.cli import display, shards_made
    from paramdelta.cli.signals import cancel_on_signals
    from paramdelta.planning.recipe import Recipe

    if address is not None and engine != "ray":
        raise RecipeError("--address is that of a Ray cluster", remedy="Add --engine ray.")
    if shards is not None and engine == "ray":
        raise RecipeError("--shards does not go with --engine ray, which makes all of them")
    if shards is not None:
        with cancel_on_signals() as cancelled:
            shards_made.run(Recipe.of(**request()), output, shards, settings, cancelled, quiet=quiet, as_json=as_json)
        return
    with cancel_on_signals() as cancelled:
        if engine == "ray":
            result = shards_made.ray_shown(Recipe.of(**request()), output, address, settings, cancelled, quiet=quiet)
        else:
            result = display.merge_shown(Recipe.of(**request()), output, settings, cancelled, quiet=quiet)
    if as_json:
        click.echo(json.dumps(display.merge_json(result)))
    else:
        click.echo(display.merge_line(result))


@commands.command()
@click.argument("output", metavar="OUT")
@click.option("--allow-nonfinite", is_flag=True, help="Publish a result in which elements became infinite or NaN.")
@click.option("--quiet", is_flag=True, help="No progress, no warnings.")
@_output_options
def commit(*, output: str, allow_nonfinite: bool, quiet: bool, as_json: bool) -> None:
    """Publish OUT, of which runs of merge --shards have made all shards.

    Exit codes: 5 where shards are missing, or are still being made; else as for merge.
    """
    from paramdelta.cli import display, shards_made
    from paramdelta.cli.signals import cancel_on_signals

    with cancel_on_signals() as cancelled:
        result = shards_made.commit_shown(output, cancelled, allow_nonfinite=allow_nonfinite, quiet=quiet)
    if as_json:
        click.echo(json.dumps(display.merge_json(result)))
    else:
        click.echo(display.merge_line(result))


@commands.command()
@_sweep_options
@click.option("-o", "--output", required=True, metavar="DIR", help="Write each output below DIR.")
@_run_options
@_output_options
def sweep(
    *,
    read: Callable[[], dict[str, Recipe]],
    settings: dict[str, Any],
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge with several coefficients in one pass: every input is read once.

    Give P, B, N and each --alpha: the outputs are DIR/alpha-0.5, DIR/alpha-1, …, by the shortest decimal of the number.
    Or give a RECIPE file (YAML) of merges that differ in alphas and output alone: they go below DIR by the last part of
    their outputs. Each output is what merge writes by itself, and --memory bounds the process as there. The same
    command goes on where one was interrupted; outputs that are finished stay as they are.

    What goes wrong with one output once all are computed, like infinities in it, leaves the others published; whatever
    ends the pass, like a full disk, ends it for all, and their finished shards are kept.

    Exit codes: the first failure's, as for merge. 2 also where a coefficient is given twice, or merges differ in more.
    """
    from paramdelta.cli import sweeping
    from paramdelta.cli.signals import cancel_on_signals

    with cancel_on_signals() as cancelled:
        code = sweeping.run(read(), settings, cancelled, quiet=quiet, as_json=as_json)
    if code:
        sys.exit(code)


@commands.command()
@_recipe_options
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="Where the output would go: what is there, and how much room.",
)
@click.option(
    "--bandwidth",
    metavar="RATE",
    help="Bytes per second of the network, like 100MB, for how long remote inputs take; or measure: read for 3 s.",
)
@_output_options
def plan(
    *,
    request: Callable[[], dict[str, Any]],
    output: str | None,
    bandwidth: str | None,
    as_json: bool,
) -> None:
    """Say what a merge would do, from headers alone: operations, sizes, RAM, disk, network."""
    from paramdelta import api
    from paramdelta.cli import display
    from paramdelta.network import network_of

    made = api.plan(**request())
    memory = api.estimate_memory(made)
    warnings = api.warnings_for(made, output, memory_bytes=memory)
    network = network_of(made, bandwidth)
    if as_json:
        click.echo(json.dumps(display.plan_json(made, memory, warnings) | {"network": dataclasses.asdict(network)}))
    else:
        display.show_plan(made, memory, warnings, network)


@commands.command()
@click.argument("checkpoint")
@_output_options
def inspect(*, checkpoint: str, as_json: bool) -> None:
    """Say what is in CHECKPOINT, from its headers alone."""
    from paramdelta import api
    from paramdelta.cli import display

    opened = api.inspect(checkpoint)
    if as_json:
        click.echo(json.dumps(display.checkpoint_json(opened)))
    else:
        display.show_checkpoint(opened)


@commands.command()
@click.argument("table", metavar="SCORES.csv")
@click.option(
    "--min-gain",
    type=float,
    metavar="POINTS",
    help="Leave benchmarks out of the mean that is recovered where reference and new base are closer."
    "  [default: 1% of the largest score]",
)
@click.option("--plot", metavar="FILE", help="Draw a chart, too: .svg, .png or .pdf; replaces FILE. Needs matplotlib.")
@_output_options
def score(*, table: str, min_gain: float | None, plot: str | None, as_json: bool) -> None:
    """Say how much of post-training a merge carries over, from benchmark scores.

    SCORES.csv, or - for a pipe, has the columns benchmark, new_base, merged and reference: the scores of the new base,
    of the merged model, and of the new base post-trained directly. It may have group and seed, too.

    Transfer efficiency is told in both senses: the slope of merged over reference scores, and the share of the gain
    from new base to reference that the merge recovers. Intervals have a confidence of 95%, by resampling benchmarks.

    Exit codes: 0 done; 2 usage, a table that does not parse; 3 the table is missing or cannot be read; 5 the chart
    cannot be written; 1 a bug.
    """
    from paramdelta import api
    from paramdelta.cli import scores

    report = api.score(scores.piped() if table == "-" else table, min_gain=min_gain, plot=plot)
    if as_json:
        click.echo(json.dumps(scores.report_json(report, plot)))
    else:
        scores.show_report(report)


@commands.command()
@_analysis_options
@click.option("--tensors", is_flag=True, help="Print a line for each tensor, too.")
@click.option("--csv", metavar="FILE", help="Write a row for each tensor and delta to FILE, which is replaced.")
@click.option("--html", metavar="FILE", help="Write a report with plots to FILE, to be opened in a browser.")
@click.option("--plots", metavar="DIR", help="Write the plots to DIR, which is made, each to a file of its own.")
@click.option(
    "--plot-format", type=click.Choice(["svg", "png"]), default="svg", show_default=True, help="What --plots writes."
)
@click.option("--quiet", is_flag=True, help="No progress, no warnings.")
@_output_options
def analyze(
    *,
    read: Callable[[], Recipe],
    settings: dict[str, Any],
    csv: str | None,
    html: str | None,
    plots: str | None,
    plot_format: str,
    tensors: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what a delta is like before it is merged: norms, angles, and what speaks against it.

    Everything is read and computed as in a merge; no weights are written. Give P, B and N, or a RECIPE file (YAML) with
    any number of deltas, of which the angles between each two are told as well. No number depends on a coefficient but
    those of infinities; a recipe may have them.

    Warnings: wrong-lineage (the checkpoints are no relatives), post-equals-base, new-base-equals-base, layer-untouched,
    nonfinite (a merge would stop), vocabulary-rows (some have changed far more than most). They are no failure.

    Exit codes: 0 done; 2 usage, a recipe that does not parse; 3 an input is missing, damaged or not supported; 4 the
    checkpoints do not fit each other; 5 a file cannot be written; 6 an input changed; 9 the memory budget is too small;
    130 or 143 stopped by Ctrl-C or SIGTERM; 1 a bug.
    """
    from paramdelta.cli import analysis
    from paramdelta.cli.analysis_view import show_analysis
    from paramdelta.cli.signals import cancel_on_signals

    wanted = analysis.Wanted(csv, html, plots, plot_format)
    with cancel_on_signals() as cancelled:
        found = analysis.analyze_shown(read(), settings, wanted, cancelled, quiet=quiet)
    if as_json:
        click.echo(json.dumps(analysis.as_json(found)))
    else:
        show_analysis(found.to_json() | ({"warnings": []} if quiet else {}), tensors=tensors)


@commands.command()
@click.argument("output", metavar="OUT")
@click.option("--recompute", is_flag=True, help="Compute every element again, from the inputs in OUT/recipe.yaml.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Recompute a random share of the tensors only, like 0.05.",
)
@click.option("--memory", metavar="SIZE", help="Most RAM of the process while it recomputes, as for merge.")
@click.option("--workers", type=click.IntRange(1, 256), metavar="N", help="Threads.  [default: chosen]")
@click.option("--io", type=click.Choice(IO_CHOICES), default="auto", show_default=True, help="How files are read.")
@click.option("--quiet", is_flag=True, help="No progress.")
@_output_options
def verify(*, output: str, quiet: bool, as_json: bool, **settings: Any) -> None:
    """Read OUT again and check all of it: digests, headers, index, sidecars.

    With --recompute or --sample the arithmetic is done again, too. The exit code is 7 where something is not as it was
    written; what, is told by file, tensor and byte. Files that the merge did not write are named, and no failure.
    """
    from paramdelta.cli import display
    from paramdelta.cli.signals import cancel_on_signals

    with cancel_on_signals() as cancelled:
        result = display.verify_shown(output, settings, cancelled, quiet=quiet)
    click.echo(json.dumps(display.verify_json(result)) if as_json else display.verify_line(result))
    if not result.ok:
        sys.exit(VerificationError.exit_code)


@commands.command()
@click.option(
    "--dir", "directory", default=".", metavar="DIR", help="On the disk in question.  [default: the current directory]"
)
@click.option("--size", metavar="SIZE", help="Bytes of each file, like 1GB.  [default: as many as a minute allows]")
@_output_options
def bench(*, directory: str, size: str | None, as_json: bool) -> None:
    """Say what this machine can do: arithmetic beside memcpy, a merge beside the disk alone, and what 70B would take.

    Four files of random weights are written below DIR and removed again.
    """
    from paramdelta import benchmark
    from paramdelta.cli import display
    from paramdelta.cli.signals import cancel_on_signals
    from paramdelta.planning.units import parse_size

    with cancel_on_signals() as cancelled:
        say = None if as_json else functools.partial(click.echo, err=True)
        result = benchmark.run(directory, None if size is None else parse_size(size, "size"), say, cancelled)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        display.show_benchmark(result)


@commands.command()
@click.option("-o", "--output", metavar="DIR", help="Keep the triple and the result there.  [default: a temporary one]")
@_output_options
def demo(*, output: str | None, as_json: bool) -> None:
    """Make a small Llama-shaped triple, merge it, and check every element of the result."""
    from paramdelta import demo as demonstration
    from paramdelta.cli import display
    from paramdelta.cli.signals import cancel_on_signals

    with cancel_on_signals() as cancelled:
        say = None if as_json else functools.partial(click.echo, err=True)
        result = demonstration.run(output, say=say, cancelled=cancelled)
    if as_json:
        click.echo(json.dumps(display.merge_json(result.merge) | {"elements_checked": result.elements}))
    else:
        click.echo(display.merge_line(result.merge))
        if output is None:
            click.echo("all of it is removed again; paramdelta demo -o DIR keeps it", err=True)
        click.echo(f"checked {result.elements:,} elements against exact arithmetic: all equal, bit for bit")


@commands.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    help="Write each output below DIR, by the last part of its name; one that has none, to DIR itself.",
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="Go on with the other merges where one fails. A recipe that does not parse stops all of them.",
)
@click.option("--dry-run", is_flag=True, help="Say what every merge would do, as plan does; write nothing.")
@_run_options
@_output_options
def run(
    *,
    recipes: tuple[str, ...],
    output: str | None,
    keep_going: bool,
    dry_run: bool,
    settings: dict[str, Any],
    quiet: bool,
    as_json: bool,
) -> None:
    """Carry out the merges of recipe files (YAML), in order.

    All files are read before the first merge begins. Paths in a file are relative to its directory. A merge may read
    what an earlier one writes. An option that a message names, like --vocab pad, is a key in a recipe: `vocab: pad`,
    and `on_missing` for --on-missing.

    Exit codes: the first failure's. 0 all done, or already done; 2 usage, a recipe that does not parse; 3 an input is
    missing, damaged or not supported, or its merge failed; 4 the checkpoints do not fit each other; 5 the output cannot
    be written; 6 an input changed; 8 non-finite results; 9 the memory budget is too small; 130 or 143 stopped by Ctrl-C
    or SIGTERM; 1 a bug.
    """
    if dry_run:
        from paramdelta.cli import dry_run as dry

        code = dry.show(recipes, output, overwrite=settings["overwrite"], quiet=quiet, as_json=as_json)
    else:
        from paramdelta.cli import batch

        code = batch.run(recipes, output, settings, keep_going=keep_going, quiet=quiet, as_json=as_json)
    if code:
        sys.exit(code)
