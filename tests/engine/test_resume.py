"""A merge that was ended goes on from the first unfinished shard, whatever ended it, and gives the same output."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paramdelta import api
from paramdelta.checkpoint.discovery import STAGING
from paramdelta.engine.journal import JOURNAL
from paramdelta.engine.receipt import RECEIPT
from paramdelta.errors import CancelledError, CheckpointError, InputChangedError, NonFiniteError, OutputError
from paramdelta.planning.policies import Policies
from tests.block_scaled import CONFIG, tensors_of
from tests.make import encode, normal, skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paramdelta.engine.progress import Progress
    from paramdelta.results import MergeResult

SHARDS = 4


def make(root: Path) -> Path:
    for seed, role in enumerate(("post", "base", "new_base")):
        tensors = {f"t{number}": normal((90, 70), seed=seed + 10 * number) for number in range(2 * SHARDS)}
        write_checkpoint(root / role, tensors, shards=SHARDS, config={"from": role})
        (root / role / "tokenizer.json").write_text(f'{{"from": "{role}"}}')
    return root


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("triple"))


@pytest.fixture(scope="module")
def undisturbed(triple: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    merge(triple, output)
    return contents(output)


def merge(triple: Path, output: Path, **options: Any) -> MergeResult:
    return api.merge(triple / "post", triple / "base", triple / "new_base", output, **options)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def stop_after(triple: Path, output: Path, shards: int, **options: Any) -> CancelledError:
    """End a merge once so many shards are done."""
    cancelled = threading.Event()

    def look(progress: Progress) -> None:
        if progress.shards_done == shards:
            cancelled.set()

    with pytest.raises(CancelledError) as caught:
        merge(triple, output, workers=1, on_progress=look, cancelled=cancelled, **options)
    return caught.value


def journal(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / STAGING / JOURNAL).read_text().splitlines()]


@pytest.mark.parametrize("io", ["auto", "mmap", "pread", "direct"])
@pytest.mark.parametrize("shards", range(1, SHARDS))
def test_it_goes_on_with_other_limits_and_backends(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes], shards: int, io: str
) -> None:
    skip_without_direct_io(io, triple)
    stop_after(triple, tmp_path / "out", shards)
    before = {record["shard"] for record in journal(tmp_path / "out")[1:]}
    assert len(before) >= shards
    times = {name: (tmp_path / "out" / STAGING / name).stat().st_mtime_ns for name in before}
    seen: list[Progress] = []
    result = merge(triple, tmp_path / "out", workers=3, memory="1GB", io=io, on_progress=seen.append)
    assert result.resumed_shards == len(before)
    assert contents(tmp_path / "out") == undisturbed
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == times  # not written again
    assert all(progress.resumed > 0 and progress.done > progress.resumed for progress in seen)
    assert (seen[-1].done, seen[-1].shards_done) == (seen[-1].total, SHARDS)
    share = (SHARDS - len(before)) / SHARDS
    assert result.bytes_read == pytest.approx(3 * result.bytes_written * share, rel=0.01)


def test_the_message_says_what_is_kept(triple: Path, tmp_path: Path) -> None:
    error = stop_after(triple, tmp_path / "out", 2)
    assert f"of {SHARDS} shards are finished and kept in {STAGING}: the same command goes on from there" in str(error)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [STAGING]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_plan_says_what_is_finished_and_asks_for_space_for_the_rest_only(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    stop_after(triple, tmp_path / "out", shards)
    before = contents(tmp_path / "out")
    plan = api.plan(triple / "post", triple / "base", triple / "new_base")
    monkeypatch.setattr(api, "free_space", lambda _: sum(shard.size for shard in plan.shards[1:]))
    codes = {warning.code: warning.message for warning in api.warnings_for(plan, tmp_path / "out")}
    assert codes["unfinished"] == f"{shards} of {SHARDS} shards are finished and kept: a merge goes on from there"
    assert "disk" not in codes
    anew = {warning.code for warning in api.warnings_for(plan, tmp_path / "out", overwrite=True)}
    assert "disk" in anew
    assert "unfinished" not in anew
    assert contents(tmp_path / "out") == before


def test_a_plan_says_where_a_merge_would_be_refused(triple: Path, tmp_path: Path) -> None:
    stop_after(triple, tmp_path / "out", 1)
    other = api.plan(triple / "post", triple / "base", triple / "new_base", alpha=0.5)
    [message] = [warning.message for warning in api.warnings_for(other, tmp_path / "out") if warning.code == "output"]
    assert "an unfinished merge that differs" in message
    assert "alpha" in message
    merge(triple, tmp_path / "done")
    assert [warning.code for warning in api.warnings_for(other, tmp_path / "done")] == ["output"]
    same = api.plan(triple / "post", triple / "base", triple / "new_base")
    assert not api.warnings_for(same, tmp_path / "done")
    assert not api.warnings_for(other, tmp_path / "done", overwrite=True)


def test_a_plan_says_where_files_of_others_are_in_the_way(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / STAGING).mkdir(parents=True)
    (tmp_path / "out" / STAGING / "thesis.txt").write_text("mine")
    plan = api.plan(triple / "post", triple / "base", triple / "new_base")
    [warning] = api.warnings_for(plan, tmp_path / "out", overwrite=True)
    assert "did not write: thesis.txt" in warning.message


def test_what_is_unfinished_is_no_checkpoint(triple: Path, tmp_path: Path) -> None:
    stop_after(triple, tmp_path / "out", 1)
    for use in (api.inspect, api.verify):
        with pytest.raises(CheckpointError, match="unfinished merge"):
            use(tmp_path / "out")
    with pytest.raises(CheckpointError, match="unfinished merge"):
        api.plan(tmp_path / "out", triple / "base", triple / "new_base")
    shutil.copy(triple / "post" / "model-00001-of-00004.safetensors", tmp_path / "out")  # died while it published
    with pytest.raises(CheckpointError, match="unfinished merge"):
        api.inspect(tmp_path / "out")


def test_nothing_is_kept_where_nothing_is_finished(triple: Path, tmp_path: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError) as caught:
        merge(triple, tmp_path / "out", cancelled=cancelled)
    assert "kept" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_merge_may_be_interrupted_again(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    for shards in range(1, SHARDS):
        stop_after(triple, tmp_path / "out", shards)
    result = merge(triple, tmp_path / "out")
    assert result.resumed_shards == SHARDS - 1
    assert contents(tmp_path / "out") == undisturbed


def test_counts_and_losses_of_finished_shards_are_not_forgotten(tmp_path: Path) -> None:
    large = {"post": 3e38, "base": -3e38, "new_base": 3e38}
    for seed, (role, value) in enumerate(large.items()):
        rng = np.random.default_rng(seed)
        tensors = tensors_of({"a": rng.normal(0, 0.02, (200, 300)), "b": rng.normal(0, 0.02, (300, 200))}, seed=seed)
        tensors["w"] = ("F32", (2,), encode([1.0, value], "F32"))
        write_checkpoint(tmp_path / role, tensors, shards=3, config=CONFIG)
    options = {"policies": Policies(fp8="requantise")}
    with pytest.raises(NonFiniteError):
        merge(tmp_path, tmp_path / "whole", **options)
    result = merge(tmp_path, tmp_path / "whole", allow_nonfinite=True, **options)
    assert (result.resumed_shards, result.bytes_read) == (result.shards, 0)
    stop_after(tmp_path, tmp_path / "out", 1, **options)
    again = merge(tmp_path, tmp_path / "out", allow_nonfinite=True, **options)
    assert again.nonfinite == result.nonfinite == {"w": {"infinities": 1, "nans": 0}}
    assert again.requantised == result.requantised
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# -- what is not resumed -----------------------------------------------------------------------------------------------


def refused(triple: Path, output: Path, *differences: str, **options: Any) -> None:
    before = contents(output)
    with pytest.raises(OutputError, match="holds an unfinished merge that differs from this one") as caught:
        merge(triple, output, **options)
    assert [line.strip() for line in caught.value.message.splitlines()[1:]] == list(differences)
    assert caught.value.exit_code == 5
    assert contents(output) == before


def test_another_request_is_refused_with_what_differs(triple: Path, tmp_path: Path) -> None:
    stop_after(triple, tmp_path / "out", 2)
    output = tmp_path / "out"
    refused(triple, output, 'dtype: null then, "F32" now', dtype="f32")
    refused(triple, output, "alphas: [[1.0, []]] then, [[0.5, []]] now", alpha=0.5)
    refused(triple, output, "shard-size: null then, 1000000 now", shard_size="1MB")


def test_a_changed_input_is_refused_by_name(tmp_path: Path) -> None:
    triple = make(tmp_path / "in")
    stop_after(triple, tmp_path / "out", 2)
    shard = triple / "base" / "model-00003-of-00004.safetensors"
    status = shard.stat()
    os.utime(shard, ns=(0, 0))
    refused(triple, tmp_path / "out", "base: model-00003-of-00004.safetensors has changed")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    (triple / "post" / "config.json").write_text("{}")
    refused(triple, tmp_path / "out", "post: another config.json")


def test_another_version_of_the_arithmetic_is_refused(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(triple, tmp_path / "out", 2)
    monkeypatch.setattr("paramdelta.planning.identity.ARITHMETIC", 99)
    refused(triple, tmp_path / "out", "arithmetic: 1 then, 99 now")


def test_overwrite_starts_anew(triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    stop_after(triple, tmp_path / "out", 2, alpha=0.5)
    result = merge(triple, tmp_path / "out", overwrite=True)
    assert result.resumed_shards == 0
    assert contents(tmp_path / "out") == undisturbed


def test_an_input_that_changes_while_it_is_read_publishes_nothing(tmp_path: Path) -> None:
    triple = make(tmp_path / "in")

    def touch(progress: Progress) -> None:
        if progress.shards_done == 2:
            for shard in (triple / "post").glob("*.safetensors"):
                os.utime(shard, ns=(0, 0))

    with pytest.raises(InputChangedError, match="the same command with the inputs as they were goes on from there"):
        merge(triple, tmp_path / "out", workers=1, on_progress=touch)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [STAGING]


# In a process that may die of it: post's shards end after the first block, at the worst as soon as pages of one are
# mapped, which is later than any check can be.
SHRINK = """
import os, pathlib, sys
from paramdelta import api
from paramdelta.storage.source import MappedSource
t, out, worst = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "worst"
def shrink(*_):
    if any(out.glob(".paramdelta/*.safetensors")):
        for shard in (t / "post").glob("*.safetensors"):
            os.truncate(shard, 4096)
real = MappedSource.borrow
def borrow(self, *range):
    loan = real(self, *range)
    if self._file.path.startswith(str(t / "post")):
        shrink()
    return loan
if worst:
    MappedSource.borrow = borrow
try:
    api.merge(t / "post", t / "base", t / "new_base", out, io="mmap", workers=1, on_progress=None if worst else shrink)
except api.ParamDeltaError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no mapped file can shrink here")
@pytest.mark.parametrize("when", ["between windows", "worst"])
def test_nothing_is_published_of_a_mapped_input_that_shrinks(tmp_path: Path, when: str) -> None:
    make(tmp_path)
    before = contents(tmp_path / "post")
    times = {name: (tmp_path / "post" / name).stat().st_mtime_ns for name in before}
    merge(tmp_path, tmp_path / "wanted")
    run = subprocess.run([sys.executable, "-c", SHRINK, tmp_path, tmp_path / "out", when], capture_output=True)
    codes = {-signal.SIGBUS} if when == "worst" else {-signal.SIGBUS, 6}  # a worker may be reading just then
    assert run.returncode in codes, run.stderr
    out = tmp_path / "out"
    assert not out.exists() or [entry.name for entry in out.iterdir()] == [STAGING]
    for name, raw in before.items():
        path = tmp_path / "post" / name
        with path.open("r+b") as file:  # the same inode, as where a copy goes on
            file.write(raw)
        os.utime(path, ns=(times[name], times[name]))
    merge(tmp_path, out)
    assert contents(out) == contents(tmp_path / "wanted")


# -- a journal that is not what it was ---------------------------------------------------------------------------------


def without_last_line(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


DAMAGE: dict[str, tuple[Any, int]] = {
    "cut short": (lambda text: text[:-9], 1),
    "no newline": (lambda text: text[:-1], 1),
    "a line less": (without_last_line, 1),
    "garbage behind": (lambda text: text + '{"shard": 5}\n', 2),
    "more garbage behind": (lambda text: text + "\x00\xff[[\n", 2),
    "an unknown shard": (lambda text: text + '{"shard": "../x", "bytes": 1, "xxh3": "", "regions": ""}\n', 2),
    "only the head": (lambda text: text.splitlines(keepends=True)[0], 0),
    "empty": (lambda _: "", 0),
    "something else": (lambda _: "[1]\n", 0),
    "deep": (lambda _: "[" * 100_000 + "\n", 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_a_journal_does_not_say_is_made_again(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes], damage: str
) -> None:
    stop_after(triple, tmp_path / "out", 2)
    path = tmp_path / "out" / STAGING / JOURNAL
    change, resumed = DAMAGE[damage]
    lines = path.read_text().splitlines(keepends=True)[:3]
    path.write_text(change("".join(lines)), encoding="latin-1")
    result = merge(triple, tmp_path / "out")
    assert result.resumed_shards == resumed
    assert contents(tmp_path / "out") == undisturbed


def test_a_journal_that_cannot_be_read_is_no_reason_to_forget_what_is_finished(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    stop_after(triple, tmp_path / "out", 2)
    path = tmp_path / "out" / STAGING / JOURNAL
    path.rename(path.with_name("kept"))
    path.mkdir()
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="journal of an unfinished merge cannot be used: not a regular file"):
        merge(triple, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    merge(triple, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == undisturbed


def test_a_shard_that_is_gone_or_has_another_size_is_made_again(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    stop_after(triple, tmp_path / "out", 3)
    staging = tmp_path / "out" / STAGING
    names = [record["shard"] for record in journal(tmp_path / "out")[1:]]
    (staging / names[0]).unlink()
    os.truncate(staging / names[1], 4096)
    (staging / "left.over").mkdir()
    (staging / "left.over" / "file").write_text("x")
    result = merge(triple, tmp_path / "out")
    assert result.resumed_shards == len(names) - 2
    assert contents(tmp_path / "out") == undisturbed


def test_space_is_needed_for_the_rest_only(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    stop_after(triple, tmp_path / "out", 3)
    monkeypatch.setattr("paramdelta.engine.output.free_space", lambda _: 60_000)
    merge(triple, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed
    with pytest.raises(OutputError, match="or your quota, has"):
        merge(triple, tmp_path / "other")


# -- who holds the lock ------------------------------------------------------------------------------------------------

HOLD = """
import sys, pathlib
from paramdelta import api
t, out = pathlib.Path(sys.argv[1]), sys.argv[2]
def hold(_):
    print("held", flush=True)
    sys.stdin.read()
api.merge(t / "post", t / "base", t / "new_base", out, on_progress=hold, workers=1)
"""


@contextlib.contextmanager
def holding(triple: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock of an output until it is killed."""
    command = [sys.executable, "-c", HOLD, str(triple), str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            yield holder
        finally:
            holder.kill()


def test_the_holder_of_the_lock_is_named_and_a_dead_one_holds_nothing(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    with (
        holding(triple, tmp_path / "out") as holder,
        pytest.raises(OutputError, match=rf"another run is writing this output: process {holder.pid} on .+, since"),
    ):
        merge(triple, tmp_path / "out", overwrite=True)
    merge(triple, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed


def test_who_tries_again_and_again_goes_on_as_soon_as_the_holder_is_killed(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Nobody waits for a lock: a second run is refused at once, until the first is dead."""
    with holding(triple, tmp_path / "out") as holder:
        command = [sys.executable, "-c", PERSIST, str(triple), str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "refused\n"
            holder.kill()
            assert waiting.communicate(timeout=60)[0] == "merged\n"
    assert contents(tmp_path / "out") == undisturbed


PERSIST = """
import sys, pathlib, time
from paramdelta import api
from paramdelta.errors import OutputError
t, out = pathlib.Path(sys.argv[1]), sys.argv[2]
told = False
while True:
    try:
        api.merge(t / "post", t / "base", t / "new_base", out)
        print("merged")
        break
    except OutputError:
        if not told:
            print("refused", flush=True)
            told = True
        time.sleep(0.02)
"""

MERGE = """
import sys, pathlib
from paramdelta import api
from paramdelta.errors import ParamDeltaError
t, out = pathlib.Path(sys.argv[1]), sys.argv[2]
try:
    print(api.merge(t / "post", t / "base", t / "new_base", out).already_complete)
except ParamDeltaError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_of_two_merges_that_race_one_wins_and_the_other_is_told(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    command = [sys.executable, "-c", MERGE, str(triple), str(tmp_path / "out")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(racer.communicate()[0], racer.returncode) for racer in racers]
    assert ("False\n", 0) in ends
    for text, code in ends:
        assert (text, code) in {("False\n", 0), ("True\n", 0)} or (code == 5 and "another run is writing" in text)
    assert [text for text, _ in ends].count("False\n") == 1
    assert contents(tmp_path / "out") == undisturbed


def test_what_a_death_at_the_very_end_left_is_swept(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "saved")
    (tmp_path / "out" / STAGING).mkdir()
    (tmp_path / "out" / STAGING / JOURNAL).write_text("{}\n")
    assert merge(triple, tmp_path / "out").already_complete
    assert contents(tmp_path / "out") == contents(tmp_path / "saved")
    assert (tmp_path / "out" / RECEIPT).exists()
