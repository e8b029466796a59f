"""One output that several runs make."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import paramdelta
from paramdelta import Recipe, commit, merge_shards
from paramdelta.engine.shard_locks import ShardLocks
from paramdelta.errors import CancelledError, NonFiniteError, OutputError, RecipeError
from paramdelta.planning.plan import make_plan
from paramdelta.planning.units import parse_numbers
from paramdelta.sharing import SharedOutput, ranges_text
from tests.make import encode, normal, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paramdelta.engine.progress import Progress

SHARDS = 4
STAGING = ".paramdelta"


def make(root: Path, tensors: int = 8, size: int = 40_000) -> Path:
    for seed, role in enumerate(("post", "base", "new")):
        weights = {}
        for n in range(tensors):
            dtype, _, data = normal((10_000,), seed=100 * seed + n)
            weights[f"t{n}"] = (dtype, (size,), bytes(data) * (size // 10_000))
        folder = write_checkpoint(root / role, weights, shards=SHARDS)
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return root


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("triple"))


@pytest.fixture(scope="module")
def whole(triple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    paramdelta.merge_recipe(recipe(triple), output)
    return output


def recipe(root: Path, **options: Any) -> Recipe:
    return Recipe.of(root / "post", root / "base", root / "new", **options)


def arguments(root: Path, output: Path, shards: str) -> list[str]:
    inputs = [f"--post={root / 'post'}", f"--base={root / 'base'}", f"--new-base={root / 'new'}"]
    return ["merge", *inputs, f"--output={output}", f"--shards={shards}", "--json"]


def start(root: Path, output: Path, shards: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "paramdelta", *arguments(root, output, shards)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def same(one: Path, other: Path) -> bool:
    """Whether two outputs are the same, receipts included but for what they say of time."""
    names = {path.name for path in one.iterdir()}
    if names != {path.name for path in other.iterdir()}:
        return False
    receipts = [json.loads((path / "paramdelta.json").read_text()) for path in (one, other)]
    for receipt in receipts:
        assert receipt.pop("sha256")
        receipt["files"] = [each for each in receipt["files"] if each["name"] != "recipe.yaml"]  # relative paths
    texts = [json.dumps({k: v for k, v in receipt.items() if k != "created"}) for receipt in receipts]
    content = names - {"paramdelta.json", "recipe.yaml"}
    return texts[0] == texts[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in content)


def test_runs_that_make_some_shards_each_give_what_one_run_gives(triple: Path, whole: Path, tmp_path: Path) -> None:
    first = merge_shards(recipe(triple), tmp_path / "out", [3, 1])
    assert (first.wanted, first.made, first.finished, first.shards) == ((1, 3), (1, 3), 2, SHARDS)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != STAGING]
    second = merge_shards(recipe(triple), tmp_path / "out", [2, 3, 4])
    assert (second.made, second.finished) == ((2, 4), 4)
    assert first.bytes_written + second.bytes_written == 2 * 8 * 40_000
    result = commit(tmp_path / "out")
    assert result.resumed_shards == SHARDS
    assert same(whole, tmp_path / "out")
    assert paramdelta.verify(tmp_path / "out", recompute=True).ok
    assert not (tmp_path / "out" / STAGING).exists()


def test_processes_that_begin_at_once_make_one_output(triple: Path, whole: Path, tmp_path: Path) -> None:
    runs = [start(triple, tmp_path / "out", str(number)) for number in range(1, SHARDS + 1)]
    told = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    assert [each["made"] for each in told] == [[1], [2], [3], [4]]
    assert max(each["finished"] for each in told) <= SHARDS
    commit(tmp_path / "out")
    assert same(whole, tmp_path / "out")


def test_what_is_missing_is_named_and_nothing_is_published(triple: Path, whole: Path, tmp_path: Path) -> None:
    merge_shards(recipe(triple), tmp_path / "out", [2])
    with pytest.raises(OutputError, match="3 of 4 shards are not finished: 1,3-4"):
        commit(tmp_path / "out")
    result = paramdelta.merge_recipe(recipe(triple), tmp_path / "out")
    assert result.resumed_shards == 1
    assert same(whole, tmp_path / "out")


def test_an_interrupted_merge_may_be_shared(triple: Path, whole: Path, tmp_path: Path) -> None:
    """What a run of its own has finished counts, and what others add to it counts for it."""
    stop = threading.Event()

    def look(progress: Progress) -> None:
        if progress.shards_done:
            stop.set()

    with pytest.raises(CancelledError):
        paramdelta.merge_recipe(recipe(triple), tmp_path / "out", workers=1, on_progress=look, cancelled=stop)
    before = len((tmp_path / "out" / STAGING / "journal.jsonl").read_text().splitlines()) - 1
    assert 0 < before < SHARDS
    shared = merge_shards(recipe(triple), tmp_path / "out", [SHARDS])
    assert shared.finished == before + 1
    assert paramdelta.merge_recipe(recipe(triple), tmp_path / "out").resumed_shards == before + 1
    assert same(whole, tmp_path / "out")


def in_the_middle(root: Path, output: Path, shards: list[int], act: Callable[[], None]) -> None:
    """Do something while a run makes some shards, with nothing of it finished."""
    done: list[Progress] = []

    def look(progress: Progress) -> None:
        if not done and not progress.shards_done:
            done.append(progress)
            act()

    merge_shards(recipe(root), output, shards, workers=1, on_progress=look)
    assert done


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A triple whose shards have several windows."""
    return make(tmp_path / "long", size=8_000_000)


def test_nobody_else_makes_a_shard_that_is_being_made_nor_publishes(long: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def act() -> None:
        with pytest.raises(OutputError, match=r"another run is making its shard model-00001-of-00004.safetensors"):
            merge_shards(recipe(long), output, [1, 2])
        with pytest.raises(OutputError, match="another run is making its shard"):
            paramdelta.merge_recipe(recipe(long), output)
        with pytest.raises(OutputError, match="4 of 4 shards are not finished"):
            commit(output)
        assert merge_shards(recipe(long), output, [4]).made == (4,)

    in_the_middle(long, output, [1], act)
    assert merge_shards(recipe(long), output, [1, 2, 3]).made == (2, 3)
    assert commit(output).shards == SHARDS


def test_a_run_that_is_killed_costs_its_shard_alone(long: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    merge_shards(recipe(long), output, [1])
    run = start(long, output, "2-3")
    while not (output / STAGING / "model-00002-of-00004.safetensors").exists():
        assert run.poll() is None
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    again = merge_shards(recipe(long), output, [2, 3])
    assert 1 <= len(again.made) <= 2
    assert merge_shards(recipe(long), output, [1, 4]).made == (4,)
    assert commit(output).shards == SHARDS
    assert paramdelta.verify(output, recompute=True).ok


def test_a_shard_that_somebody_finishes_just_before_is_not_made_again(
    triple: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = ShardLocks.take

    def late(self: ShardLocks, names: Any) -> None:
        monkeypatch.setattr(ShardLocks, "take", take)
        shared = SharedOutput(tmp_path / "out", make_plan(recipe(triple)), [1])
        shared._locks.take(names := list(names))
        for suffix in ("", ".record"):
            done = tmp_path / "done" / STAGING / f"{names[0]}{suffix}"
            shutil.copy(done, tmp_path / "out" / STAGING)
        shared._locks.release()
        take(self, names)

    for place in ("done", "out"):
        merge_shards(recipe(triple), tmp_path / place, [1])
    merge_shards(recipe(triple), tmp_path / "done", [2])
    monkeypatch.setattr(ShardLocks, "take", late)
    assert merge_shards(recipe(triple), tmp_path / "out", [2]).made == ()
    merge_shards(recipe(triple), tmp_path / "out", [3, 4])
    commit(tmp_path / "out")
    assert same(whole, tmp_path / "out")


def test_no_record_says_of_a_shard_in_the_making_that_it_is_finished(triple: Path, tmp_path: Path) -> None:
    staging = tmp_path / "out" / STAGING
    merge_shards(recipe(triple), tmp_path / "out", [1])
    [record] = staging.glob("*.record")
    (staging / "model-00001-of-00004.safetensors").unlink()
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        merge_shards(recipe(triple), tmp_path / "out", [1], cancelled=stop)
    assert not record.exists()


def test_records_of_another_merge_say_nothing(triple: Path, tmp_path: Path) -> None:
    merge_shards(recipe(triple, alpha=0.5), tmp_path / "other", [1])
    merge_shards(recipe(triple), tmp_path / "out", [2])
    for path in (tmp_path / "other" / STAGING).glob("model-00001*"):
        shutil.copy(path, tmp_path / "out" / STAGING)
    assert merge_shards(recipe(triple), tmp_path / "out", [1, 2]).made == (1,)


def test_an_output_behind_a_link_is_published(triple: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    merge_shards(recipe(triple), tmp_path / "link/out", [1, 2, 3, 4])
    commit(tmp_path / "link/out")
    assert same(whole, tmp_path / "far/away/out")


def test_a_recipe_that_was_given_up_is_not_published(triple: Path, tmp_path: Path) -> None:
    merge_shards(recipe(triple), tmp_path / "out", [1])
    stop = threading.Event()

    def look(progress: Progress) -> None:
        if progress.shards_done:
            stop.set()

    other = recipe(triple, alpha=0.5)
    with pytest.raises(CancelledError):
        paramdelta.merge_recipe(other, tmp_path / "out", overwrite=True, workers=1, on_progress=look, cancelled=stop)
    merge_shards(other, tmp_path / "out", [1, 2, 3, 4])
    commit(tmp_path / "out")
    assert paramdelta.merge_recipe(other, tmp_path / "out").already_complete


def test_another_request_is_refused(triple: Path, tmp_path: Path) -> None:
    merge_shards(recipe(triple), tmp_path / "out", [1])
    with pytest.raises(OutputError, match="differs from this one"):
        merge_shards(recipe(triple, alpha=0.5), tmp_path / "out", [2])
    with pytest.raises(OutputError, match="differs from this one"):
        paramdelta.merge_recipe(recipe(triple, alpha=0.5), tmp_path / "out")


def test_changed_inputs_are_not_published(tmp_path: Path) -> None:
    root = make(tmp_path)
    merge_shards(recipe(root), tmp_path / "out", [1, 2, 3, 4])
    os.utime(next((root / "post").glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(OutputError, match="has changed"):
        commit(tmp_path / "out")


def test_what_is_not_finite_is_decided_on_when_it_is_published(tmp_path: Path) -> None:
    big, small = encode([3e38] * 8, "BF16"), encode([-3e38] * 8, "BF16")
    for role, value in (("post", big), ("base", small), ("new", big)):
        tensors = {f"t{n}": ("BF16", (8,), value) for n in range(SHARDS)}
        write_checkpoint(tmp_path / role, tensors, shards=SHARDS)
    assert merge_shards(recipe(tmp_path), tmp_path / "out", [1, 2, 3, 4]).nonfinite == 8 * SHARDS
    with pytest.raises(NonFiniteError):
        commit(tmp_path / "out")
    assert commit(tmp_path / "out", allow_nonfinite=True).nonfinite["t0"] == {"infinities": 8, "nans": 0}


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b'{"shard": "model-00001-of-00004.safetensors"}'])
def test_a_record_that_makes_no_sense_costs_its_shard(damage: bytes, triple: Path, whole: Path, tmp_path: Path) -> None:
    merge_shards(recipe(triple), tmp_path / "out", [1, 2])
    (tmp_path / "out" / STAGING / "model-00001-of-00004.safetensors.record").write_bytes(damage)
    assert merge_shards(recipe(triple), tmp_path / "out", [1, 2, 3, 4]).made == (1, 3, 4)
    commit(tmp_path / "out")
    assert same(whole, tmp_path / "out")


def test_a_finished_output_stays_as_it_is(triple: Path, tmp_path: Path) -> None:
    merge_shards(recipe(triple), tmp_path / "out", [1, 2, 3, 4])
    commit(tmp_path / "out")
    assert commit(tmp_path / "out").already_complete
    assert merge_shards(recipe(triple), tmp_path / "out", [1]).already_complete


def test_there_must_be_something_to_publish(triple: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no shards"):
        commit(tmp_path / "out")
    for numbers in ([0], [5], [], [1, 9]):
        with pytest.raises(RecipeError, match="shards 1 to 4"):
            merge_shards(recipe(triple), tmp_path / "out", numbers)
    assert not (tmp_path / "out").exists()


def test_the_commands(triple: Path, whole: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paramdelta", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    made = run(*arguments(triple, tmp_path / "out", "1-2,4")[:-1])
    assert "made 1-2,4" in made.stdout
    assert "3 of 4 shards are finished: 1 more to make" in made.stdout
    refused = run("commit", str(tmp_path / "out"))
    assert refused.returncode == 5
    assert "--shards 3" in refused.stderr
    assert "paramdelta commit" in run(*arguments(triple, tmp_path / "out", "3")[:-1]).stdout
    published = run("commit", str(tmp_path / "out"), "--json")
    assert json.loads(published.stdout)["resumed_shards"] == SHARDS
    assert same(whole, tmp_path / "out")
    for wrong in ("0", "2-1", "a", "", "1,,2"):
        assert run(*arguments(triple, tmp_path / "other", wrong)).returncode == 2
    assert run(*arguments(triple, tmp_path / "other", "1"), "--overwrite").returncode == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("text", "numbers"), [("3", (3,)), ("1-3,7", (1, 2, 3, 7)), (" 2 , 1-2", (1, 2))])
def test_numbers_of_shards(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text, "shards") == numbers
    assert parse_numbers(ranges_text(numbers), "shards") == numbers
