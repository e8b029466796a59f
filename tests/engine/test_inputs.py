from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from paramdelta.engine.budget import DEVICE_WINDOW, LARGEST_WINDOW
from paramdelta.engine.inputs import Inputs, check_identity, files_of, largest_window, last_uses
from paramdelta.errors import InputChangedError
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.recipe import Recipe
from paramdelta.storage import platform
from paramdelta.storage.pages import Buffer
from paramdelta.storage.source import Source, open_source
from tests.make import normal, skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAMES = ("a", "b", "c", "d")


def planned(root: Path, new: Sequence[Sequence[str]], post: Sequence[Sequence[str]]) -> Plan:
    tensors = {name: normal((5, 5), seed=number) for number, name in enumerate(NAMES)}
    for role, shards in (("new", new), ("post", post), ("base", [NAMES])):
        write_checkpoint(root / role, tensors, shards=shards)
    return make_plan(Recipe.of(root / "post", root / "base", root / "new"))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(tmp_path, [NAMES], [NAMES])


# -- identity ------------------------------------------------------------------------------------------------


def test_a_file_that_nobody_touched_is_the_same(plan: Plan) -> None:
    for file in plan.files:
        check_identity(file)


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def grow(path: Path) -> None:
    status = path.stat()
    with path.open("ab") as file:
        file.write(b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """Put a copy in its place that has everything but the inode."""
    status = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


CHANGES = {touch: "mtime_ns", grow: "size", replace: "ino"}


@pytest.mark.parametrize(("change", "field"), CHANGES.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_changed_file_is_an_error_that_says_what_changed(
    change: object, field: str, plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "post/model.safetensors"
    before = path.stat()
    change(path)  # type: ignore[operator]
    (file,) = (file for file in plan.files if file.path == str(path))
    with pytest.raises(InputChangedError) as caught:
        check_identity(file)
    old, new = getattr(before, f"st_{field}"), getattr(path.stat(), f"st_{field}")
    assert f"({field} {old} → {new})" in caught.value.message
    assert caught.value.exit_code == 6
    assert caught.value.file == str(path)
    assert caught.value.remedy


def test_a_file_that_is_gone_is_an_error(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(InputChangedError, match="cannot be found any more") as caught:
        check_identity(plan.files[2])
    assert caught.value.exit_code == 6
    assert caught.value.file == str(tmp_path / "base/model.safetensors")


def test_a_file_that_was_read_is_the_same(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "new/model.safetensors").read_bytes()
    os.utime(tmp_path / "new/model.safetensors", ns=(1, plan.files[0].identity.mtime_ns))
    check_identity(plan.files[0])


@pytest.mark.parametrize("change", [*CHANGES, os.unlink])
def test_no_changed_file_is_opened(change: object, plan: Plan, tmp_path: Path) -> None:
    change(tmp_path / "new/model.safetensors")  # type: ignore[operator]
    opened = Inputs(plan.files, "pread")
    with pytest.raises(InputChangedError):
        opened.source(0)
    assert opened.backends == set()
    opened.close()


# -- open files ----------------------------------------------------------------------------------------------


def test_files_are_opened_when_first_needed_and_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []

    def recorded(path: str, size: int, io: str) -> Source:
        paths.append(path)
        return open_source(path, size, io)

    monkeypatch.setattr("paramdelta.engine.inputs.open_source", recorded)
    opened = Inputs(plan.files, "pread")
    assert paths == []
    with ThreadPoolExecutor(8) as threads:
        sources = list(threads.map(opened.source, [1] * 100))
    assert paths == [plan.files[1].path]
    assert len({id(source) for source in sources}) == 1
    opened.close()


def test_a_source_reads_the_file_at_its_place(plan: Plan) -> None:
    opened = Inputs(plan.files, "pread")
    for operation in plan.operations:
        for operand in operation.parts[0].operands:
            buffer = Buffer(opened.room(operand.file, 50))
            address = opened.source(operand.file).borrow(operand.offset, 50, buffer.view).address
            expected = normal((5, 5), seed=NAMES.index(operation.name))[2]
            assert ctypes.string_at(address, 50) == expected
    assert opened.backends == {"pread"}
    opened.close()


def test_a_file_can_be_closed_and_is_opened_again_where_it_is_needed_again(plan: Plan) -> None:
    opened = Inputs(plan.files, "pread")
    first, kept = opened.source(0), opened.source(1)
    opened.close([0, 2])
    assert opened.source(1) is kept
    assert opened.source(0) is not first
    opened.close()
    opened.close()


# -- last uses -----------------------------------------------------------------------------------------------


def by_name(plan: Plan, places: Sequence[int]) -> set[str]:
    return {"/".join(plan.files[place].path.split("/")[-2:]) for place in places}


def test_files_are_last_used_by_the_last_shard_that_reads_them(tmp_path: Path) -> None:
    plan = planned(tmp_path, [["a"], ["b", "c"], ["d"]], [["a", "b"], ["c"], ["d"]])
    uses = [by_name(plan, places) for places in last_uses(plan)]
    new, post = (f"{role}/model-0000{{}}-of-00003.safetensors" for role in ("new", "post"))
    assert uses == [
        {new.format(1)},
        {new.format(2), post.format(1), post.format(2)},
        {new.format(3), post.format(3), "base/model.safetensors"},
    ]


def test_every_file_that_is_read_is_last_used_once(tmp_path: Path) -> None:
    plan = planned(tmp_path, [["a"], ["b", "c"], ["d"]], [["d", "b"], ["c", "a"]])
    places = [place for ended in last_uses(plan) for place in ended]
    assert sorted(places) == list(range(len(plan.files)))


def test_files_of_a_shard_are_those_of_its_operations(tmp_path: Path) -> None:
    plan = planned(tmp_path, [["a"], ["b", "c", "d"]], [["a", "b"], ["c", "d"]])
    first, second = (by_name(plan, sorted(files_of(plan, shard))) for shard in plan.shards)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert first == {f"new/{names[0]}", f"post/{names[0]}", "base/model.safetensors"}
    assert second == {f"new/{names[1]}", f"post/{names[0]}", f"post/{names[1]}", "base/model.safetensors"}


# -- windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("io", "spinning", "expected"),
    [
        ("mmap", False, LARGEST_WINDOW),
        ("pread", False, DEVICE_WINDOW),
        ("pread", True, LARGEST_WINDOW),
        ("direct", False, DEVICE_WINDOW),
    ],
)
def test_windows_are_small_where_a_device_without_moving_parts_is_read(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io: str, spinning: bool, expected: int
) -> None:
    skip_without_direct_io(io, tmp_path)
    monkeypatch.setattr(platform, "spins", lambda _: spinning)
    assert largest_window(plan, io) == expected


def test_windows_of_inputs_that_cannot_be_opened_are_nobodys_concern_yet(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "spins", lambda _: False)
    (tmp_path / "post" / "model.safetensors").unlink()
    assert largest_window(plan, "pread") == DEVICE_WINDOW
