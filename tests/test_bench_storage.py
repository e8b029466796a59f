"""How the benchmarks of backends, batches and the page cache count, and how they show what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bench import backends, batch, evict
from bench.backend_cases import BACKENDS, CASES
from bench.contenders import Tools
from bench.measure import Measurement
from bench.run import MODES
from bench.triple import ROLES, Triple

from paramdelta.planning.recipe_file import read_recipes

if TYPE_CHECKING:
    from collections.abc import Iterator

MACHINE = {"CPU": "a CPU", "cores": "2", "RAM": "24 GiB", "kernel": "Linux 6", "filesystem": "ext4"}


def rows(page: str) -> Iterator[list[str]]:
    """Return the cells of every line of a table."""
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith("| :--"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def shown_backends(samples: list[backends.Sample], missing: dict[str, str]) -> tuple[str, dict[str, dict[str, str]]]:
    page = backends.render(samples, {**MACHINE, "rounds": 2, "model": "mini", "tensor_bytes": 10**9}, missing)
    header, *cases = rows(page)
    return page, {case[0]: dict(zip(header, case, strict=True)) for case in cases}


def backend_samples() -> list[backends.Sample]:
    """Return two rounds in which auto is best by name and never in truth; tmpfs refuses direct; nothing overlaid."""
    seconds = {"auto": (3.0, 2.0), "mmap": (2.0, 2.0), "pread": (4.0, 1.0), "direct": (5.0, 5.0)}
    return [
        backends.Sample(case.name, name, number, case.cached, None, error="no O_DIRECT")
        if (case.place, name) == ("tmpfs", "direct")
        else backends.Sample(case.name, name, number, case.cached, seconds[name][number], "direct, mmap")
        for case in CASES
        if case.place != "overlay"
        for name in BACKENDS
        for number in (0, 1)
    ]


def test_auto_is_compared_round_by_round_with_the_backend_of_the_best_median() -> None:
    _, shown = shown_backends(backend_samples(), {})
    case = shown["half of each"]
    assert (case["best"], case["auto / best"], case["range"]) == ("mmap", "1.25", "1.00 - 1.50")
    assert (case["auto, s"], case["pread, s"], case["direct, s"]) == ("2.50", "2.50", "5.00")
    assert (case["cached"], case["auto used"]) == ("50%, 50%, 50%", "direct, mmap")


def test_a_backend_that_is_refused_and_a_place_that_is_not_there_are_said_to_be() -> None:
    page, shown = shown_backends(backend_samples(), {"overlay": "must be superuser."})
    assert shown["tmpfs"]["direct, s"] == "refused"
    assert "`direct` was refused: no O_DIRECT" in page
    assert page.count("no O_DIRECT") == 1
    assert shown["overlay, cold"]["cached"] == "not run"
    assert page.count("Not run: must be superuser.") == sum(case.place == "overlay" for case in CASES)


def test_a_case_in_which_nothing_worked_has_a_row() -> None:
    samples = [backends.Sample("cold", name, 0, (0, 0, 0), None, error="why") for name in BACKENDS]
    _, shown = shown_backends(samples, {})
    assert [shown["cold"][f"{name}, s"] for name in BACKENDS] == ["refused"] * len(BACKENDS)
    assert shown["cold"]["best"] == shown["cold"]["auto / best"] == ""


def test_a_reason_names_none_of_this_machines_paths(tmp_path: Path) -> None:
    site = backends.Site(Triple(tmp_path / "in", 8), tmp_path / "scratch" / "output")
    assert backends.reason(f"{tmp_path}/in/post/a: no\n {tmp_path}/scratch/output: neither\n", site) == (
        "post/a: no output: neither"
    )


def test_cases_have_names_of_their_own_and_shares_that_are_shares() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(0 <= share <= 1 for case in CASES for share in case.cached)


def small_batch(tmp_path: Path, count: int) -> batch.Batch:
    triple = Triple(tmp_path / "triple", 8)
    for role in ROLES:
        triple.path(role).mkdir(parents=True)
        (triple.path(role) / "model.safetensors").write_text(role)
    return batch.make_batch(triple, count, tmp_path)


def test_the_recipes_of_a_batch_are_its_merges(tmp_path: Path) -> None:
    made = small_batch(tmp_path, 3)
    jobs = [job for recipe in made.recipes for job in read_recipes(str(recipe))]
    assert [job.recipe.deltas[0].post for job in jobs] == [str(post) for post in made.posts]
    assert {job.recipe.new_base for job in jobs} == {str(made.triple.path("new_base"))}
    assert [Path(job.output or "").name for job in jobs] == [batch.name(number) for number in range(3)]


def test_both_ways_write_to_the_same_places_and_the_disk_moves_every_file_of_every_merge(tmp_path: Path) -> None:
    made, tools = small_batch(tmp_path, 3), Tools(Path("paramdelta"), Path())
    script = batch.merges_command(made, tools, tmp_path / "out")[-1].splitlines()
    assert len(script) == 3
    assert all(f"out/{batch.name(number)}" in line for number, line in enumerate(script))
    assert [len(batch.traffic(made, "cold", number).reads) for number in range(3)] == [3, 3, 3]
    assert batch.traffic(made, "warm", 0).reads == ()
    assert len(made.files()) == 3 + 2


def test_what_merges_took_is_added_up_from_one_report_or_from_many() -> None:
    merges: list[dict[str, Any]] = [{"seconds": 1.5}, {"seconds": 2}]
    assert batch.seconds_inside(json.dumps({"merges": merges})) == 3.5
    assert batch.seconds_inside("\n".join(map(json.dumps, merges))) == 3.5


def test_the_seconds_of_a_merge_are_told_apart() -> None:
    samples = [
        batch.Sample(player, mode, number, seconds + number, inside + number, 2.0)
        for mode in MODES
        for number in (0, 1)
        for player, seconds, inside in ((batch.RUN, 4.0, 3.0), (batch.MERGES, 8.0, 5.0), (batch.DISK, 2.0, 0.0))
    ]
    page = batch.render(samples, {**MACHINE, "model": "tiny", "rounds": "2"}, (10, 10**8))
    _, run, merges, disk, *_ = rows(page)
    assert run == [batch.RUN, "4.50", "4.00 - 5.00", "0.450", "0.250", "0.100", "0.100", "0.200"]
    assert merges[3:] == ["0.850", "0.250", "0.300", "0.300", "0.200"]
    assert disk[3:] == ["0.250", "", "", "", ""]
    assert "reads 3.0 GB and writes 1.0 GB" in page


def test_what_is_left_is_told_by_how_often_it_had_been_read() -> None:
    def sample(name: str, reads: int, left: float, exit_code: int = 0) -> evict.Sample:
        return evict.Sample(name, reads, left, Measurement(exit_code, 2.0, 0.0, 1.0, 10**8, 1, 0, "", ""))

    samples = [sample("cat", 1, 0.0), sample("cat", 1, 0.5), sample("cat", 2, 1.0), sample("cp", 1, 0.5, 1)]
    content = {**MACHINE, "limit": 1000, "hot": 400, "rounds": 2, "model": "small", "tensor_bytes": 8}
    _, cat, cp = rows(evict.render(["cat", "cp"], samples, content))
    assert cat == ["cat", "25%", "0% - 50%", "100%", "100% - 100%", "2.00", "2.00 - 2.00", "100"]
    assert cp[:2] == ["cp", "failed"]


@pytest.mark.parametrize("contender", evict.contenders(Tools(Path("paramdelta"), Path())), ids=lambda each: each.name)
def test_everybody_in_the_group_has_a_command(contender: Any, tmp_path: Path) -> None:
    command = contender.command(Triple(tmp_path, 8), tmp_path / "out", tmp_path)
    assert command
    assert all(isinstance(word, str) for word in command)
