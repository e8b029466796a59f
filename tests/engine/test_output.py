from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pytest

from paramdelta import api
from paramdelta.checkpoint.discovery import STAGING
from paramdelta.engine import output as output_module
from paramdelta.engine.digests import Digest, Digester
from paramdelta.engine.journal import JOURNAL
from paramdelta.engine.location import free_space
from paramdelta.engine.output import OutputDirectory
from paramdelta.engine.progress import FinishedShard
from paramdelta.engine.receipt import RECEIPT, is_complete, read_receipt
from paramdelta.engine.staging import Staging
from paramdelta.errors import (
    BudgetError,
    CancelledError,
    CheckpointError,
    InputChangedError,
    NonFiniteError,
    OutputError,
)
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.recipe import Recipe
from paramdelta.storage import platform
from paramdelta.storage.identity import FileIdentity
from tests.make import encode, normal, sparse_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from paramdelta.engine.progress import Progress
    from paramdelta.results import MergeResult

INDEX = "model.safetensors.index.json"


def make_triple(root: Path, shards: int = 2) -> Path:
    for seed, role in enumerate(("post", "base", "new_base")):
        tensors = {name: normal((40, 70), seed=seed) for name in ("a", "b", "c")}
        write_checkpoint(root / role, tensors, shards=shards, config={"from": role})
    for role in ("post", "new_base"):
        (root / role / "tokenizer.json").write_text(f'{{"from": "{role}"}}')
    return root


@pytest.fixture
def triple(tmp_path: Path) -> Path:
    return make_triple(tmp_path / "in")


def merge(triple: Path, output: Path, **options: Any) -> MergeResult:
    return api.merge(triple / "post", triple / "base", triple / "new_base", output, **options)


def plan_of(triple: Path) -> Plan:
    return make_plan(Recipe.of(triple / "post", triple / "base", triple / "new_base"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_a_finished_output_has_weights_index_sidecars_and_receipt_and_no_staging(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
        "paramdelta.json",
        "recipe.yaml",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"from": "new_base"}
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"from": "post"}


def test_the_receipt_names_inputs_without_the_users_paths(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out/paramdelta.json").read_text()
    assert read_receipt(tmp_path / "out") is not None


def test_the_index_is_renamed_last_and_after_everything_is_synced(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def note_replace(self: Path, target: Path) -> Path:
        if target.name != JOURNAL:
            calls.append(f"rename {target.name}")
        return replace(self, target)

    def note_sync(path: Path) -> None:
        calls.append(f"sync {path.name}")

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", note_replace)
    monkeypatch.setattr(platform, "sync_directory", note_sync)
    merge(triple, tmp_path / "out")
    renames = [call for call in calls if call.startswith("rename")]
    assert renames[-1] == f"rename {INDEX}"
    place = calls.index(f"rename {INDEX}")
    assert calls[place - 1] == "sync out"
    assert calls[place + 1] == "sync out"
    assert calls[calls.index(renames[0]) - 1] == f"sync {STAGING}"


def test_a_single_file_is_renamed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triple = make_triple(tmp_path / "in", shards=1)
    renamed: list[str] = []

    def note(self: Path, target: Path) -> Path:
        renamed.append(target.name)
        return replace(self, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", note)
    merge(triple, tmp_path / "out")
    assert renamed[-1] == "model.safetensors"


def kept(output: Path) -> set[str]:
    """Return the shards that a later run need not make again; nothing else may be left."""
    names = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == {f"{STAGING}/lock", f"{STAGING}/{JOURNAL}"}
    return {name.removeprefix(f"{STAGING}/") for name in shards}


SHARDS = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}


def test_a_failure_while_publishing_publishes_nothing_and_keeps_the_shards(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on_index(self: Path, target: Path) -> Path:
        if target.name == INDEX:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", fail_on_index)
    with pytest.raises(OutputError, match="2 of 2 shards are finished and kept"):
        merge(triple, tmp_path / "out")
    assert kept(tmp_path / "out") == SHARDS


def test_missing_parents_are_created_and_removed_again_after_a_failure(triple: Path, tmp_path: Path) -> None:
    plan = plan_of(triple)
    with (
        pytest.raises(RuntimeError),
        OutputDirectory(tmp_path / "a/b/out", plan, overwrite=False),
    ):
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_an_empty_directory_is_fine_and_stays_after_a_failure(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), OutputDirectory(tmp_path / "out", plan_of(triple), overwrite=False):
        raise RuntimeError
    assert list((tmp_path / "out").iterdir()) == []
    merge(triple, tmp_path / "out")
    assert (tmp_path / "out" / INDEX).exists()


def _lock(output: Path) -> Path:
    (output / STAGING).mkdir(parents=True, exist_ok=True)
    return output / STAGING / "lock"


def test_an_output_locked_by_another_run_is_refused_and_left_alone(triple: Path, tmp_path: Path) -> None:
    with filelock.FileLock(_lock(tmp_path / "out")):
        (tmp_path / "out" / STAGING / "half-written.safetensors").write_bytes(b"theirs")
        with pytest.raises(OutputError, match="another run"):
            merge(triple, tmp_path / "out")
        assert (tmp_path / "out" / STAGING / "half-written.safetensors").read_bytes() == b"theirs"


def test_what_a_dead_run_left_in_staging_is_cleared(triple: Path, tmp_path: Path) -> None:
    _lock(tmp_path / "out").touch()
    (tmp_path / "out" / STAGING / JOURNAL).write_text("{")
    (tmp_path / "out" / STAGING / "model-00001-of-00002.safetensors").write_bytes(b"half")
    merge(triple, tmp_path / "out")
    assert not (tmp_path / "out" / STAGING).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_in_staging_that_no_run_has_left_are_not_touched(triple: Path, tmp_path: Path, overwrite: bool) -> None:
    mine = tmp_path / "out" / STAGING / "mine" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(OutputError, match=r"did not write: mine"):
        merge(triple, tmp_path / "out", overwrite=overwrite)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]
    shutil.rmtree(tmp_path / "out")
    merge(triple, tmp_path / "out")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert merge(triple, tmp_path / "out").already_complete
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_in_staging_is_refused(triple: Path, tmp_path: Path, overwrite: bool) -> None:
    inside = tmp_path / "out" / STAGING / "deep" / "post"
    shutil.copytree(triple / "post", inside)
    (tmp_path / "out" / STAGING / JOURNAL).touch()
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="inputs are never written"):
        api.merge(inside, triple / "base", triple / "new_base", tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "directory"])
def test_nothing_is_written_through_what_is_called_like_our_own_files(triple: Path, tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    holder = tmp_path / "out" / STAGING / "holder.json"
    holder.parent.mkdir(parents=True)
    if kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes in files here")
        os.mkfifo(holder)
    elif kind == "directory":
        holder.mkdir()
    elif kind == "link":
        holder.symlink_to(victim)
    else:
        holder.hardlink_to(victim)
    merge(triple, tmp_path / "out")
    assert victim.read_text() == "theirs"
    assert not (tmp_path / "out" / STAGING).exists()


def test_an_unfinished_merge_stays_until_nothing_speaks_against_the_new_one(triple: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge(triple, tmp_path / "out", workers=1, on_progress=interrupt_after_a_shard)
    before = contents(tmp_path / "out")
    assert len(before) > 2
    with pytest.raises(BudgetError):
        merge(triple, tmp_path / "out", alpha=0.5, overwrite=True, memory="1MB")
    assert contents(tmp_path / "out") == before
    assert merge(triple, tmp_path / "out").resumed_shards == 1


def interrupt_after_a_shard(progress: Progress) -> None:
    if progress.shards_done:
        raise KeyboardInterrupt


def test_a_disk_that_dies_is_told_for_what_it_is(triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure is the one that is told, whatever else fails on the way out."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def die(_: object) -> None:
        for module, names in ((os, ("unlink", "rmdir", "replace")), (platform, ("sync_directory", "sync_file"))):
            for name in names:
                monkeypatch.setattr(module, name, fail)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(platform, "sync_file", die)
    with pytest.raises(OutputError, match="Input/output error"):
        merge(triple, tmp_path / "out")
    monkeypatch.undo()
    merge(triple, tmp_path / "out")


def test_a_receipt_that_cannot_be_read_is_told_for_what_it_is(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "out" / RECEIPT).write_text("{")
    with pytest.raises(OutputError, match="cannot be read, or is damaged"):
        merge(triple, tmp_path / "out", overwrite=True)


def test_a_file_in_the_place_of_the_staging_directory_is_told_for_what_it_is(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STAGING).write_text("mine")
    with pytest.raises(OutputError, match="not a directory of its own"):
        merge(triple, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / STAGING).read_text() == "mine"


def test_the_same_request_on_a_finished_output_does_nothing(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")}
    assert merge(triple, tmp_path / "out").already_complete
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")} == before


def test_another_request_on_a_finished_output_is_refused_unless_overwriting(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(triple, tmp_path / "out", alpha=0.5)
    assert contents(tmp_path / "out") == before
    assert not merge(triple, tmp_path / "out", alpha=0.5, overwrite=True).already_complete
    assert contents(tmp_path / "out") != before


def test_overwriting_removes_what_the_receipt_lists_and_nothing_else(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    merge(triple, tmp_path / "out", shard_size="1GB", overwrite=True)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
        "paramdelta.json",
        "recipe.yaml",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_paramdelta_did_not_write_is_never_touched(
    triple: Path, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="not written by paramdelta"):
        merge(triple, tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path / "out") == {"model.safetensors": b"precious"}


def test_a_receipt_cannot_make_overwriting_remove_files_elsewhere(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "precious.safetensors").write_bytes(b"precious")
    receipt = json.loads((tmp_path / "out/paramdelta.json").read_text())
    receipt["files"].append({"name": "../precious.safetensors", "bytes": 8})
    (tmp_path / "out/paramdelta.json").write_text(json.dumps(receipt))
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="damaged"):
        merge(triple, tmp_path / "out", alpha=2, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["post", "base/out", "new_base/deeper/out"])
def test_an_output_in_an_input_is_refused(triple: Path, place: str) -> None:
    before = contents(triple)
    with pytest.raises(OutputError, match="lies in an input"):
        merge(triple, triple / place, overwrite=True)
    assert contents(triple) == before


def test_an_output_that_is_a_file_is_refused(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(OutputError, match="not a directory"):
        merge(triple, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"a file"


def test_too_little_disk_is_refused_before_anything_is_written(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "free_space", lambda _: 1000)
    with pytest.raises(OutputError, match="1 kB free"):
        merge(triple, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_output_is_not_taken_for_a_finished_one(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    plan = plan_of(triple)
    assert is_complete(tmp_path / "out", plan)
    (tmp_path / "out" / "model-00002-of-00002.safetensors").unlink()
    assert not is_complete(tmp_path / "out", plan)


def test_a_result_with_new_infinities_is_not_published_unless_allowed(tmp_path: Path) -> None:
    for role, value in (("post", 3e38), ("base", -3e38), ("new_base", 3e38)):
        write_checkpoint(tmp_path / role, {"w": ("F32", (2,), encode([1.0, value], "F32"))})
    with pytest.raises(NonFiniteError, match="w: 1 Inf, 0 NaN") as caught:
        merge(tmp_path, tmp_path / "out")
    assert caught.value.exit_code == 8
    assert kept(tmp_path / "out") == {"model.safetensors"}
    result = merge(tmp_path, tmp_path / "out", allow_nonfinite=True)
    assert result.nonfinite == {"w": {"infinities": 1, "nans": 0}}
    assert (result.resumed_shards, result.bytes_read) == (1, 0)


def test_infinities_that_a_law_copies_are_no_error(tmp_path: Path) -> None:
    for role in ("post", "base", "new_base"):
        write_checkpoint(tmp_path / role, {"w": ("F32", (2,), encode([1.0, float("inf")], "F32"))})
    assert merge(tmp_path, tmp_path / "out").nonfinite == {}


# -- inputs are never written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["model.safetensors", INDEX])
def test_an_output_that_holds_an_input_file_is_refused(triple: Path, tmp_path: Path, entry: str) -> None:
    merge(triple, tmp_path / "out", shard_size="1GB" if entry == "model.safetensors" else None)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="inputs are never written") as caught:
        api.merge(
            tmp_path / "out" / entry, triple / "base", triple / "new_base", tmp_path / "out", alpha=2, overwrite=True
        )
    assert caught.value.exit_code == 5
    assert contents(tmp_path) == before


def test_an_output_that_holds_the_shards_that_an_input_links_to_is_refused(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "out").glob("*.safetensors"):
        (tmp_path / "links" / file.name).symlink_to(file)
    shutil.copy(tmp_path / "out" / INDEX, tmp_path / "links")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="inputs are never written"):
        api.merge(tmp_path / "links", triple / "base", triple / "new_base", tmp_path / "out", alpha=2, overwrite=True)
    assert contents(tmp_path) == before


def test_an_output_that_holds_the_index_that_an_input_links_to_is_refused(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "copy").mkdir()
    for file in (tmp_path / "out").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "copy")
    index = tmp_path / "copy" / INDEX
    index.symlink_to(tmp_path / "out" / INDEX)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="inputs are never written"):
        api.merge(index, triple / "base", triple / "new_base", tmp_path / "out", alpha=2, overwrite=True)
    assert contents(tmp_path) == before


def test_an_output_under_another_name_of_an_input_is_refused(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(triple / "post")
    with pytest.raises(OutputError, match="lies in an input"):
        merge(triple, tmp_path / "alias" / "out")


def test_an_output_beside_its_inputs_or_beside_the_files_they_link_to_is_fine(triple: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in (triple / "post").glob("*.safetensors"):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    merge(triple, triple / "out")
    merge(triple, blobs / "out")
    api.merge(triple / "post" / INDEX, triple / "base", triple / "new_base", triple / "post" / "out")


# -- what an old output survives ---------------------------------------------------------------------------------------


def test_the_old_output_stays_until_the_run_begins(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out", alpha=2)
    before = contents(tmp_path / "out")
    with (
        pytest.raises(BudgetError),
        OutputDirectory(tmp_path / "out", plan_of(triple), overwrite=True),
    ):
        raise BudgetError("too small")
    assert contents(tmp_path / "out") == before


def test_the_space_of_leftovers_and_of_the_old_output_counts_as_free(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free_beside(path: Path) -> int:
        return capacity - sum(len(content) for content in contents(path).values())

    merge(triple, tmp_path / "out")
    old = contents(tmp_path / "out")
    capacity = sum(len(content) for name, content in old.items() if name != RECEIPT) + len(old[RECEIPT])
    monkeypatch.setattr(output_module, "free_space", free_beside)
    _lock(tmp_path / "out").touch()
    (tmp_path / "out" / STAGING / JOURNAL).touch()
    (tmp_path / "out" / STAGING / "model-00001-of-00002.safetensors").write_bytes(bytes(20_000))
    with OutputDirectory(tmp_path / "out", plan_of(triple), overwrite=True) as directory:
        directory.begin()


def test_too_little_disk_leaves_the_old_output(triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(triple, tmp_path / "out", shard_size="1GB", dtype="bf16")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(output_module, "free_space", lambda _: 0)
    with pytest.raises(OutputError, match="free"):
        merge(triple, tmp_path / "out", dtype="f64", overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors/file"])
def test_a_file_that_is_not_in_the_old_receipt_is_never_overwritten(triple: Path, tmp_path: Path, name: str) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_bytes(b"mine")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"model\.safetensors"):
        merge(triple, tmp_path / "out", shard_size="1GB", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_a_file_that_appears_while_the_merge_runs_is_not_overwritten(triple: Path, tmp_path: Path) -> None:
    def intrude(_: object) -> None:
        (tmp_path / "out" / "tokenizer.json").write_bytes(b"mine")

    with pytest.raises(OutputError, match=r"tokenizer\.json"):
        merge(triple, tmp_path / "out", on_progress=intrude)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"mine"
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert kept(tmp_path / "out") == SHARDS


# -- deaths while publishing -------------------------------------------------------------------------------------------


class Death(BaseException):
    """What no handler expects."""


def die_at(monkeypatch: pytest.MonkeyPatch, number: int, *, cleaning_up: bool) -> list[str]:
    """Let the rename of this number end the run, as a kill does unless it is ``cleaning_up``; return the names."""
    seen: list[str] = []
    replace = Path.replace

    def rename(self: Path, target: Path) -> Path:
        if target.name == JOURNAL:
            return replace(self, target)
        if len(seen) == number:
            raise Death
        seen.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", rename)
    if not cleaning_up:
        monkeypatch.setattr(OutputDirectory, "_withdraw", lambda *_: None)
    return seen


@pytest.mark.parametrize(
    ("shard_size", "number"), [*((None, number) for number in range(6)), *(("1GB", number) for number in range(4))]
)
def test_a_later_run_goes_on_from_a_death_while_publishing(
    triple: Path, tmp_path: Path, shard_size: str | None, number: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen = die_at(patch, number, cleaning_up=False)
        patch.setattr(OutputDirectory, "_clean_up", lambda self: self.staging._lock.release(force=True))
        with pytest.raises(Death):
            merge(triple, tmp_path / "out", shard_size=shard_size)
    assert seen[:1] == [RECEIPT][:number]
    assert not (tmp_path / "out" / (INDEX if shard_size is None else "model.safetensors")).exists()
    if number:
        (tmp_path / "out" / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    merge(triple, tmp_path / "fresh", shard_size=shard_size)
    fresh = contents(tmp_path / "fresh") | ({"notes.txt": b"mine"} if number else {})
    again = merge(triple, tmp_path / "out", shard_size=shard_size)
    assert contents(tmp_path / "out") == fresh
    assert (again.resumed_shards, again.bytes_read) == (1 if shard_size else 2, 0)
    with pytest.raises(OutputError, match=r"alphas: \[\[1.0, \[\]\]\] then, \[\[2.0, \[\]\]\] now"):
        merge(triple, tmp_path / "other", alpha=2)
    merge(triple, tmp_path / "other", alpha=2, overwrite=True)
    merge(triple, tmp_path / "fresh", alpha=2, overwrite=True)
    assert contents(tmp_path / "other") == contents(tmp_path / "fresh") | ({"notes.txt": b"mine"} if number else {})


def undo_with(patch: pytest.MonkeyPatch) -> Any:
    """Return `OutputDirectory._withdraw` for a system that renames again."""
    withdraw = OutputDirectory._withdraw

    def undo(self: OutputDirectory, names: list[str]) -> None:
        patch.undo()
        withdraw(self, names)

    return undo


@pytest.mark.parametrize("number", range(6))
def test_whatever_ends_a_publication_undoes_it(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, number, cleaning_up=True)
        patch.setattr(OutputDirectory, "_withdraw", undo_with(patch))
        with pytest.raises(Death):
            merge(triple, tmp_path / "out")
    assert kept(tmp_path / "out") == SHARDS


def test_an_index_that_its_owner_moved_away_does_not_cost_the_shards(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "out" / INDEX).rename(tmp_path / INDEX)
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(triple, tmp_path / "out", alpha=2)
    assert contents(tmp_path / "out") == before


def test_overwriting_that_ended_early_can_be_repeated_beside_files_of_the_user(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    cancelled = threading.Event()
    with pytest.raises(CancelledError):
        merge(
            triple,
            tmp_path / "out",
            alpha=2,
            overwrite=True,
            workers=1,
            on_progress=lambda _: cancelled.set(),
            cancelled=cancelled,
        )
    assert {RECEIPT, "notes.txt"} <= contents(tmp_path / "out").keys()
    assert not {INDEX, *SHARDS} & contents(tmp_path / "out").keys()
    merge(triple, tmp_path / "out", overwrite=True)
    merge(triple, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") | {"notes.txt": b"mine"}


def test_an_input_that_changes_after_its_last_window_is_an_error(triple: Path, tmp_path: Path) -> None:
    def touch(progress: Progress) -> None:
        if progress.done == progress.total:
            os.utime(next((triple / "post").glob("*.safetensors")), ns=(0, 0))

    with pytest.raises(InputChangedError, match="mtime_ns"):
        merge(triple, tmp_path / "out", on_progress=touch)
    assert kept(tmp_path / "out") <= SHARDS
    with pytest.raises(OutputError, match=r"post: model-0000.-of-00002.safetensors has changed"):
        merge(triple, tmp_path / "out")


def test_a_finished_output_is_no_dead_publication(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        merge(triple, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_shard_that_loads_by_itself_is_renamed_last_before_the_index(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_base = triple / "new_base"
    index = (new_base / INDEX).read_text().replace("model-00001-of-00002.safetensors", "model.safetensors")
    (new_base / INDEX).write_text(index.replace("model-00002-of-00002", "zeta"))
    (new_base / "model-00001-of-00002.safetensors").rename(new_base / "model.safetensors")
    (new_base / "model-00002-of-00002.safetensors").rename(new_base / "zeta.safetensors")
    seen = die_at(monkeypatch, 99, cleaning_up=True)
    merge(triple, tmp_path / "out")
    assert seen[-3:] == ["zeta.safetensors", "model.safetensors", INDEX]


# -- two runs ----------------------------------------------------------------------------------------------------------


def test_what_another_run_published_before_the_lock_was_had_is_seen(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_late(self: Staging, *, created: bool, patience: float = 0) -> None:
        monkeypatch.undo()
        merge(triple, tmp_path / "out", alpha=2)
        self.path.mkdir(exist_ok=True)
        acquire(self, created=created, patience=patience)

    plan, acquire = plan_of(triple), Staging.acquire
    monkeypatch.setattr(Staging, "acquire", be_late)
    with (
        pytest.raises(OutputError, match="another merge"),
        OutputDirectory(tmp_path / "out", plan, overwrite=False),
    ):
        pass
    assert not (tmp_path / "out" / STAGING).exists()
    assert (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize("refusal", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_a_filesystem_without_locks_is_an_output_error(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    def refuse(self: filelock.FileLock, timeout: float) -> None:  # noqa: ARG001
        Path(self.lock_file).touch()
        raise refusal

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OutputError, match="no locks"):
        merge(triple, tmp_path / "a/out")
    assert not (tmp_path / "a").exists()


# -- sidecars ----------------------------------------------------------------------------------------------------------


def test_a_sidecar_that_changes_before_or_while_the_merge_runs_is_an_error(triple: Path, tmp_path: Path) -> None:
    plan = plan_of(triple)
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        directory.begin()
        assert (tmp_path / "out" / STAGING / "config.json").read_bytes() == (
            triple / "new_base/config.json"
        ).read_bytes()
        (triple / "new_base/config.json").write_text("{}")
        with pytest.raises(InputChangedError, match="config"):
            directory.publish({}, dict.fromkeys(output_module.DOCUMENTS, b""))
    with (
        pytest.raises(InputChangedError, match="config"),
        OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory,
    ):
        directory.begin()
    assert not (tmp_path / "out").exists()


def test_a_sidecar_larger_than_a_chunk_is_copied_whole(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "_CHUNK", 7)
    merge(triple, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (triple / "post/tokenizer.json").read_bytes()


def test_a_sidecar_that_cannot_be_read_is_an_error_of_the_input(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    plan = plan_of(triple)
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        monkeypatch.setattr(os, "read", fail)
        with pytest.raises(CheckpointError, match="Input/output error") as caught:
            directory.begin()
        monkeypatch.undo()
    assert caught.value.file == str(triple / "new_base/config.json")


def test_a_sidecar_that_is_another_file_when_it_is_opened_is_an_error(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(triple)
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        monkeypatch.setattr(output_module, "check_identity", lambda _: None)
        (triple / "new_base/config.json").write_text("{}")
        assert FileIdentity.of((triple / "new_base/config.json").stat()) != plan.sidecars[0].identity
        with pytest.raises(InputChangedError, match="config"):
            directory.begin()


def test_small_files_are_written_from_writable_memory(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(descriptor: int, view: memoryview, offset: int) -> None:
        assert not view.readonly
        write_all(descriptor, view, offset)

    write_all = platform.write_all
    monkeypatch.setattr(platform, "write_all", write)
    merge(triple, tmp_path / "out")


# -- what the system refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte", "loop/out"])
def test_a_path_that_the_system_refuses_is_an_output_error(triple: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError) as caught:
        merge(triple, tmp_path / name)
    assert caught.value.exit_code == 5


def test_a_directory_that_may_not_be_read_is_an_output_error(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    plan = plan_of(triple)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with (
        pytest.raises(OutputError, match="Permission denied"),
        OutputDirectory(tmp_path / "out", plan, overwrite=False),
    ):
        pass


def test_directories_made_before_a_failure_are_removed(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        if path.name == "b":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(platform, "sync_directory", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        merge(triple, tmp_path / "a/b/out")
    assert not (tmp_path / "a").exists()


def test_a_signal_while_entering_leaves_nothing(triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_: Path) -> None:
        raise Death

    monkeypatch.setattr(platform, "sync_directory", die)
    with pytest.raises(Death):
        merge(triple, tmp_path / "a/out")
    assert not (tmp_path / "a").exists()


def test_a_failed_sync_of_a_finished_shard_is_an_output_error(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    plan = plan_of(triple)
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        monkeypatch.setattr(platform, "sync_directory", fail)
        with pytest.raises(OutputError, match="Input/output error"):
            directory.completed(FinishedShard(0, Digest("", ()), {}, (), {}))


def test_free_space_is_that_of_the_nearest_directory_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_space(tmp_path / "not/there") > 0

    def fail(_: Path) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    with pytest.raises(OutputError, match="no disk"):
        free_space(tmp_path / "not/there")


def test_a_quota_counts_like_a_small_disk(triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "quota_left", lambda _: 100)
    assert free_space(tmp_path) == 100
    with pytest.raises(OutputError, match="your quota, has 100 B free"):
        merge(triple, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- receipts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"fingerprint": "f"}',
        '{"fingerprint": 1, "files": []}',
        '{"fingerprint": "f", "files": {}}',
        '{"fingerprint": "f", "files": [1]}',
        '{"fingerprint": "f", "files": [{"name": "a"}]}',
        '{"fingerprint": "f", "files": [{"name": 1, "bytes": 1}]}',
        '{"fingerprint": "f", "files": [{"name": "a", "bytes": "1"}]}',
        '{"fingerprint": "f", "files": [{"name": "a", "bytes": true}]}',
        '{"fingerprint": "f", "files": [{"name": "a", "bytes": -1}]}',
        '{"fingerprint": "f", "files": [{"name": "a\\ud800", "bytes": 1}]}',
        *(
            f'{{"fingerprint": "f", "files": [{{"name": {json.dumps(name)}, "bytes": 1}}]}}'
            for name in (
                "",
                ".",
                "..",
                "/etc/passwd",
                "../a",
                "a/b",
                "a\\b",
                "C:a",
                "a\0",
                ".paramdelta",
                ".Paramdelta",
            )
        ),
        "[" * 200_000,
        "9" * 10_000,
        '"\xff"',
    ],
    ids=range(26),
)
def test_a_receipt_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / RECEIPT).write_text(text, encoding="latin-1")
    assert read_receipt(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_receipt_that_is_no_file_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECEIPT)
    assert read_receipt(tmp_path) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("change", ["removed", "longer"])
def test_an_output_is_complete_only_with_every_file_at_its_size(
    triple: Path, tmp_path: Path, name: str, change: str
) -> None:
    merge(triple, tmp_path / "out")
    file = tmp_path / "out" / name
    if change == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b" ")
    assert not is_complete(tmp_path / "out", plan_of(triple))


def test_a_receipt_that_lists_nothing_makes_nothing_complete(triple: Path, tmp_path: Path) -> None:
    plan = plan_of(triple)
    (tmp_path / RECEIPT).write_text(json.dumps({"fingerprint": plan.fingerprint, "files": []}))
    assert not is_complete(tmp_path, plan)


def test_a_staging_directory_that_is_a_link_is_refused(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STAGING).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="not a directory of its own"):
        merge(triple, tmp_path / "out")
    assert (tmp_path / "precious/file").read_bytes() == b"mine"


def test_a_receipt_has_the_digest_of_every_file(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / RECEIPT).read_text())
    assert {entry["name"] for entry in receipt["files"]} == {file.name for file in (tmp_path / "out").iterdir()} - {
        RECEIPT
    }
    for entry in receipt["files"]:
        raw = (tmp_path / "out" / entry["name"]).read_bytes()
        assert entry["bytes"] == len(raw)
        if entry["name"].endswith(".safetensors"):
            digester = Digester(len(raw))
            digester.add(0, memoryview(raw))
            assert (entry["xxh3"], entry["regions"]) == (digester.result().whole, "".join(digester.result().regions))
        else:
            assert entry["sha256"] == hashlib.sha256(raw).hexdigest()


def test_files_that_the_filesystem_cannot_hold_are_seen_coming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("post", "base", "new_base"):
        sparse_checkpoint(tmp_path / role, {"small": (10,), "large": (1 << 16, (1 << 15) + 1)}, shards=2)
    merge(make_triple(tmp_path / "in"), tmp_path / "out")
    before = contents(tmp_path / "out")
    ftruncate = os.ftruncate

    def fat(descriptor: int, size: int) -> None:
        if size >= 1 << 32:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        ftruncate(descriptor, size)

    monkeypatch.setattr(os, "ftruncate", fat)
    with pytest.raises(OutputError, match=r"model-00002-of-00002\.safetensors: cannot be written.*\n.*--shard-size"):
        merge(tmp_path, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
