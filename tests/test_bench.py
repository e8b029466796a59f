"""What the benchmark's fairness rests on, and how its findings are shown."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bench import check, curve_report, readme, shim, stored
from bench.bystander import make_bystander
from bench.contenders import REFERENCE, Contender, Tools, all_contenders
from bench.curve_shapes import CURVES, Curve, Sample
from bench.floor import METHODS, Floor, Method, Traffic, measure_floor
from bench.measure import Measurement, measure
from bench.report import render
from bench.results import Failure, FloorRun, Results, Run
from bench.run import balanced_order, possible_contenders
from bench.triple import ROLES, Triple, TripleSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

FIO, LOOP = Method("fio", 4, 4 << 20), Method("threads", 2, 8 << 20)
MACHINE = {"CPU": "a CPU", "cores": "2", "RAM": "24 GiB", "kernel": "Linux 6", "filesystem": "ext4"}


@pytest.mark.parametrize("count", range(1, 11))
def test_everybody_follows_everybody_equally_often(count: int) -> None:
    rounds = [balanced_order(count, number) for number in range(2 * count if count % 2 else count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    followed = Counter(pair for order in rounds for pair in pairwise(order))
    assert len(followed) == count * (count - 1)
    assert len(set(followed.values())) <= 1


def contenders() -> list[Contender]:
    return all_contenders(Tools(Path("paramdelta"), Path("peers")))


def measurement(seconds: float, **costs: Any) -> Measurement:
    usual: dict[str, Any] = {"exit_code": 0, "sync_seconds": 0.1, "cpu_seconds": 1.5, "peak_rss_bytes": 200_000_000}
    return Measurement(
        **{**usual, "wall_seconds": seconds, "processes": 1, "major_faults": 7, "stdout": "", "stderr": "", **costs}
    )


def found(**changes: Any) -> Results:
    """Return results of two rounds: everybody takes ten times the number of its place, the next round a second more."""
    known = contenders()
    runs = [
        Run(each.name, mode, number, measurement(10.0 * place + number, device_read_bytes=3 * 10**9), 0.5)
        for place, each in enumerate(known, 1)
        for mode in ("warm", "cold")
        for number in (0, 1)
    ]
    floors = [
        FloorRun(mode, number, Floor(method, seconds + number * shift, 10**9))
        for mode in ("warm", "cold")
        for number in (0, 1)
        for method, seconds, shift in ((FIO, 4.0, 2), (LOOP, 5.0, -2))
    ]
    given: dict[str, Any] = {
        "spec": TripleSpec("1b", 1),
        "tensor_bytes": 10**9,
        "rounds": 2,
        "machine": MACHINE,
        "versions": {"paramdelta": "paramdelta 1", "peers": "torch 2"},
        "contenders": known,
        "runs": runs,
        "floors": floors,
        "agreements": [],
        "failures": [],
        "notes": [],
    }
    return Results(**{**given, **changes})


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """Return the cells of the first table below a heading."""
    lines = page[page.index(f"{heading}\n") :].split("\n\n|", 1)[1].split("\n\n")[0].splitlines()
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_best_method_of_each_round_is_the_disk_alone() -> None:
    results = found()
    assert {number: floor.seconds for number, floor in results.floor_by_round("cold").items()} == {0: 4.0, 1: 3.0}
    shown = {row[0]: row for row in rows(render(results), "## Cold")}
    assert shown["the disk alone: 3 reads and 1 write"][1:3] == ["3.50", "3.00 - 4.00"]
    assert shown[f"*{FIO}*"][1:3] == ["5.00", "4.00 - 6.00"]
    assert shown[f"*{LOOP}*"][1:3] == ["4.00", "3.00 - 5.00"]


def test_the_main_table_compares_merges_with_the_disk_and_counts_what_each_moved() -> None:
    shown = {row[0]: row for row in rows(render(found()), "## Warm")}
    assert shown[REFERENCE][3] == "1.00"
    assert shown[REFERENCE][5] == f"{4 / 10.5:.2f}"
    assert shown["cp"][4] == shown["verify"][4] == ""
    place = {each.name: number for number, each in enumerate(contenders(), 1)}
    assert shown["cp"][5] == f"{2 / (10 * place['cp'] + 0.5):.2f}"
    assert shown["verify"][5] == f"{1 / (10 * place['verify'] + 0.5):.2f}"


def test_what_a_run_takes_from_the_machine_has_a_table_of_its_own() -> None:
    costs = {"dirty_peak_bytes": 5 * 10**6, "cached_growth_bytes": -(10**6), "device_read_bytes": None}
    runs = [
        Run(REFERENCE, "warm", 0, measurement(1.0, **costs), None),
        Run(REFERENCE, "warm", 1, measurement(1.0, **{**costs, "dirty_peak_bytes": 9 * 10**6}), None),
    ]
    (row,) = rows(render(found(runs=runs)), "### What it takes from the machine, warm")
    assert row == [REFERENCE, "1.5", "7", "", "9", "-1", ""]
    (row,) = rows(
        render(found(runs=[Run(REFERENCE, "warm", 0, measurement(1.0, device_read_bytes=10**9), 0.25)])),
        "### What it takes from the machine, warm",
    )
    assert row[3] == "1.00"
    assert row[6] == "25%"


def test_whoever_failed_is_shown_as_failed() -> None:
    runs = [run for run in found().runs if run.contender != "torch"]
    page = render(found(runs=runs, failures=[Failure("torch", 9, "no memory")]))
    assert next(row[:2] for row in rows(page, "## Cold") if row[0] == "torch") == ["torch", "failed"]
    assert "torch exited with 9" in page


def test_every_run_and_every_method_is_kept_as_json() -> None:
    results = found()
    kept = json.loads(results.to_json())
    assert len(kept["runs"]) == len(results.runs)
    assert kept["runs"][0].keys() >= {"dirty_peak_bytes", "cached_growth_bytes", "device_read_bytes", "bystander_share"}
    assert Counter(floor["method"] for floor in kept["floors"]) == {str(FIO): 4, str(LOOP): 4}
    assert stored.floor_seconds(kept, "cold") == {0: 4.0, 1: 3.0}


def test_the_measured_peak_is_kept_rather_than_what_paramdelta_says_of_itself() -> None:
    said = json.dumps({"peak_rss_bytes": 1, "io": "direct", "workers": 4, "window_bytes": 8})
    (run,) = json.loads(found(runs=[Run(REFERENCE, "cold", 0, measurement(1.0, stdout=said))]).to_json())["runs"]
    assert run["peak_rss_bytes"] == 200_000_000
    assert (run["io"], run["workers"]) == ("direct", 4)


def test_what_knows_no_shards_and_what_reads_an_output_are_left_out_where_there_is_nothing_for_them() -> None:
    notes: list[str] = []
    known = contenders()
    assert possible_contenders(known, 1, notes) == known
    assert notes == []
    sharded = possible_contenders(known, 4, notes)
    assert [each.name for each in known if each not in sharded] == ["sd-mecha"]
    peers = [each for each in known if each.name != REFERENCE]
    assert "verify" not in {each.name for each in possible_contenders(peers, 1, notes)}
    assert [note.split(":")[0] for note in notes] == ["No sd-mecha", "No verify"]


def test_contenders_read_what_they_are_given(tmp_path: Path) -> None:
    triple = Triple(tmp_path / "triple", 8)
    for folder in (*map(triple.path, ROLES), tmp_path / "merged"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    files = {each.name: each.files(triple, tmp_path) for each in contenders()}
    assert files["torch"] == triple.files()
    assert files["cp"] == triple.files(("new_base",))
    assert files["verify"] == [tmp_path / "merged" / "model.safetensors"]
    for each in contenders():
        assert all(isinstance(word, str) for word in each.command(triple, tmp_path / "out", tmp_path))


def test_the_readme_is_written_from_new_results_and_from_old_ones() -> None:
    new = json.loads(found().to_json())
    text = readme.render(new)
    assert "sd-mecha" in text
    assert "`cp`" in text
    assert f"{3.5:.1f} s" in text
    peers = {"sd-mecha", "mergekit-f32", "cp", "verify"}
    added = {"bystander_share", "dirty_peak_bytes", "cached_growth_bytes", "device_read_bytes"}
    old = new | {
        "runs": [
            {name: value for name, value in run.items() if name not in added}
            for run in new["runs"]
            if run["contender"] not in peers
        ],
        "floors": [floor for floor in new["floors"] if floor["method"] == str(FIO)],
    }
    assert "sd-mecha" not in readme.render(old)
    assert "mergekit" in readme.render(old)


def test_the_chart_is_small_and_the_same_from_the_same_numbers() -> None:
    charts = pytest.importorskip("bench.charts", exc_type=ImportError)
    results = json.loads(found().to_json())
    drawn = charts.peers(results)
    assert drawn == charts.peers(results)
    assert len(drawn) < 100_000
    assert {"sd-mecha, f32", "the disk alone", "warm", "cold"} <= set(drawn.replace("</text>", ">").split(">"))
    old = results | {"runs": [run for run in results["runs"] if run["contender"] in ("paramdelta", "torch")]}
    assert "sd-mecha" not in charts.peers(old | {"floors": []})


def samples(curve: Curve) -> list[Sample]:
    """Return three runs of every point but of the first one of each series."""
    return [
        Sample(curve.key, series.name, point.label, number, 1.0 + number, 10**8, "direct", 2, 8 << 20)
        for series in curve.series
        for point in series.points[1:]
        for number in range(3)
    ]


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.key)
def test_a_curve_has_a_row_for_each_point_also_for_one_that_did_not_run(curve: Curve) -> None:
    content = {"machine": MACHINE, "rounds": 3, "model": "1b", "tensor_bytes": 8}
    page = curve_report.render([curve], samples(curve), content)
    first, *others = rows(page, f"## {curve.title}")
    assert set(first[1:]) == {""}
    assert [row[0] for row in others] == [point.label for point in curve.series[0].points[1:]]
    assert all(row[1] == "2.00 (1.00 - 3.00)" for row in others)
    assert f"(charts/{curve.key}.svg)" in page


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.key)
def test_a_curve_is_drawn_small_and_the_same_from_the_same_numbers(curve: Curve) -> None:
    charts = pytest.importorskip("bench.curve_charts", exc_type=ImportError)
    drawn = charts.svg(curve, samples(curve))
    assert drawn == charts.svg(curve, samples(curve))
    assert len(drawn) < 100_000


def test_every_series_of_a_curve_has_the_same_points() -> None:
    for curve in CURVES:
        assert len({tuple(point.label for point in series.points) for series in curve.series}) == 1
        assert all(set(point.cached) <= set(ROLES) for series in curve.series for point in series.points)


def test_a_check_tells_what_falls_short_and_what_was_not_measured() -> None:
    measured = check.ratios(found())
    torch = [each.name for each in contenders()].index("torch") + 1
    assert measured["disk alone, warm"] == pytest.approx((4 / 10 + 3 / 11) / 2)
    assert measured["torch script, cold"] == pytest.approx((torch + (10 * torch + 1) / 11) / 2)
    expected = {"disk alone, warm": 0.9, "torch script, cold": 10.0, "a thing of the past": 1.0}
    verdicts = {each.name: each.verdict for each in check.compare(measured, expected, 0.5)}
    assert verdicts["disk alone, warm"] == "**falls short**"
    assert verdicts["torch script, cold"] == "ok"
    assert verdicts["a thing of the past"] == "not measured"
    assert verdicts["disk alone, cold"] == "nothing to compare with"
    assert "| disk alone, warm | 0.34 | 0.90 | 0.45 |" in check.render(check.compare(measured, expected, 0.5))


def test_what_is_expected_is_what_is_measured() -> None:
    stored_check = json.loads(check.EXPECTED.read_text(encoding="utf-8"))
    assert stored_check["ratios"].keys() == check.ratios(found()).keys()
    assert 0 < stored_check["tolerance"] < 1


def test_memory_is_read_from_lines_in_kilobytes() -> None:
    text = "MemTotal:  24 kB\nDirty:      3 kB\nWriteback:  1 kB\nHugePages_Total:  5\n"
    assert shim.parse_memory(text) == {"MemTotal": 24 * 1024, "Dirty": 3 * 1024, "Writeback": 1024}


linux = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="measures on Linux only")


@linux
def test_a_command_is_measured_from_outside(tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = measure(["sh", "-c", f"mkdir {output} && head -c 1000000 /dev/zero > {output}/file"], output=output)
    assert result.ok
    assert result.wall_seconds >= result.sync_seconds > 0
    assert result.device_read_bytes is None or result.device_read_bytes >= 0
    assert result.peak_rss_bytes > 0
    assert not measure(["sh", "-c", "exit 3"]).ok
    assert measure([str(tmp_path / "missing")]).exit_code == 127


@linux
def test_a_bystander_that_was_just_read_is_in_the_page_cache(tmp_path: Path) -> None:
    bystander = make_bystander(tmp_path / "file", 3 * (1 << 20) + 5)
    bystander.heat()
    assert bystander.path.stat().st_size == bystander.size
    assert 0 < bystander.share() <= 1


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="measures on Linux only")
@pytest.mark.parametrize("method", [each for each in METHODS if each.tool in ("buffered", "mmap")], ids=str)
def test_the_floor_moves_files_of_any_size_through_the_page_cache(method: Method, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for number, path in enumerate(files):
        path.write_bytes(bytes(number * (9 << 20) + 12345))
    floor = measure_floor(Traffic(tuple(files), 5000), method, tmp_path)
    assert floor.bytes == sum(path.stat().st_size // 4096 * 4096 for path in files) + 4096
    assert floor.seconds > 0
    assert sorted(tmp_path.iterdir()) == files
