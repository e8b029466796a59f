from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import filelock
import pytest

from paramdelta import api
from paramdelta.engine import output as output_module
from paramdelta.engine.output import STAGING, OutputDirectory, is_complete, read_receipt
from paramdelta.errors import NonFiniteError, OutputError
from paramdelta.planning.plan import make_plan
from paramdelta.planning.recipe import Recipe
from paramdelta.storage import platform
from tests.make import encode, normal, write_checkpoint

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


def merge(triple: Path, output: Path, **options: Any) -> api.MergeResult:
    return api.merge(triple / "post", triple / "base", triple / "new_base", output, **options)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_a_finished_output_has_weights_index_sidecars_and_receipt_and_no_staging(triple: Path, tmp_path: Path) -> None:
    merge(triple, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
        "paramdelta.json",
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


def test_a_failure_while_publishing_leaves_nothing(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on_index(self: Path, target: Path) -> Path:
        if target.name == INDEX:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", fail_on_index)
    with pytest.raises(OutputError):
        merge(triple, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_parents_are_created_and_removed_again_after_a_failure(triple: Path, tmp_path: Path) -> None:
    plan = make_plan(Recipe.of(triple / "post", triple / "base", triple / "new_base"))
    with (
        pytest.raises(RuntimeError),
        OutputDirectory(tmp_path / "a/b/out", plan, overwrite=False),
    ):
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_an_empty_directory_is_fine_and_stays_after_a_failure(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError), filelock.FileLock(_lock(tmp_path / "out")):
        merge(triple, tmp_path / "out")
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
    (tmp_path / "out" / STAGING / "model-00001-of-00002.safetensors").write_bytes(b"half")
    merge(triple, tmp_path / "out")
    assert not (tmp_path / "out" / STAGING).exists()


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
        "config.json",
        "model.safetensors",
        "notes.txt",
        "paramdelta.json",
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
    merge(triple, tmp_path / "out", alpha=2, overwrite=True)
    assert (tmp_path / "precious.safetensors").read_bytes() == b"precious"


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
    plan = make_plan(Recipe.of(triple / "post", triple / "base", triple / "new_base"))
    assert is_complete(tmp_path / "out", plan)
    (tmp_path / "out" / "model-00002-of-00002.safetensors").unlink()
    assert not is_complete(tmp_path / "out", plan)


def test_a_result_with_new_infinities_is_not_published_unless_allowed(tmp_path: Path) -> None:
    for role, value in (("post", 3e38), ("base", -3e38), ("new_base", 3e38)):
        write_checkpoint(tmp_path / role, {"w": ("F32", (2,), encode([1.0, value], "F32"))})
    with pytest.raises(NonFiniteError, match="w: 1 Inf, 0 NaN") as caught:
        merge(tmp_path, tmp_path / "out")
    assert caught.value.exit_code == 8
    assert not (tmp_path / "out").exists()
    result = merge(tmp_path, tmp_path / "out", allow_nonfinite=True)
    assert result.nonfinite == {"w": {"infinities": 1, "nans": 0}}


def test_infinities_that_a_law_copies_are_no_error(tmp_path: Path) -> None:
    for role in ("post", "base", "new_base"):
        write_checkpoint(tmp_path / role, {"w": ("F32", (2,), encode([1.0, float("inf")], "F32"))})
    assert merge(tmp_path, tmp_path / "out").nonfinite == {}
