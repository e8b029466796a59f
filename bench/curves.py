"""How paramdelta's own settings and a partly warm page cache change its speed: `python -m bench.curves`.

Every point is a whole process, as in `bench.run`. All points of a curve are played in each round, in a balanced order.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contenders import Tools, default_tools, paramdelta
from bench.curve_charts import svg
from bench.curve_report import render
from bench.curve_shapes import CURVES, Curve, Point, Sample
from bench.machine import describe
from bench.measure import Measurement, drop_caches, measure, warm
from bench.results import choices
from bench.run import ROOT, balanced_order, check_disk, say
from bench.triple import MODELS, ROLES, Triple, TripleSpec, make_triple

if TYPE_CHECKING:
    from collections.abc import Sequence

SETTLE_SECONDS = 2.0
PAGE = Path(__file__).with_name("CURVES.md")


@dataclass(frozen=True)
class Player:
    """One point of a curve, as it is run."""

    series: str
    point: Point


def play(player: Player, triple: Triple, tools: Tools, scratch: Path) -> Measurement:
    """Bring the page cache into the state that is wanted, and merge once."""
    output = scratch / "output"
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    if player.point.cached != ROLES:
        drop_caches()
    warm(triple.files(player.point.cached))
    time.sleep(SETTLE_SECONDS)
    command = paramdelta(tools, "point", "", *player.point.options).command(triple, output, scratch)
    return measure(command, output=output)


def play_round(
    curve: Curve, number: int, players: list[Player], triple: Triple, tools: Tools, scratch: Path
) -> list[Sample]:
    """Play every point of a curve once. A point that fails is left out of this round and told."""
    samples = []
    for place in balanced_order(len(players), number):
        player = players[place]
        result = play(player, triple, tools, scratch)
        say(f"{curve.key}, round {number + 1}: {player.series}, {player.point.label}: {result.wall_seconds:.2f} s")
        if not result.ok:
            say(result.last_words())
            continue
        samples.append(sample(curve, number, player, result))
    return samples


def sample(curve: Curve, number: int, player: Player, result: Measurement) -> Sample:
    """Keep of one run what is shown of it."""
    chosen = choices(result)
    return Sample(
        curve=curve.key,
        series=player.series,
        point=player.point.label,
        round=number,
        seconds=result.wall_seconds,
        peak_rss_bytes=result.peak_rss_bytes,
        io=str(chosen.get("io", "")),
        workers=int(chosen.get("workers", 0)),
        window_bytes=int(chosen.get("window_bytes", 0)),
    )


def possible_players(curve: Curve, *, root: bool) -> list[Player]:
    """Return every point that can be played: one that wants a cold file needs the page cache dropped."""
    players = [Player(series.name, point) for series in curve.series for point in series.points]
    return [player for player in players if root or player.point.cached == ROLES]


def record(curves: Sequence[Curve], triple: Triple, tools: Tools, directory: Path, rounds: int) -> list[Sample]:
    """Play all rounds of all curves."""
    root = drop_caches()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for curve in curves:
            players = possible_players(curve, root=root)
            if players:
                play(players[0], triple, tools, Path(scratch))  # untimed: compiled code is cached
            for number in range(rounds):
                samples += play_round(curve, number, players, triple, tools, Path(scratch))
    return samples


def write(content: dict[str, Any], page: Path) -> None:
    """Write the page and its charts from what was recorded."""
    samples = [Sample(**each) for each in content["samples"]]
    charts = page.with_name("charts")
    charts.mkdir(exist_ok=True)
    shown = [curve for curve in CURVES if any(each.curve == curve.key for each in samples)]
    for curve in shown:
        (charts / f"{curve.key}.svg").write_text(svg(curve, samples), encoding="utf-8")
    page.write_text(render(shown, samples, content), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    tools = default_tools(ROOT)
    parser = argparse.ArgumentParser(description="Measure paramdelta over its settings and states of the page cache.")
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", nargs="+", choices=[curve.key for curve in CURVES], help="default: all")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "paramdelta-bench"))
    parser.add_argument("--paramdelta", type=Path, default=tools.paramdelta, help="the paramdelta program")
    parser.add_argument("--out", type=Path, help="default: bench/CURVES.md, for all curves of the 1b model")
    parser.add_argument("--render", action="store_true", help="measure nothing: draw what was recorded before")
    given = parser.parse_args()
    if given.out is None and (given.model != "1b" or given.curve):
        parser.error("say where the results of a partial run go: --out FILE")
    given.out = given.out or PAGE
    return given


def main() -> None:
    """Measure, keep the numbers, and write the page."""
    given = parse_arguments()
    stored = given.out.with_suffix(".json").with_stem(given.out.stem.lower())
    if not given.render:
        directory = given.dir.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        home = directory / f"triple-{given.model}-1"
        if not home.is_dir():
            check_disk(given.model, directory)
        triple = make_triple(home, TripleSpec(given.model, 1))
        curves = [curve for curve in CURVES if not given.curve or curve.key in given.curve]
        samples = record(curves, triple, Tools(given.paramdelta, Path()), directory, given.rounds)
        content = {
            "model": given.model,
            "tensor_bytes": triple.tensor_bytes,
            "rounds": given.rounds,
            "machine": describe(directory),
            "samples": [asdict(each) for each in samples],
        }
        stored.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write(json.loads(stored.read_text(encoding="utf-8")), given.out)
    say(f"written: {given.out}")


if __name__ == "__main__":
    main()
