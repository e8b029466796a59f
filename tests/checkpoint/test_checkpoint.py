from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paramdelta.checkpoint.checkpoint import TensorRef, open_checkpoint
from paramdelta.checkpoint.header import TensorEntry, build_header
from paramdelta.errors import CheckpointError, HeaderError, UnsupportedCheckpointError
from paramdelta.storage.identity import FileIdentity
from tests.make import (
    at_odd_offsets,
    file_bytes,
    llama_shapes,
    normal,
    sparse_checkpoint,
    write_checkpoint,
    write_index,
)

TENSORS = {"a": normal((2, 3)), "b": ("F32", (), bytes(4)), "c": normal((4,), "F16"), "d": ("I64", (0,), b"")}
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "single", TENSORS, config={"model_type": "llama"})


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", TENSORS, shards=[["c", "a"], ["d", "b"]], config={})


def refused(path: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.file is not None
    return caught.value


def rewrite_index(root: Path, **changes: Any) -> None:
    tree = json.loads((root / INDEX).read_text())
    (root / INDEX).write_text(json.dumps(tree | changes))


# -- what is opened ------------------------------------------------------------------------------------------


def test_a_single_file(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    (shard,) = checkpoint.shards
    raw = (single / "model.safetensors").read_bytes()
    assert (checkpoint.path, checkpoint.root, checkpoint.index) == (single, single, None)
    assert (shard.name, shard.path) == ("model.safetensors", single / "model.safetensors")
    assert shard.metadata == {"format": "pt"}
    assert shard.header_digest == hashlib.sha256(raw[: shard.data_offset]).hexdigest()
    assert shard.identity == FileIdentity.of((single / "model.safetensors").stat())
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.config_digest == hashlib.sha256((single / "config.json").read_bytes()).hexdigest()


def test_shards_by_name_and_tensors_by_offset(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    assert [shard.name for shard in checkpoint.shards] == [ONE, TWO]
    assert list(checkpoint.tensors) == ["c", "a", "d", "b"]
    assert [ref.shard for ref in checkpoint.tensors.values()] == [0, 0, 1, 1]
    assert checkpoint.index == INDEX
    assert checkpoint.index_digest == hashlib.sha256((sharded / INDEX).read_bytes()).hexdigest()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_tensor_is_where_its_reference_says(tmp_path: Path, shards: int) -> None:
    tensors = at_odd_offsets(TENSORS)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", tensors, shards=shards, align=1))
    for name, (dtype, shape, data) in tensors.items():
        ref = checkpoint.tensors[name]
        raw = Path(checkpoint.shards[ref.shard].path).read_bytes()
        assert (ref.dtype, ref.shape) == (dtype, tuple(shape))
        assert raw[ref.offset : ref.offset + ref.nbytes] == data


def test_an_index_opens_what_its_directory_does(sharded: Path) -> None:
    by_index = open_checkpoint(sharded / INDEX)
    assert by_index.tensors == open_checkpoint(sharded).tensors
    assert by_index.root == sharded
    assert by_index.config == {}


def test_a_file_owns_the_config_beside_it_if_it_is_the_model(single: Path, sharded: Path) -> None:
    assert open_checkpoint(single / "model.safetensors").config == {"model_type": "llama"}
    shard = open_checkpoint(sharded / ONE)
    assert (shard.config, shard.index, list(shard.tensors)) == (None, None, ["c", "a"])


def test_without_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert open_checkpoint(single).config is None


def test_one_file_of_any_name(single: Path) -> None:
    (single / "model.safetensors").rename(single / "consolidated.safetensors")
    assert open_checkpoint(single).shards[0].name == "consolidated.safetensors"


def test_consolidated_copies_folders_and_hidden_files_are_ignored(single: Path, sharded: Path) -> None:
    for root in (single, sharded):
        for name in ("consolidated.safetensors", "original/model.safetensors", "._model.safetensors"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"junk")
        assert open_checkpoint(root).tensors.keys() == TENSORS.keys()
    write_index(single, {"consolidated.safetensors": ["a"]}, name="consolidated.safetensors.index.json")
    assert open_checkpoint(single).index is None


def test_a_model_with_an_adapter_beside_it_is_a_model(single: Path) -> None:
    (single / "adapter_model.safetensors").write_bytes(b"junk")
    assert open_checkpoint(single).tensors.keys() == TENSORS.keys()


def test_the_index_that_loaders_read_wins(sharded: Path) -> None:
    write_index(sharded, {"x.safetensors": ["x"]}, name="consolidated.safetensors.index.json")
    write_index(sharded, {"x.safetensors": ["x"]}, name="model.fp16.safetensors.index.json")
    assert open_checkpoint(sharded).index == INDEX


def test_an_index_may_name_model_safetensors(single: Path) -> None:
    write_index(single, {"model.safetensors": list(TENSORS)})
    assert open_checkpoint(single).index == INDEX


def test_symlinks_into_a_cache_of_blobs(sharded: Path, tmp_path: Path) -> None:
    """As the Hub's cache has it: blobs named by their hashes, relative links with the files' names."""
    cache = tmp_path / "models--o--n"
    snapshot, blobs = cache / "snapshots" / "0", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in sharded.iterdir():
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    linked, plain = open_checkpoint(snapshot), open_checkpoint(sharded)
    assert linked.tensors == plain.tensors
    assert [shard.name for shard in linked.shards] == [shard.name for shard in plain.shards]
    assert "snapshots/<revision>" in str(refused(cache))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes another user's name, as root can")
@pytest.mark.parametrize("named", ["", "model.safetensors.index.json"])
def test_files_that_links_lead_to_and_that_others_may_not_read_are_named(
    sharded: Path, tmp_path: Path, named: str
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    shard = next(sharded.glob("*.safetensors"))
    shard.rename(private / "blob")
    shard.symlink_to(private / "blob")
    for directory in (tmp_path, *tmp_path.parents[:2], sharded):
        directory.chmod(0o755)
    private.chmod(0o700)
    os.seteuid(65534)
    try:
        error = refused(sharded / named)
    finally:
        os.seteuid(0)
    assert "Permission denied" in error.message
    assert error.remedy


def test_an_index_of_consolidated_files_does_not_speak_for_others(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": normal((2,)), "b": normal((2,))}, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    write_index(tmp_path, {"consolidated.safetensors": ["a"]}, name="consolidated.safetensors.index.json")
    assert "no index" in refused(tmp_path).message


@pytest.mark.parametrize("names", [("\u00e9.safetensors", "e\u0301.safetensors"), ("x*.safetensors", "y.safetensors")])
def test_shard_names_that_some_filesystem_cannot_hold(tmp_path: Path, names: tuple[str, str]) -> None:
    write_index(tmp_path, {name: [name] for name in names})
    assert "invalid index: shard name" in refused(tmp_path).message


def test_a_relative_path(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single)
    assert open_checkpoint(".").tensors == open_checkpoint("model.safetensors").tensors


def test_sparse_terabytes(tmp_path: Path) -> None:
    shapes = llama_shapes(8192, 80, 128256, 28672, kv=1024)
    checkpoint = open_checkpoint(sparse_checkpoint(tmp_path / "70b", shapes, shards=30))
    assert sum(ref.nbytes for ref in checkpoint.tensors.values()) == 141_107_412_992
    assert len(checkpoint.tensors) == 723
    assert len(checkpoint.shards) == 30


def test_offsets_are_absolute(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(build_header([("w", TensorEntry("U8", (3,), 0, 3))], {}) + b"abc")
    assert open_checkpoint(file).tensors == {"w": TensorRef(0, "U8", (3,), 4096, 3)}


def test_no_numpy_is_imported() -> None:
    code = (
        "import sys, paramdelta.checkpoint.checkpoint; sys.exit(bool({'numpy', 'numba', 'click'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- directories that do not say what they are ---------------------------------------------------------------


def test_an_index_and_a_model_that_it_does_not_name(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(file_bytes(TENSORS))
    error = refused(sharded)
    assert "both model.safetensors.index.json and model.safetensors" in error.message
    assert "Remove" in str(error)
    assert open_checkpoint(sharded / INDEX).index == INDEX
    assert open_checkpoint(sharded / "model.safetensors").index is None


def test_several_indexes(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "x.safetensors.index.json")
    shutil.copy(sharded / "x.safetensors.index.json", sharded / "y.safetensors.index.json")
    assert "several indexes" in refused(sharded).message


def test_several_files_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    error = refused(sharded)
    assert error.message.startswith("2 .safetensors files and no index")
    assert "save_pretrained" in str(error)
    (sharded / "model.safetensors").write_bytes(file_bytes(TENSORS))
    assert "3 .safetensors files and no index" in refused(sharded).message


def test_model_safetensors_among_other_files(single: Path) -> None:
    (single / "vision.safetensors").write_bytes(b"junk")
    assert open_checkpoint(single).shards[0].name == "model.safetensors"


# -- indexes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b"\xff", "not UTF-8"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map":[]}', "no weight_map"),
        (b'{"weight_map":{}}', "empty"),
        (b'{"weight_map":{"a":1}}', "not a string"),
        (b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "duplicate key 'a'"),
        (b'{"weight_map":{"a":"x.safetensors"},"weight_map":{}}', "duplicate key 'weight_map'"),
        (b'{"metadata":' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_indexes(sharded: Path, raw: bytes, reason: str) -> None:
    (sharded / INDEX).write_bytes(raw)
    error = refused(sharded)
    assert reason in error.message
    assert error.file == str(sharded / INDEX)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "x.safetensors/."),
        *("C:x.safetensors", "x.safetensors:stream", "..", ".", "", "x.bin", "X.SAFETENSORS", "x.safetensors "),
        *("x.safetensors\0", "x\0.safetensors", "x\n.safetensors", "\x1b[2J.safetensors"),
        *("\u202ex.safetensors", "\ud800.safetensors"),
        *("CON.safetensors", "nul.x.safetensors", "Com1.safetensors", "LPT¹.safetensors", "aux .safetensors"),
    ],
)
def test_hostile_shard_names(sharded: Path, name: str) -> None:
    rewrite_index(sharded, weight_map={"a": name})
    error = refused(sharded)
    assert error.message.startswith("invalid index")
    assert str(error).replace("\n", "").isprintable()


def test_shard_names_that_some_filesystems_hold_to_be_equal(sharded: Path) -> None:
    rewrite_index(sharded, weight_map={"a": "x.safetensors", "b": "X.safetensors"})
    assert "differ in case only" in refused(sharded).message


def test_all_missing_shards_are_listed_at_once(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "c", {f"t{i}": normal((1,)) for i in range(20)}, shards=20)
    gone = [f"model-{i:05}-of-00020.safetensors" for i in range(4, 20)]
    for name in gone:
        (root / name).unlink()
    (root / gone[0]).symlink_to("nowhere")
    error = refused(root)
    assert "16 of 20 shards" in error.message
    assert all(name in error.message for name in gone)


def test_tensors_that_are_not_where_the_index_says(sharded: Path) -> None:
    rewrite_index(sharded, weight_map={"a": TWO, "b": TWO, "c": ONE, "e": ONE})
    message = refused(sharded).message
    assert "1 tensors that the index names are not there: 'e' in" in message
    assert f"2 tensors are not where the index says, or unknown to it: 'a' in {ONE}, 'd' in {TWO}" in message


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "c", TENSORS, shards=[["a", "b"], ["b", "c", "d"]])
    assert "not where the index says" in refused(root).message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "c", {f"t{i:02}": normal((1,)) for i in range(40)}, shards=2)
    rewrite_index(root, weight_map={"t00": ONE, "t20": TWO})
    assert "and 28 more" in refused(root).message


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", [ONE, INDEX, "config.json"])
def test_a_fifo_is_refused_and_does_not_block(sharded: Path, name: str) -> None:
    (sharded / name).unlink()
    os.mkfifo(sharded / name)
    assert refused(sharded).message == "not a regular file"
    assert refused(sharded / name).message == "not a regular file"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_devices_and_directories_are_refused(sharded: Path) -> None:
    (sharded / ONE).unlink()
    (sharded / ONE).mkdir()
    assert refused(sharded).message == "not a regular file"
    (sharded / ONE).rmdir()
    (sharded / ONE).symlink_to("/dev/zero")
    assert refused(sharded).message == "not a regular file"


def test_paths_that_lead_nowhere(single: Path) -> None:
    assert "no such file" in refused(single / "nothing").message
    assert "hf download meta-llama/Llama-3.1-8B" in str(refused("meta-llama/Llama-3.1-8B"))
    assert "Not a directory" in refused(single / "config.json" / "x").message
    assert "null" in refused("a\0b").message
    (single / "loop").symlink_to("loop")
    assert "cannot be read" in refused(single / "loop").message


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(single: Path) -> None:
    (single / "model.safetensors").chmod(0)
    assert "Permission denied" in refused(single).message


def test_damaged_files_are_named(sharded: Path) -> None:
    path = sharded / TWO
    for raw in (path.read_bytes()[:-1], path.read_bytes()[:20], b"", b"1234567"):
        path.write_bytes(raw)
        error = refused(sharded)
        assert isinstance(error, HeaderError)
        assert error.file == str(path)
        assert "download it again" in str(error)


def test_a_file_that_ends_while_it_is_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, n: real(fd, n) if n == 8 else b"")
    assert "bytes early" in refused(single).message


def test_short_reads_are_continued(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_checkpoint(single)
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, n: real(fd, min(n, 3)))
    assert open_checkpoint(single) == expected


def test_only_headers_are_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    real = os.read

    def counting(descriptor: int, count: int) -> bytes:
        nonlocal read
        read += count
        return real(descriptor, count)

    monkeypatch.setattr(os, "read", counting)
    checkpoint = open_checkpoint(single)
    assert read == checkpoint.shards[0].data_offset + (single / "config.json").stat().st_size


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_a_damaged_config(single: Path, raw: bytes) -> None:
    (single / "config.json").write_bytes(raw)
    assert "not " in refused(single).message


def test_a_config_with_the_liberties_that_loaders_allow(single: Path) -> None:
    (single / "config.json").write_text('{"a": Infinity, "b": 1, "b": 2}')
    assert open_checkpoint(single).config == {"a": float("inf"), "b": 2}


@pytest.mark.parametrize(("name", "size"), [("config.json", 2**24 + 1), (INDEX, 2**29 + 1)])
def test_small_files_that_are_not_small(sharded: Path, name: str, size: int) -> None:
    os.truncate(sharded / name, size)
    assert "more than such a file" in refused(sharded).message


def test_names_in_messages_are_escaped(tmp_path: Path) -> None:
    root = tmp_path / "a\x1b[2Jb"
    root.mkdir()
    assert "\x1b" not in str(refused(root))
    (root / "x\n.safetensors").write_bytes(b"")
    assert "\x1b" not in str(refused(root))
    assert "x\n" not in str(refused(root))
    assert not isinstance(refused(root), UnsupportedCheckpointError)
