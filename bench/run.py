"""Compares paramdelta with its peers and with the disk: `python -m bench.run`.

See README.md beside this file for what is measured and how the comparison is kept fair.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.bystander import Bystander, make_bystander
from bench.contenders import MERGED, REFERENCE, Contender, Tools, all_contenders, default_tools
from bench.floor import Method, Traffic, best_methods, measure_floor
from bench.machine import describe, memory_bytes, versions
from bench.measure import Measurement, drop_caches, measure, warm
from bench.report import render
from bench.results import Agreement, Failure, FloorRun, Results, Run
from bench.tensors import count_different
from bench.triple import MODELS, Triple, TripleSpec, make_triple

ROOT = Path(__file__).resolve().parent.parent
MODES = ("warm", "cold")
SETTLE_SECONDS = 3.0  # after the run before: freed blocks are discarded, and virtual disks pay off bursts


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    model: str
    shards: int
    rounds: int
    directory: Path
    modes: tuple[str, ...]
    only: tuple[str, ...]
    tools: Tools
    out: Path
    clean: bool


@dataclass
class Bench:
    """One benchmark as it goes along: what is compared, and what has been found so far."""

    triple: Triple
    scratch: Path
    contenders: list[Contender]
    bystander: Bystander
    runs: list[Run] = field(default_factory=list)
    floors: list[FloorRun] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, contender: Contender, output: Path) -> Measurement:
        """Run one contender once. A contender that fails is not tried again."""
        shutil.rmtree(output, ignore_errors=True)
        os.sync()  # dirty pages of earlier runs are not this one's to write
        command = contender.command(self.triple, output, self.scratch)
        result = measure(command, output=output, environment=dict(contender.environment))
        if not result.ok:
            self.failures.append(Failure(contender.name, result.exit_code, self.last_words(result)))
            self.contenders.remove(contender)
        return result

    def last_words(self, result: Measurement) -> str:
        """Return the end of a failed run's stderr, without this machine's paths: it will be published."""
        return result.last_words().replace(f"{self.scratch}/", "").replace(f"{ROOT}/", "")

    def rehearse(self) -> None:
        """Run everything once untimed, so that all have their caches of compiled code, and compare outputs."""
        merged = self.scratch / MERGED
        for contender in list(self.contenders):
            output = merged if contender.name == REFERENCE else self.scratch / "rehearsal"
            say(f"rehearsal: {contender.name}")
            if self.run(contender, output).ok and contender.merges and output != merged and merged.is_dir():
                self.compare(merged, output, contender.name)
            if output != merged:
                shutil.rmtree(output, ignore_errors=True)

    def compare(self, reference: Path, output: Path, name: str) -> None:
        """Count the elements in which an output differs from paramdelta's."""
        try:
            self.agreements.append(Agreement(name, *count_different(reference, output)))
        except ValueError as error:
            self.notes.append(f"The output of {name} could not be compared: {error}.")

    def play(self, number: int, mode: str, methods: list[Method]) -> None:
        """Play one round: everybody once, the disk alone among them, in an order of its own."""
        players: list[Contender | None] = [*self.contenders, *([None] if methods else [])]
        for place in balanced_order(len(players), number):
            contender = players[place]
            if contender is None:
                self.play_floor(number, mode, methods)
            else:
                self.play_contender(number, mode, contender)

    def play_contender(self, number: int, mode: str, contender: Contender) -> None:
        """Time one contender once."""
        output = self.scratch / "output"
        if mode == "cold":
            drop_caches()
        else:
            warm(contender.files(self.triple, self.scratch))
        self.bystander.heat()
        time.sleep(SETTLE_SECONDS)
        result = self.run(contender, output)
        share = self.bystander.share()
        shutil.rmtree(output, ignore_errors=True)
        say(f"round {number + 1}, {mode}: {contender.name:20} {result.wall_seconds:7.2f} s")
        if result.ok:
            self.runs.append(Run(contender.name, mode, number, result, share))

    def play_floor(self, number: int, mode: str, methods: list[Method]) -> None:
        """Time the disk in this round, by every method that stands a chance."""
        traffic = floor_traffic(self.triple, mode)
        for method in methods:
            if mode == "cold":
                drop_caches()
            os.sync()
            time.sleep(SETTLE_SECONDS)
            floor = measure_floor(traffic, method, self.scratch)
            say(f"round {number + 1}, {mode}: {'floor':20} {floor.seconds:7.2f} s ({method})")
            self.floors.append(FloorRun(mode, number, floor))


def balanced_order(count: int, number: int) -> list[int]:
    """Return the order of one round (E. J. Williams, 1949): over all rounds everybody follows everybody equally often.

    A device may still be paying for the run before. It takes ``count`` rounds, twice as many where that is odd.
    """
    first = [(place + 1) // 2 if place % 2 else (count - place // 2) % count for place in range(count)]
    order = [(place + number) % count for place in first]
    return order[::-1] if count % 2 and (number // count) % 2 else order


def say(message: str) -> None:
    """Report progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


def floor_traffic(triple: Triple, mode: str) -> Traffic:
    """Return what the device has to move: everything when cold, the output alone when warm."""
    return Traffic(tuple(triple.files()) if mode == "cold" else (), triple.tensor_bytes)


def possible_contenders(wanted: list[Contender], shards: int, notes: list[str]) -> list[Contender]:
    """Return those that can do this; a note says why one cannot."""
    possible = []
    for contender in wanted:
        if contender.single_file and shards > 1:
            notes.append(f"No {contender.name}: it merges single files, and these checkpoints have {shards} each.")
        elif MERGED in contender.reads and REFERENCE not in {each.name for each in wanted}:
            notes.append(f"No {contender.name}: it reads what {REFERENCE} wrote, which does not take part.")
        else:
            possible.append(contender)
    return possible


def possible_modes(options: Options, triple: Triple, notes: list[str]) -> list[str]:
    """Return the modes that mean something on this machine; a note says why one does not."""
    modes = list(options.modes)
    if "cold" in modes and not drop_caches():
        modes.remove("cold")
        notes.append("No cold runs: the page cache can only be dropped by root.")
    inputs = sum(path.stat().st_size for path in triple.files())
    if "warm" in modes and inputs > 0.6 * memory_bytes():
        modes.remove("warm")
        notes.append("No warm runs: the inputs do not fit into the page cache beside a contender.")
    return modes


def check_disk(model: str, directory: Path) -> None:
    """Stop before a triple, the output that is kept, and two more would fill the disk."""
    size = sum(tensor.nbytes for tensor in MODELS[model].tensors())
    free = shutil.disk_usage(directory).free
    if free < 6 * size:
        raise SystemExit(f"{directory}: {6 * size / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")


def run_rounds(bench: Bench, modes: list[str], rounds: int) -> None:
    """Play all rounds in all modes, the disk's floor among them."""
    methods: dict[str, list[Method]] = {}
    for mode in modes:
        say(f"looking for the fastest way to move the bytes ({mode})")
        methods[mode] = best_methods(floor_traffic(bench.triple, mode), bench.scratch)
    for number in range(rounds):
        for mode in modes:
            bench.play(number, mode, methods[mode])


def run(options: Options) -> Results:
    """Do the whole benchmark."""
    options.directory.mkdir(parents=True, exist_ok=True)
    spec = TripleSpec(options.model, options.shards)
    home = options.directory / f"triple-{spec.model}-{spec.shards}"
    if not home.is_dir():
        check_disk(options.model, options.directory)
    say(f"triple: {home}")
    triple = make_triple(home, spec)
    notes: list[str] = []
    wanted = [c for c in all_contenders(options.tools) if not options.only or c.name in options.only]
    contenders = possible_contenders(wanted, options.shards, notes)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        bystander = make_bystander(Path(scratch, "bystander.bin"))
        bench = Bench(triple, Path(scratch), list(contenders), bystander, notes=notes)
        modes = possible_modes(options, triple, notes)
        bench.rehearse()
        run_rounds(bench, modes, options.rounds)
    if options.clean:
        shutil.rmtree(home)
    return Results(
        spec=spec,
        tensor_bytes=triple.tensor_bytes,
        rounds=options.rounds,
        machine=describe(options.directory),
        versions=tool_versions(options.tools),
        contenders=contenders,
        runs=bench.runs,
        floors=bench.floors,
        agreements=bench.agreements,
        failures=bench.failures,
        notes=notes,
    )


def tool_versions(tools: Tools) -> dict[str, str]:
    """Return what the contenders consist of."""
    ours = tools.paramdelta.with_name("python")
    return {
        "paramdelta": versions(ours, "paramdelta", "numba", "numpy"),
        "peers": versions(tools.peers / "python", "mergekit", "sd-mecha", "torch", "transformers", "safetensors"),
    }


def parse_arguments() -> Options:
    """Read the command line."""
    tools = default_tools(ROOT)
    names = [contender.name for contender in all_contenders(tools)]
    parser = argparse.ArgumentParser(description="Compare paramdelta with its peers and with the disk.")
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument("--shards", type=int, default=1, help="files per checkpoint")
    parser.add_argument(
        "--rounds", type=int, default=6, help="a multiple of the players, the disk included, is fairest"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="contenders to run")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--paramdelta", type=Path, default=tools.paramdelta, help="the paramdelta program")
    parser.add_argument("--peers", type=Path, default=tools.peers, help="bin directory of the peers' environment")
    parser.add_argument("--out", type=Path, help="default: bench/RESULTS.md, for a run with all of the defaults")
    parser.add_argument("--clean", action="store_true", help="remove the triple afterwards")
    given = parser.parse_args()
    partial = bool(given.only) or given.model != "1b" or given.shards != 1 or sorted(given.mode) != sorted(MODES)
    if partial and given.out is None:
        parser.error("say where the results of a partial run go: --out FILE")
    return Options(
        model=given.model,
        shards=given.shards,
        rounds=given.rounds,
        directory=given.dir.resolve(),
        modes=tuple(given.mode),
        only=tuple(given.only),
        tools=Tools(given.paramdelta, given.peers),
        out=given.out or ROOT / "bench" / "RESULTS.md",
        clean=given.clean,
    )


def main() -> None:
    """Run the benchmark and write its results."""
    options = parse_arguments()
    results = run(options)
    options.out.write_text(render(results))
    options.out.with_name(options.out.stem.lower() + ".json").write_text(results.to_json())
    say(f"written: {options.out}")
    if results.failures or results.over_budget():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
