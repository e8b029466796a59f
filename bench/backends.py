"""Does `--io auto` choose the right backend? `python -m bench.backends` (`make backends`) writes BACKENDS.md.

In every state in which inputs may be found, `auto` runs in turn with the three backends that it chooses from. Inputs
are taken out of the page cache by name, so that the program itself stays there and nobody else on the machine loses
anything. Mounts need root; without it, their cases are left out and the page says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.backend_cases import BACKENDS, CASES, Case
from bench.bystander import cached_share
from bench.contenders import Tools, default_tools, paramdelta
from bench.floor import forget
from bench.machine import describe
from bench.measure import measure, warm
from bench.mounts import mounted, overlay
from bench.report import table
from bench.results import choices
from bench.run import ROOT, balanced_order, check_disk, say
from bench.triple import MODELS, ROLES, Triple, TripleSpec, make_triple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE = Path(__file__).with_name("BACKENDS.md")
SETTLE_SECONDS = 1.0
CACHED_ORDER = ("post", "base", "new_base")  # of `Case.cached`
HEADER = ["", "cached", "auto used", *(f"{backend}, s" for backend in BACKENDS), "best", "auto / best", "range"]
HEAD = """\
<!-- Written by `python -m bench.backends`; do not edit. -->

# Backends

`paramdelta merge` with `--io auto` and with each backend that it chooses from, in every state of its inputs. Seconds of
whole processes, synced, medians over {rounds} interleaved round(s); triple `{model}`, 3 x {tensor_bytes:,} bytes.
{CPU}, {cores} cores, {RAM}, {kernel}, {filesystem}. Written by `make backends`.

**Cached** is the share of post, base and new base that the page cache held when the command started, as the system
tells. **Best** is the backend with the lowest median; **auto / best** is the median of the ratios within a round, with
their range: 1 means that `auto` was as fast, less that it was faster than any single backend. Where `auto` used nothing
but the best one, both are the same program: such a ratio shows how noisy the machine was.
"""


@dataclass(frozen=True)
class Site:
    """Where a case is played."""

    inputs: Triple
    output: Path


@dataclass(frozen=True)
class Sample:
    """One run; `seconds` is None where it failed, and `error` says why."""

    case: str
    backend: str
    round: int
    cached: tuple[float, ...]
    seconds: float | None
    used: str = ""
    error: str = ""


def prepare(case: Case, triple: Triple) -> None:
    """Bring the inputs into the state that is wanted. What lies on a tmpfs is in memory anyway."""
    os.sync()
    for role, share in zip(CACHED_ORDER, case.cached, strict=True):
        files = triple.files((role,))
        for path in files:
            forget(path)
        warm(files, share)


def state(triple: Triple) -> tuple[float, ...]:
    """Return which share of each checkpoint the page cache holds."""
    found = []
    for role in CACHED_ORDER:
        files = triple.files((role,))
        sizes = [path.stat().st_size for path in files]
        found.append(sum(cached_share(path) * size for path, size in zip(files, sizes, strict=True)) / sum(sizes))
    return tuple(found)


def play(case: Case, backend: str, number: int, site: Site, tools: Tools) -> Sample:
    """Merge once."""
    shutil.rmtree(site.output, ignore_errors=True)
    prepare(case, site.inputs)
    time.sleep(SETTLE_SECONDS)
    cached = state(site.inputs)
    command = paramdelta(tools, backend, "", "--io", backend).command(site.inputs, site.output, site.output.parent)
    result = measure(command, output=site.output)
    shutil.rmtree(site.output, ignore_errors=True)
    say(f"{case.name}, round {number + 1}: {backend:8} {result.wall_seconds:6.2f} s, {result.exit_code}")
    if not result.ok:
        return Sample(case.name, backend, number, cached, None, error=reason(result.last_words(), site))
    return Sample(case.name, backend, number, cached, result.wall_seconds, used=str(choices(result).get("io", "")))


def reason(words: str, site: Site) -> str:
    """Return why a run failed, in one line without this machine's paths: it will be published."""
    for folder in (site.inputs.directory, site.output.parent):
        words = words.replace(f"{folder}/", "")
    return " ".join(words.split())


@contextlib.contextmanager
def sites(triple: Triple, scratch: Path) -> Iterator[dict[str, Site | str]]:
    """Make every place in which inputs lie; one that cannot be made is the reason why not."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Site | str] = {"disk": Site(triple, scratch / "output")}
        try:
            memory = stack.enter_context(mounted("tmpfs", scratch / "tmpfs", f"size={5 * triple.tensor_bytes}"))
            for role in ROLES:
                shutil.copytree(triple.path(role), memory / role)
            found["tmpfs"] = Site(Triple(memory, triple.tensor_bytes), memory / "output")
        except OSError as error:
            found["tmpfs"] = str(error)
        try:
            layer = stack.enter_context(overlay(triple.directory, scratch))
            found["overlay"] = Site(Triple(layer, triple.tensor_bytes), scratch / "output")
        except OSError as error:
            found["overlay"] = str(error)
        yield found


def rehearse(places: dict[str, Site | str], tools: Tools) -> None:
    """Merge once in every place, untimed: compiled code is kept, and a tmpfs gets its memory from the system."""
    for site in places.values():
        if not isinstance(site, str):
            play(CASES[0], "auto", -1, site, tools)


def play_rounds(places: dict[str, Site | str], tools: Tools, rounds: int) -> list[Sample]:
    """Play every case with every backend in each round. What failed is not tried again."""
    samples: list[Sample] = []
    for number in range(rounds):
        for case in CASES:
            site = places[case.place]
            if isinstance(site, str):
                continue
            for place in balanced_order(len(BACKENDS), number):
                if not any(each.error for each in of(samples, case.name, BACKENDS[place])):
                    samples.append(play(case, BACKENDS[place], number, site, tools))
    return samples


def of(samples: Sequence[Sample], case: str, backend: str) -> list[Sample]:
    """Return the runs of one backend in one case."""
    return [each for each in samples if (each.case, each.backend) == (case, backend)]


def seconds_by_round(samples: Sequence[Sample], case: str, backend: str) -> dict[int, float]:
    """Return what the runs that succeeded took."""
    return {each.round: each.seconds for each in of(samples, case, backend) if each.seconds is not None}


def best_backend(samples: Sequence[Sample], case: str) -> str | None:
    """Return the backend, `auto` aside, with the lowest median."""
    runs = {backend: seconds_by_round(samples, case, backend) for backend in BACKENDS if backend != "auto"}
    return min((name for name in runs if runs[name]), key=lambda name: median(runs[name].values()), default=None)


def most_common(values: Sequence[str]) -> str:
    """Return what is there most often."""
    return max(dict.fromkeys(values), key=values.count, default="")


def row(case: Case, samples: Sequence[Sample]) -> list[str]:
    """Format one case; a backend that cannot serve it is refused."""
    runs = [each for each in samples if each.case == case.name]
    if not runs:
        return [case.name, "not run", *[""] * (len(HEADER) - 2)]
    cached = [median(shares) for shares in zip(*(each.cached for each in runs), strict=True)]
    cells = []
    for backend in BACKENDS:
        seconds = seconds_by_round(samples, case.name, backend).values()
        cells.append(f"{median(seconds):.2f}" if seconds else "refused")
    best = best_backend(samples, case.name)
    ours = seconds_by_round(samples, case.name, "auto")
    theirs = seconds_by_round(samples, case.name, best) if best else {}
    ratios = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
    compared = [f"{median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}"] if ratios else ["", ""]
    used = most_common([each.used for each in of(samples, case.name, "auto")])
    return [case.name, ", ".join(f"{share:.0%}" for share in cached), used, *cells, best or "", *compared]


def explanation(case: Case, samples: Sequence[Sample], missing: str) -> str:
    """Say what the case is about, and what could not be done."""
    refused = {each.backend: each.error for each in samples if each.case == case.name and each.error}
    told = [f"Not run: {missing}"] if missing else [f"`{name}` was refused: {why}" for name, why in refused.items()]
    return " ".join([f"- **{case.name}**: {case.explanation}", *told])


def render(samples: Sequence[Sample], content: Mapping[str, object], missing: dict[str, str]) -> str:
    """Format the page; `missing` has the places that could not be made."""
    lines = [explanation(case, samples, missing.get(case.place, "")) for case in CASES]
    rows = [row(case, samples) for case in CASES]
    return "\n".join([HEAD.format(**content), table(HEADER, rows), *lines]) + "\n"


def main() -> None:
    """Run everything in turn, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    home = options.dir.resolve() / f"triple-{options.model}-1"
    if not home.is_dir():
        check_disk(options.model, options.dir)
    triple = make_triple(home, TripleSpec(options.model, 1))
    tools = default_tools(ROOT)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch, sites(triple, Path(scratch)) as places:
        rehearse(places, tools)
        samples = play_rounds(places, tools, options.rounds)
    content = {"rounds": options.rounds, "model": options.model, "tensor_bytes": triple.tensor_bytes}
    missing = {name: site for name, site in places.items() if isinstance(site, str)}
    options.out.write_text(render(samples, {**describe(home), **content}, missing), encoding="utf-8")
    say(f"written: {options.out}")


if __name__ == "__main__":
    main()
