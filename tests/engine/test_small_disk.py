"""A real filesystem that fills up, or turns read-only, under a merge. Needs the right to mount one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

import paramdelta
from paramdelta.checkpoint.discovery import STAGING
from paramdelta.engine.output import OutputDirectory
from paramdelta.errors import OutputError
from tests.make import normal, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from paramdelta.planning.layout import OutputShard
    from paramdelta.storage.sink import FileSink

ROLES = ("post", "base", "new_base")
SHARDS = 4  # of half a megabyte each


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no filesystem may be mounted: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def triple(tmp_path: Path) -> Path:
    for seed, role in enumerate(ROLES):
        tensors = {f"t{number}": normal((500, 500), seed=seed + 10 * number) for number in range(SHARDS)}
        write_checkpoint(tmp_path / role, tensors, shards=SHARDS, config={"from": role})
    return tmp_path


def merge(triple: Path, output: Path, **options: Any) -> paramdelta.MergeResult:
    post, base, new_base = (triple / role for role in ROLES)
    return paramdelta.merge(post, base, new_base, output, workers=1, **options)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def before_the_third_shard(monkeypatch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
    create = OutputDirectory.create

    def late(self: OutputDirectory, shard: OutputShard) -> FileSink:
        if shard.name.startswith("model-00003"):
            happen()
        return create(self, shard)

    monkeypatch.setattr(OutputDirectory, "create", late)


def fill(path: Path) -> None:
    """Use up all the space there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_fills_up_keeps_what_is_finished(triple: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        before_the_third_shard(patch, lambda: fill(disk / "filler"))
        with pytest.raises(OutputError, match=r"No space left on device(.|\n)*Free some space(.|\n)*kept") as caught:
            merge(triple, disk / "out")
    assert caught.value.exit_code == 5
    assert [entry.name for entry in (disk / "out").iterdir()] == [STAGING]
    (disk / "filler").unlink()
    result = merge(triple, disk / "out")
    assert 1 <= result.resumed_shards <= 2
    merge(triple, triple / "fresh" / "out")
    assert contents(disk / "out") == contents(triple / "fresh" / "out")
    assert paramdelta.verify(disk / "out", recompute=True).ok


def test_a_disk_that_is_too_small_is_seen_coming(triple: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(3 << 20))
    with pytest.raises(OutputError, match="or your quota, has"):
        merge(triple, disk / "out")
    assert not (disk / "out").exists()


def test_a_disk_that_turned_read_only_is_an_output_error(triple: Path, disk: Path) -> None:
    merge(triple, disk / "old")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OutputError, match="read-only"):
        merge(triple, disk / "out")
    assert paramdelta.verify(disk / "old").ok
    assert merge(triple, disk / "old").already_complete


def test_inputs_on_a_read_only_disk_merge_to_another_one(triple: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    for role in ROLES:
        shutil.copytree(triple / role, disk / role)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for io in ("auto", "mmap", "pread"):
        merge(disk, triple / io, io=io)
        assert paramdelta.verify(triple / io, recompute=True).ok
