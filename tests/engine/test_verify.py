"""What verification finds: every flipped bit, every other change, and what the inputs do not give."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paramdelta
from paramdelta.cli.app import commands
from paramdelta.engine.digests import REGION, Digest
from paramdelta.engine.failure import Failure
from paramdelta.engine.receipt import RECEIPT, sealed
from paramdelta.engine.recompute import sample
from paramdelta.errors import CancelledError, CheckpointError, MismatchError, RecipeError
from paramdelta.planning.plan import make_plan
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Recipe
from tests.block_scaled import CONFIG, tensors_of
from tests.make import normal, skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INDEX = "model.safetensors.index.json"
ROLES = ("post", "base", "new_base")


def make(root: Path) -> Path:
    """Write a triple whose output has regions of more than one tensor, and a tensor of more than one region."""
    for seed, role in enumerate(ROLES):
        shapes = {"small": (30, 40), "large": (2500, 1000), "after": (100, 10), "last": (700, 20)}
        tensors = {name: normal(shape, seed=seed) for name, shape in shapes.items()}
        write_checkpoint(root / role, tensors, shards=[["small", "large"], ["after", "last"]], config={"from": role})
    (root / "post" / "tokenizer.json").write_text("{}")
    return root


def merge(root: Path, output: Path, **options: Any) -> Path:
    post, base, new_base = (root / role for role in ROLES)
    paramdelta.merge(post, base, new_base, output, **options)
    return output


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("triple"))


@pytest.fixture(scope="module")
def finished(triple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(triple, tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy beside which inputs are found by absolute paths."""
    return shutil.copytree(finished, tmp_path / "out")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("io", ["auto", "mmap", "pread", "direct"])
@pytest.mark.parametrize("workers", [1, 4])
def test_what_was_written_is_as_it_was_written(finished: Path, io: str, workers: int) -> None:
    skip_without_direct_io(io, finished.parent)
    seen: list[paramdelta.Progress] = []
    result = paramdelta.verify(finished, io=io, workers=workers, on_progress=seen.append)
    assert (result.ok, result.failures, result.shards) == (True, (), 2)
    assert result.bytes_read == sum(f.stat().st_size for f in finished.iterdir() if f.name != RECEIPT)
    assert (seen[-1].done, seen[-1].shards_done) == (seen[-1].total, 2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_flipped_bit_anywhere_is_found_and_named(output: Path, data: st.DataObject) -> None:
    path = output / data.draw(st.sampled_from(sorted(file.name for file in output.iterdir() if file.name != RECEIPT)))
    raw = bytearray(path.read_bytes())
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[place] ^= 1 << bit
    good = path.read_bytes()
    path.write_bytes(raw)
    try:
        result = paramdelta.verify(output)
    finally:
        path.write_bytes(good)
    assert not result.ok
    named = [failure for failure in result.failures if failure.file == path.name]
    assert named
    if path.name in SHARDS:
        places = [failure.offset for failure in named if failure.offset is not None]
        assert places == [place // REGION * REGION]


def test_a_flipped_bit_is_named_with_its_tensor(output: Path) -> None:
    path = output / SHARDS[0]
    raw = bytearray(path.read_bytes())
    raw[4096 + 2 * 30 * 40 + REGION] ^= 1
    path.write_bytes(raw)
    (failure,) = paramdelta.verify(output).failures
    size = 4096 + 2 * (30 * 40 + 2500 * 1000) - REGION
    assert failure[::2] == (SHARDS[0], ("large",), size)
    assert failure.offset == REGION
    where = f"{SHARDS[0]}, byte 4,194,304 to {REGION + size - 1:,} ('large')"
    assert str(failure) == f"{where}: somewhere here something is not as it was written"
    raw[4096] ^= 1
    path.write_bytes(raw)
    assert [(f.tensors, f.offset) for f in paramdelta.verify(output).failures] == [
        (("small", "large"), 0),
        (("large",), REGION),
    ]


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def link_away(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [*SHARDS, INDEX, "config.json", "tokenizer.json", "recipe.yaml", "README.md"])
@pytest.mark.parametrize("change", [grow, link_away, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_every_file_is_looked_at(output: Path, name: str, change: Any) -> None:
    change(output / name)
    result = paramdelta.verify(output)
    assert not result.ok
    assert name in {failure.file for failure in result.failures}


def test_an_index_that_says_something_else_is_found_by_digest_and_by_content(output: Path) -> None:
    index = json.loads((output / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (output / INDEX).write_text(json.dumps(index))
    messages = [failure.message for failure in paramdelta.verify(output).failures if failure.file == INDEX]
    assert any("bytes of tensors, and there are" in message for message in messages)


def change_receipt(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Forge a receipt, its seal with it."""
    receipt = json.loads((output / RECEIPT).read_text())
    change(receipt)
    (output / RECEIPT).write_bytes(b"".join(sealed(receipt)))


def entry_of(receipt: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for entry in receipt["files"] if entry["name"] == name)
    return entry


def write_listed(output: Path, name: str, raw: bytes) -> None:
    """Write a small file anew, and the receipt with it."""
    (output / name).write_bytes(raw)
    digest = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    change_receipt(output, lambda receipt: entry_of(receipt, name).update(digest))


def test_a_receipt_whose_digests_contradict_each_other_is_a_failure(output: Path) -> None:
    change_receipt(output, lambda receipt: entry_of(receipt, SHARDS[0]).update(xxh3="0" * 32))
    (failure,) = paramdelta.verify(output).failures
    assert failure.file == RECEIPT


@pytest.mark.parametrize("metadata", [None, [], {}, 5, {"total_size": "\x1b[2J"}, {"total_size": [5]}])
def test_an_index_that_says_nothing_sensible_of_its_size_is_a_failure(output: Path, metadata: Any) -> None:
    index = json.loads((output / INDEX).read_text()) | {"metadata": metadata}
    write_listed(output, INDEX, json.dumps(index).encode())
    (failure,) = paramdelta.verify(output).failures
    assert failure.file == INDEX
    assert failure.message.isprintable()


def test_what_the_safetensors_library_says_is_escaped(output: Path) -> None:
    raw = (output / SHARDS[0]).read_bytes()
    header = raw[8:4096].rstrip().replace(b'"BF16"', b'"\\u001b[2J' + b"x" * 900 + b'"', 1)
    (output / SHARDS[0]).write_bytes(raw[:8] + header.ljust(4088) + raw[4096:])
    failures = paramdelta.verify(output).failures
    assert all(failure.message.isprintable() for failure in failures)
    (refused,) = [failure for failure in failures if "the safetensors library refuses it" in failure.message]
    assert refused.file == SHARDS[0]
    assert len(refused.message) < 500


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", [SHARDS[1], INDEX, "config.json", "recipe.yaml", "README.md"])
@pytest.mark.parametrize("kind", ["fifo", "empty fifo", "device", "loop"])
def test_what_is_no_file_is_named_and_not_waited_for(output: Path, name: str, kind: str) -> None:
    (output / name).unlink()
    match kind:
        case "device":
            (output / name).symlink_to("/dev/zero")
        case "loop":
            (output / name).symlink_to(output / name)
        case _:
            os.mkfifo(output / name)
    if kind == "empty fifo":
        nothing = hashlib.sha256(b"").hexdigest()
        digests = {"xxh3": Digest.of([]).whole, "regions": ""} if name in SHARDS else {"sha256": nothing}
        change_receipt(output, lambda receipt: entry_of(receipt, name).update(bytes=0, **digests))
    for recompute in (False, True):
        result = paramdelta.verify(output, recompute=recompute)
        assert not result.ok
        assert name in {failure.file for failure in result.failures}


@contextmanager
def rights_of_others() -> Iterator[None]:
    """Be nobody, where this is root: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that others may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system knows no other users' rights")
@pytest.mark.parametrize(("mode", "code"), [(0o000, 3), (0o444, 3), (0o111, 7)])
def test_an_output_that_may_not_be_entered_or_listed_is_told_so(
    finished: Path, open_place: Path, mode: int, code: int
) -> None:
    output = shutil.copytree(finished, open_place / "deeper" / "out")
    for directory in (output, output.parent):
        directory.chmod(mode)
        with rights_of_others():
            run = CliRunner().invoke(commands, ["verify", str(output), "--quiet"])
        directory.chmod(0o755)
        wanted = 0 if (directory, mode) == (output.parent, 0o111) else code
        assert run.exit_code == wanted, run.output
        assert ("Permission denied" in run.output) == (wanted != 0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system knows no other users' rights")
@pytest.mark.parametrize("name", [SHARDS[0], INDEX, "README.md"])
def test_a_file_that_may_not_be_read_is_a_failure(finished: Path, open_place: Path, name: str) -> None:
    output = shutil.copytree(finished, open_place / "out")
    (output / name).chmod(0o000)
    with rights_of_others():
        result = paramdelta.verify(output, recompute=True)
    assert Failure(name, "cannot be read: Permission denied") in result.failures


# -- what the receipt does not list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [INDEX, SHARDS[1]])
def test_what_is_loaded_must_be_listed(output: Path, name: str) -> None:
    change_receipt(output, lambda receipt: receipt["files"].remove(entry_of(receipt, name)))
    result = paramdelta.verify(output)
    assert [failure.file for failure in result.failures] == [name]
    assert "does not list it" in result.failures[0].message
    assert result.strangers == (name,)


def test_a_shard_that_is_listed_must_be_loaded(output: Path) -> None:
    index = json.loads((output / INDEX).read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard == SHARDS[0]}
    index["metadata"]["total_size"] = 2 * (30 * 40 + 2500 * 1000)
    write_listed(output, INDEX, json.dumps(index).encode())
    (failure,) = paramdelta.verify(output).failures
    assert (failure.file, failure.message) == (SHARDS[1], f"is listed by {RECEIPT}, and none of its tensors is loaded")


def test_files_that_the_merge_did_not_write_are_named_and_no_failure(output: Path) -> None:
    assert paramdelta.verify(output).strangers == ()
    names = ("adapter_config.json", "extra\x1b[2J.safetensors", "vocab.json")
    for name in (*names, ".hidden"):
        (output / name).write_bytes(b"anything")
    (output / ".paramdelta").mkdir()
    (output / "original").mkdir()
    result = paramdelta.verify(output)
    assert (result.ok, result.strangers) == (True, names)
    run = CliRunner().invoke(commands, ["verify", str(output), "--quiet"])
    line = "3 files that this merge did not write: adapter_config.json, 'extra\\x1b[2J.safetensors', vocab.json"
    assert (run.exit_code, run.stdout.splitlines()[-1]) == (0, line)
    (output / "README.md").unlink()
    run = CliRunner().invoke(commands, ["verify", str(output), "--quiet"])
    assert (run.exit_code, run.stdout.splitlines()[-1]) == (7, line)
    run = CliRunner().invoke(commands, ["verify", str(output), "--quiet", "--json"])
    assert json.loads(run.stdout)["strangers"] == list(names)


def test_a_model_that_loaders_may_prefer_is_a_failure(output: Path) -> None:
    shutil.copy(output / SHARDS[0], output / "model.safetensors")
    result = paramdelta.verify(output)
    assert [failure.file for failure in result.failures] == [INDEX]
    assert result.strangers == ("model.safetensors",)


def test_it_can_be_stopped(finished: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError):
        paramdelta.verify(finished, cancelled=cancelled)


# -- the arithmetic again ----------------------------------------------------------------------------------------------


def test_the_arithmetic_of_what_was_written_is_what_the_inputs_give(finished: Path) -> None:
    result = paramdelta.verify(finished, recompute=True, io="pread")
    assert (result.ok, result.recomputed) == (True, 4)
    assert paramdelta.verify(finished, sample=0.5).recomputed == 2
    assert paramdelta.verify(finished, sample=1e-9).recomputed == 1


def forge(output: Path, name: str, place: int) -> None:
    """Change a byte, and the receipt with it."""
    from paramdelta.engine.digests import Digester

    raw = bytearray((output / name).read_bytes())
    raw[place] ^= 1
    (output / name).write_bytes(raw)
    digester = Digester(len(raw))
    digester.add(0, memoryview(raw))
    digests = {"xxh3": digester.result().whole, "regions": "".join(digester.result().regions)}
    change_receipt(output, lambda receipt: entry_of(receipt, name).update(digests))


@pytest.fixture
def merged(triple: Path, tmp_path: Path) -> Path:
    return merge(triple, tmp_path / "out")


@pytest.mark.parametrize(
    ("shard", "place", "tensor"),
    [
        (0, 4096, "small"),
        (0, 4096 + 2 * 30 * 40 - 1, "small"),
        (0, 4096 + 2 * 30 * 40, "large"),
        (1, 4096 + 2 * 100 * 10 + 2 * 700 * 20 - 1, "last"),
    ],
)
def test_what_the_inputs_do_not_give_is_named_to_the_byte(merged: Path, shard: int, place: int, tensor: str) -> None:
    forge(merged, SHARDS[shard], place)
    assert paramdelta.verify(merged).ok
    for options in ({"recompute": True}, {"sample": 1.0}):
        result = paramdelta.verify(merged, **options)
        assert [f[:1] + f[2:] for f in result.failures] == [(SHARDS[shard], (tensor,), place, 1)]
        assert result.failures[0].message == "is not what the inputs give"


def test_a_damaged_output_is_computed_again_to_name_the_byte(merged: Path) -> None:
    path = merged / SHARDS[0]
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    result = paramdelta.verify(merged, recompute=True)
    assert [(f.offset, f.size) for f in result.failures] == [(0, REGION), (5000, 1)]
    assert result.recomputed == 4
    path.unlink()
    messages = [failure.message for failure in paramdelta.verify(merged, recompute=True).failures]
    assert any(message.startswith("not computed again") for message in messages)


def test_what_is_unfinished_or_not_there_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        paramdelta.verify(tmp_path / "nothing")
    (tmp_path / "out" / ".paramdelta").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds an unfinished merge"):
        paramdelta.verify(tmp_path / "out")


def test_what_keeps_a_damaged_output_from_being_computed_again_is_one_failure_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = merge(make(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in" / "post").rename(tmp_path / "in" / "away")
    with pytest.raises(CheckpointError):
        paramdelta.verify(output, recompute=True)
    grow(output / "README.md")
    grown, inputs_gone = paramdelta.verify(output, recompute=True).failures
    assert (grown.file, inputs_gone.file[-8:]) == ("README.md", "/in/post")
    assert inputs_gone.message.startswith("not computed again: ")
    (output / "recipe.yaml").write_text("new_base: [")
    run = CliRunner().invoke(commands, ["verify", str(output), "--recompute", "--quiet", "--json"])
    result = json.loads(run.stdout)
    assert (run.exit_code, result["recomputed"]) == (7, 0)
    assert [each["file"] for each in result["failures"]] == ["recipe.yaml", "README.md", "recipe.yaml"]
    assert "not computed again: line 1: not YAML" in result["failures"][-1]["message"]

    def cancelled(*_: Any) -> None:
        raise CancelledError("stopped on request")

    monkeypatch.setattr("paramdelta.planning.recipe_file.read_recipes", cancelled)
    with pytest.raises(CancelledError):
        paramdelta.verify(output, recompute=True)


@pytest.mark.parametrize("fp8", ["dequantise", "requantise"])
def test_block_scaled_outputs_are_computed_again_too(tmp_path: Path, fp8: Any) -> None:
    for seed, role in enumerate(ROLES):
        rng = np.random.default_rng(seed)
        matrices = {name: rng.normal(0, 0.02, (150 + 70 * number, 300)) for number, name in enumerate("abc")}
        write_checkpoint(tmp_path / role, tensors_of(matrices, seed=seed), shards=2, config=CONFIG)
    output = merge(tmp_path, tmp_path / "out", policies=Policies(fp8=fp8))
    assert paramdelta.verify(output, recompute=True).ok
    for _ in range(5):
        assert paramdelta.verify(output, sample=0.4).ok


def test_inputs_of_another_layout_cannot_give_the_output(merged: Path, tmp_path: Path) -> None:
    root = make(tmp_path / "in")
    merge(root, tmp_path / "other")
    for role in ROLES:
        shutil.rmtree(root / role)
        write_checkpoint(root / role, {"other": normal((3, 3))}, shards=1, config={"from": role})
    with pytest.raises(MismatchError, match="laid out in another way"):
        paramdelta.verify(tmp_path / "other", recompute=True)
    assert paramdelta.verify(merged, recompute=True).ok


def test_a_sample_has_each_tensor_with_its_scales(tmp_path: Path) -> None:
    for seed, role in enumerate(ROLES):
        rng = np.random.default_rng(seed)
        matrices = {name: rng.normal(0, 0.02, (150, 200)) for name in "abcdef"}
        write_checkpoint(tmp_path / role, tensors_of(matrices, seed=seed), shards=3, config=CONFIG)
    post, base, new_base = (tmp_path / role for role in ROLES)
    plan = make_plan(Recipe.of(post, base, new_base, policies=Policies(fp8="requantise")))
    for seed in range(20):
        work = sample(plan, 0.3, seed)
        names = [[plan.operations[place].name for place in shard.operations] for shard in work.plan.shards]
        assert len(names) == 4
        for group in names:
            assert len(group) == (2 if group[0].endswith("weight") else 1)
            assert group[1:] in ([], [f"{group[0]}_scale_inv"])


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_a_sample_is_a_share(finished: Path, share: float) -> None:
    with pytest.raises(RecipeError, match="sample: must be more than 0"):
        paramdelta.verify(finished, sample=share)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_wrong_and_exits_7(output: Path) -> None:
    good = CliRunner().invoke(commands, ["verify", str(output)])
    assert (good.exit_code, good.stdout.count("all as it was written: 2 files of tensors")) == (0, 1)
    grow(output / "README.md")
    bad = CliRunner().invoke(commands, ["verify", str(output), "--quiet"])
    assert bad.exit_code == 7
    assert bad.stdout.splitlines()[0] == f"{output}: 1 failure"
    assert "--overwrite" in bad.stdout
    found = CliRunner().invoke(commands, ["verify", str(output), "--json", "--quiet"])
    result = json.loads(found.stdout)
    assert (found.exit_code, result["ok"], result["shards"]) == (7, False, 2)
    assert result["failures"][0]["file"] == "README.md"
    nothing = CliRunner().invoke(commands, ["verify", str(output.parent), "--json"])
    assert (nothing.exit_code, json.loads(nothing.stdout)["error"]["code"]) == (3, 3)
