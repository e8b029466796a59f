from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.engine import budget
from paramdelta.engine.budget import DEFAULT_MEMORY, Shape, available_memory, decide
from paramdelta.errors import BudgetError

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
MB = 1_000_000
PLAIN = Shape(operands=3, bytes_per_byte=3)
shapes = st.builds(Shape, st.integers(1, 21), st.integers(1, 60), outputs=st.integers(1, 20))


class System(NamedTuple):
    available: int


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups, empty, on a machine with 64 GiB to be had."""
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(budget, "_CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(budget, "_PROCESS_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: System(64 * GIB))
    return tmp_path / "cgroup"


def belongs_to(groups: Path, *lines: str) -> None:
    """Say which groups this process is in, as /proc/self/cgroup does."""
    (groups.parent / "self").write_text("".join(f"{line}\n" for line in lines))


def write_group(group: Path, **files: object) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (group / name.replace("__", ".")).write_text(f"{content}\n")


# -- what is available ---------------------------------------------------------------------------------------


def test_without_control_groups_the_systems_view_counts(groups: Path) -> None:
    assert available_memory() == 64 * GIB
    belongs_to(groups)
    assert available_memory() == 64 * GIB


def test_the_systems_view_counts_where_it_is_the_least(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    belongs_to(groups, "0::/job")
    write_group(groups / "job", memory__max=8 * GIB, memory__current=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: System(3 * GIB))
    assert available_memory() == 3 * GIB


def test_a_group_leaves_its_limit_less_what_is_used_and_cannot_be_reclaimed(groups: Path) -> None:
    belongs_to(groups, "0::/job")
    write_group(
        groups / "job",
        memory__max=8 * GIB,
        memory__current=5 * GIB,
        memory__stat=f"anon {2 * GIB}\nfile {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {1 * GIB}\nkernel 9",
    )
    assert available_memory() == 6 * GIB


def test_a_group_without_statistics_is_assumed_to_reclaim_nothing(groups: Path) -> None:
    belongs_to(groups, "0::/job")
    write_group(groups / "job", memory__max=8 * GIB, memory__current=5 * GIB)
    assert available_memory() == 3 * GIB
    write_group(groups / "job", memory__stat="not a statistic at all")
    assert available_memory() == 3 * GIB


def test_the_least_limit_on_the_path_counts(groups: Path) -> None:
    belongs_to(groups, "0::/user/job/step")
    write_group(groups, memory__max=50 * GIB, memory__current=0)
    write_group(groups / "user", memory__max=4 * GIB, memory__current=1 * GIB)
    write_group(groups / "user/job", memory__max="max", memory__current=0)
    write_group(groups / "user/job/step", memory__max=10 * GIB, memory__current=1 * GIB)
    assert available_memory() == 3 * GIB


def test_a_group_that_is_slowed_down_before_its_limit_leaves_what_is_below_that(groups: Path) -> None:
    belongs_to(groups, "0::/job")
    write_group(groups / "job", memory__max=8 * GIB, memory__high=4 * GIB, memory__current=1 * GIB)
    assert available_memory() == 3 * GIB
    write_group(groups / "job", memory__max="max")
    assert available_memory() == 3 * GIB


def test_limits_beside_the_path_do_not_count(groups: Path) -> None:
    belongs_to(groups, "0::/user/job")
    write_group(groups / "user/job", memory__max=8 * GIB, memory__current=0)
    write_group(groups / "user/other", memory__max=1 * GIB, memory__current=0)
    assert available_memory() == 8 * GIB


def test_a_limit_of_max_is_none(groups: Path) -> None:
    belongs_to(groups, "0::/job")
    write_group(groups / "job", memory__max="max", memory__current=GIB)
    assert available_memory() == 64 * GIB


def test_a_group_that_uses_more_than_its_limit_leaves_nothing_not_less(groups: Path) -> None:
    belongs_to(groups, "0::/job")
    write_group(groups / "job", memory__max=GIB, memory__current=2 * GIB)
    assert available_memory() == 0


def test_in_a_container_the_mounts_root_is_the_containers_own_group(groups: Path) -> None:
    belongs_to(groups, "0::/kubepods/pod-of-the-host/container")
    write_group(groups, memory__max=2 * GIB, memory__current=GIB)
    assert available_memory() == GIB


def test_a_group_outside_the_mount_is_survived(groups: Path) -> None:
    belongs_to(groups, "0::/../sibling")
    write_group(groups, memory__max=2 * GIB, memory__current=0)
    write_group(groups.parent / "sibling", memory__max=GIB, memory__current=0)
    assert available_memory() in {GIB, 2 * GIB}


def test_limits_of_version_1_count_along_the_path(groups: Path) -> None:
    belongs_to(groups, "12:cpu,cpuacct:/job", "4:memory:/user/job", "1:name=systemd:/", "0::/")
    memory = groups / "memory"
    write_group(
        memory / "user/job",
        memory__limit_in_bytes=4 * GIB,
        memory__usage_in_bytes=3 * GIB,
        memory__stat=f"inactive_file 5\nactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0",
    )
    write_group(memory / "user", memory__limit_in_bytes=0x7FFFFFFFFFFFF000, memory__usage_in_bytes=GIB)
    write_group(memory, memory__limit_in_bytes=0x7FFFFFFFFFFFF000, memory__usage_in_bytes=GIB)
    assert available_memory() == 2 * GIB
    write_group(memory / "user", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=2 * GIB)
    assert available_memory() == GIB


def test_controllers_that_share_a_hierarchy_with_memory_are_seen(groups: Path) -> None:
    belongs_to(groups, "3:cpu,memory:/job")
    write_group(groups / "memory/job", memory__limit_in_bytes=GIB, memory__usage_in_bytes=0)
    assert available_memory() == GIB


def test_controllers_whose_names_resemble_memory_are_not_it(groups: Path) -> None:
    belongs_to(groups, "3:memory2,hugetlb:/job")
    write_group(groups / "memory/job", memory__limit_in_bytes=GIB, memory__usage_in_bytes=0)
    assert available_memory() == 64 * GIB


def test_a_path_with_a_colon_is_one_path(groups: Path) -> None:
    belongs_to(groups, "0::/job:1")
    write_group(groups / "job:1", memory__max=GIB, memory__current=0)
    assert available_memory() == GIB


def test_this_machine_has_something_available() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


# -- decisions -----------------------------------------------------------------------------------------------


def taken(decided: budget.Budget, shape: Shape, used: int) -> int:
    return used + budget.RESERVE + decided.workers * shape.worker(decided.window_bytes)


@given(
    shapes,
    st.integers(0, 2_000 * MB),
    st.integers(0, 500 * MB),
    st.integers(0, 100 * MB),
    st.none() | st.integers(1, 64),
)
def test_no_decision_exceeds_the_memory_given(
    shape: Shape, memory: int, used: int, above: int, workers: int | None
) -> None:
    try:
        decided = decide(memory, workers, shape, used, used + above)
    except BudgetError as error:
        least = int(re.findall(r"least that works here is (\d+) MB", error.message)[0]) * MB
        assert memory < least
        # What the message promises holds, with a little to spare, and much less does not.
        assert taken(decide(least, workers, shape, used, used + above), shape, used) <= least
        with pytest.raises(BudgetError):
            decide(least - 4 * MB, workers, shape, used, used + above)
        return
    assert decided.memory == memory
    assert taken(decided, shape, used) <= memory
    assert used + above <= memory
    assert decided.workers >= 1
    assert decided.workers == (workers or decided.workers)
    assert decided.window_bytes % 4096 == 0
    assert budget.SMALLEST_WINDOW <= decided.window_bytes <= budget.LARGEST_WINDOW
    assert decided.arena_bytes == shape.arena(decided.window_bytes)


@given(shapes, st.integers(0, 1_000 * MB), st.integers(0, 100 * MB), st.none() | st.integers(1, 16))
def test_more_memory_never_makes_smaller_buffers(shape: Shape, memory: int, more: int, workers: int | None) -> None:
    least = budget.RESERVE + (workers or 1) * shape.worker(budget.SMALLEST_WINDOW)
    small = decide(least + memory, workers, shape, 0, 0)
    large = decide(least + memory + more, workers, shape, 0, 0)
    assert large.workers >= small.workers
    assert (large.workers, large.window_bytes) >= (small.workers, small.window_bytes)


def test_too_little_memory_is_an_error_that_names_the_least_and_how_to_ask_for_it() -> None:
    with pytest.raises(BudgetError) as caught:
        decide(150 * MB, None, PLAIN, 160 * MB, 170 * MB)
    assert caught.value.exit_code == 9
    assert "150 MB is too small" in caught.value.message
    least = -(-(163 * MB + budget.RESERVE + PLAIN.worker(budget.SMALLEST_WINDOW)) // MB)
    assert f"{least} MB" in caught.value.message
    assert caught.value.remedy == f"Use --memory {least}MB or more."


def test_a_peak_that_was_already_higher_is_the_least() -> None:
    # RSS is counted at its highest: what the process held before the run cannot be taken back.
    with pytest.raises(BudgetError, match="the least that works here is 703 MB"):
        decide(400 * MB, None, PLAIN, 100 * MB, 700 * MB)
    assert decide(700 * MB, None, PLAIN, 100 * MB, 700 * MB).memory == 700 * MB


def test_too_many_workers_for_the_memory_are_an_error_that_says_so() -> None:
    with pytest.raises(BudgetError) as caught:
        decide(190 * MB, 250, PLAIN, 100 * MB, 100 * MB)
    assert "Fewer than 250 workers need less" in (caught.value.remedy or "")


def test_workers_that_are_asked_for_are_kept_and_get_smaller_windows() -> None:
    few, many = (decide(500 * MB, workers, PLAIN, 150 * MB, 150 * MB) for workers in (2, 32))
    assert (few.workers, many.workers) == (2, 32)
    assert many.window_bytes < few.window_bytes


def test_workers_are_given_up_before_windows_become_uncomfortable() -> None:
    chosen = decide(190 * MB, None, PLAIN, 160 * MB, 160 * MB)
    assert 1 <= chosen.workers < budget.default_workers()
    assert chosen.window_bytes >= budget.COMFORTABLE_WINDOW


def test_much_memory_gives_the_largest_window_to_the_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "usable_processors", lambda: 3)
    chosen = decide(64 * GIB, None, PLAIN, 0, 0)
    assert (chosen.workers, chosen.window_bytes) == (6, budget.LARGEST_WINDOW)


@pytest.mark.parametrize(("processors", "workers"), [(1, 4), (2, 4), (3, 6), (4, 8), (128, 8)])
def test_there_are_four_to_eight_workers_by_default(
    processors: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "usable_processors", lambda: processors)
    assert budget.default_workers() == workers


def test_some_processor_is_usable() -> None:
    assert budget.usable_processors() >= 1


@pytest.mark.parametrize(
    ("available", "memory"),
    [
        (64 * GIB, budget.DEFAULT_MEMORY),
        (4 * budget.DEFAULT_MEMORY, budget.DEFAULT_MEMORY),
        (1_200 * MB, 300 * MB),
        (0, 200 * MB + budget.RESERVE + PLAIN.worker(budget.SMALLEST_WINDOW)),
    ],
)
def test_the_default_is_modest_a_quarter_of_what_is_there_or_the_least_that_works(
    available: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: available)
    assert decide(None, None, PLAIN, 200 * MB, 200 * MB).memory == memory


@given(shapes, st.integers(0, 1 << 24), st.integers(0, 1 << 24))
def test_a_larger_window_takes_more(shape: Shape, window: int, more: int) -> None:
    assert shape.arena(window + more) >= shape.arena(window) >= shape.bytes_per_byte * window
    assert shape.worker(window) >= shape.arena(window) + window


@pytest.mark.parametrize(
    ("available", "memory"),
    [
        (16_000_000_000, DEFAULT_MEMORY),
        (1_200_000_000, 300_000_000),
        (200_000_000, None),  # fast needs more than a quarter and less than half
        (60_000_000, 120_000_000),
    ],
)
def test_the_default_is_fast_where_half_of_what_is_available_allows_it(
    monkeypatch: pytest.MonkeyPatch, available: int, memory: int | None
) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: available)
    monkeypatch.setattr(budget, "default_workers", lambda: 4)
    used = 90 * MB
    fast = used + budget.RESERVE + 4 * PLAIN.worker(budget.DEVICE_WINDOW)
    assert budget.default_memory(PLAIN, used) == (fast if memory is None else memory)
    chosen = decide(None, None, PLAIN, used, used)
    assert chosen.workers == 4 or available < 100_000_000
    assert chosen.window_bytes >= budget.DEVICE_WINDOW or available < 100_000_000
