from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from paramdelta.storage import pages, platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    descriptor = platform.open_for_writing(str(tmp_path / "file"))
    yield descriptor
    os.close(descriptor)


def contents(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def refuse_fallocate(monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[tuple[int, ...]]:
    """Let fallocate fail with each of `codes` in turn, then succeed; return the list of calls to come."""
    calls: list[tuple[int, ...]] = []

    def fallocate(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) <= len(codes):
            ctypes.set_errno(codes[len(calls) - 1])
            return -1
        os.ftruncate(arguments[0], arguments[3])
        return 0

    monkeypatch.setattr(platform, "_fallocate", fallocate)
    return calls


# -- opening -------------------------------------------------------------------------------------------------


def test_opening_for_writing_never_touches_a_file_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        platform.open_for_writing(str(path))
    assert path.read_bytes() == b"precious"


def test_descriptors_are_not_inherited_by_child_processes(descriptor: int) -> None:
    assert not os.get_inheritable(descriptor)


def test_without_any_form_of_direct_io_opening_directly_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "_O_DIRECT", 0)
    monkeypatch.setattr(platform, "_fcntl_constant", lambda *_: None)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError, match="no direct I/O") as caught:
        platform.open_for_reading(str(tmp_path / "file"), direct=True)
    assert caught.value.errno == errno.ENOTSUP
    assert caught.value.filename == str(tmp_path / "file")


# -- positional reads and writes -----------------------------------------------------------------------------


def test_write_all_writes_at_the_offset_and_leaves_a_hole_before_it(descriptor: int) -> None:
    platform.write_all(descriptor, memoryview(b"end"), 5)
    assert contents(descriptor) == bytes(5) + b"end"


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_write_all_goes_on_where_the_system_stopped_short(
    descriptor: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = []
    real = platform._write_some

    def some(fd: int, view: memoryview, offset: int) -> int:
        offsets.append(offset)
        return real(fd, view[:most], offset)

    monkeypatch.setattr(platform, "_write_some", some)
    data = os.urandom(most * 5 + most // 2)
    platform.write_all(descriptor, memoryview(data), 11)
    assert contents(descriptor)[11:] == data
    assert offsets == list(range(11, 11 + len(data), most))


def test_write_all_never_asks_for_more_than_one_call_can_take(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = platform._write_some

    def some(fd: int, view: memoryview, offset: int) -> int:
        sizes.append(len(view))
        return real(fd, view, offset)

    monkeypatch.setattr(platform, "_write_some", some)
    monkeypatch.setattr(platform, "_MOST_PER_CALL", 1000)
    data = os.urandom(2500)
    platform.write_all(descriptor, memoryview(data), 0)
    assert contents(descriptor) == data
    assert sizes == [1000, 1000, 500]


def test_write_all_does_not_spin_where_nothing_is_written(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_write_some", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing") as caught:
        platform.write_all(descriptor, memoryview(b"x"), 0)
    assert caught.value.errno == errno.EIO


def test_write_all_of_nothing_calls_nothing(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_write_some", lambda *_: pytest.fail("called"))
    platform.write_all(descriptor, memoryview(b""), 0)


def test_write_all_passes_on_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    descriptor = platform.open_for_reading(str(tmp_path / "file"))
    try:
        with pytest.raises(OSError, match="descriptor"):
            platform.write_all(descriptor, memoryview(b"y"), 0)
    finally:
        os.close(descriptor)


def test_read_some_says_how_much_came_and_zero_at_the_end(descriptor: int) -> None:
    platform.write_all(descriptor, memoryview(b"0123456789"), 0)
    memory = bytearray(8)
    assert platform.read_some(descriptor, memoryview(memory), 6) == 4
    assert bytes(memory[:4]) == b"6789"
    assert platform.read_some(descriptor, memoryview(memory), 10) == 0
    assert platform.read_some(descriptor, memoryview(memory), 1000) == 0


def test_uncached_read_flags_are_taken_by_reads_of_this_file(descriptor: int) -> None:
    platform.write_all(descriptor, memoryview(b"0123456789"), 0)
    flags = platform.uncached_read_flags(descriptor)
    memory = bytearray(4)
    assert platform.read_some(descriptor, memoryview(memory), 3, flags) == 4
    assert memory == b"3456"


def test_uncached_read_flags_are_none_where_the_system_refuses_them(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "preadv", preadv)
    assert platform.uncached_read_flags(descriptor) == 0


def test_uncached_read_flags_are_none_where_there_is_no_preadv(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    assert platform.uncached_read_flags(descriptor) == 0


# -- preallocation -------------------------------------------------------------------------------------------


def test_preallocate_reserves_blocks_and_sets_the_size(descriptor: int) -> None:
    size = 3 * MIB + 5
    if not platform.preallocate(descriptor, size):
        pytest.skip("the filesystem of the temporary directory cannot reserve")
    status = os.fstat(descriptor)
    assert status.st_size == size
    assert status.st_blocks * 512 >= size


def test_preallocated_bytes_are_zero_and_can_be_written_anywhere(descriptor: int) -> None:
    platform.preallocate(descriptor, 10_000)
    platform.write_all(descriptor, memoryview(b"here"), 5_000)
    assert contents(descriptor) == bytes(5_000) + b"here" + bytes(4_996)


def test_preallocate_of_nothing_reserves_nothing(descriptor: int) -> None:
    assert platform.preallocate(descriptor, 0)
    assert os.fstat(descriptor).st_size == 0


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_where_fallocate_is_unsupported_the_size_is_set_and_nothing_promised(
    descriptor: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_fallocate(monkeypatch, code)
    monkeypatch.setattr(platform, "_fcntl_constant", lambda *_: None)
    assert not platform.preallocate(descriptor, 50_000)
    assert os.fstat(descriptor).st_size == 50_000


def test_where_there_is_no_fallocate_the_size_is_set_and_nothing_promised(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "_fallocate", None)
    monkeypatch.setattr(platform, "_fcntl_constant", lambda *_: None)
    assert not platform.preallocate(descriptor, 50_000)
    assert os.fstat(descriptor).st_size == 50_000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_where_there_is_no_room_preallocate_raises(descriptor: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fallocate(monkeypatch, code)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        platform.preallocate(descriptor, 50_000)
    assert caught.value.errno == code


def test_preallocate_that_a_signal_interrupts_tries_again(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = refuse_fallocate(monkeypatch, errno.EINTR, errno.EINTR)
    assert platform.preallocate(descriptor, 50_000)
    assert len(calls) == 3


def test_more_than_the_device_holds_is_refused_by_the_real_system(descriptor: int) -> None:
    if platform._fallocate is None:
        pytest.skip("no fallocate on this system")
    with pytest.raises(OSError, match=r".") as caught:
        platform.preallocate(descriptor, 1 << 52)
    assert caught.value.errno in {errno.ENOSPC, errno.EFBIG}


def test_reserving_through_fcntl_counts_as_reserved(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The way of macOS, where there is no fallocate.
    requests: list[tuple[int, bytes]] = []
    monkeypatch.setattr(platform, "_fallocate", None)
    monkeypatch.setattr(platform, "_fcntl_constant", {"F_PREALLOCATE": 42}.get)
    monkeypatch.setattr(platform, "_fcntl", lambda _, command, request: requests.append((command, request)))
    assert platform.preallocate(descriptor, 50_000)
    assert os.fstat(descriptor).st_size == 50_000
    assert [command for command, _ in requests] == [42]
    assert (50_000).to_bytes(8, sys.byteorder) in requests[0][1]


# -- durability ----------------------------------------------------------------------------------------------


def test_files_and_directories_can_be_synced(descriptor: int, tmp_path: Path) -> None:
    platform.write_all(descriptor, memoryview(b"x"), 0)
    platform.sync_file(descriptor)
    platform.sync_directory(tmp_path)


def fail_with(code: int) -> object:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_filesystem_that_cannot_sync_directories_is_tolerated(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(code))
    platform.sync_directory(tmp_path)


def test_a_system_that_cannot_open_directories_is_tolerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", fail_with(errno.EACCES))
    platform.sync_directory(tmp_path)


def test_a_directory_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        platform.sync_directory(tmp_path / "missing")
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        platform.sync_directory(tmp_path)


def test_a_file_that_fails_to_sync_is_an_error(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        platform.sync_file(descriptor)


def test_a_full_sync_that_is_unsupported_falls_back_to_fsync(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(platform, "_fcntl_constant", {"F_FULLFSYNC": 51}.get)
    monkeypatch.setattr(platform, "_fcntl", fail_with(errno.ENOTSUP))
    monkeypatch.setattr(os, "fsync", synced.append)
    platform.sync_file(descriptor)
    assert synced == [descriptor]


@pytest.mark.parametrize("push", [platform.start_writeback, platform.finish_writeback])
def test_a_device_that_fails_to_write_back_is_not_overheard(
    descriptor: int, push: Callable[[int, int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [errno.EINTR, errno.EIO]

    def fail(*_: int) -> int:
        ctypes.set_errno(codes.pop(0))
        return -1

    monkeypatch.setattr(platform, "_sync_file_range", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        push(descriptor, 0, 4096)
    codes.append(errno.ENOSYS)
    push(descriptor, 0, 4096)  # a system without this call is served by the sync at the end
    assert not codes


def test_a_range_that_was_pushed_out_is_no_longer_dirty_nor_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB))
    with path.open("r+b") as file:
        platform.start_writeback(file.fileno(), 0, 3 * MIB)
        platform.finish_writeback(file.fileno(), 0, 3 * MIB)
        if platform._sync_file_range is None or pages._mincore is None:
            pytest.skip("this system cannot, or does not tell")
        share = pages.resident_share(file.fileno(), 3 * MIB)
    if share > 0.95:
        pytest.skip("the filesystem of the temporary directory keeps its pages whatever it is told (tmpfs does)")
    assert share == 0.0


def test_written_ranges_survive_being_pushed_out(descriptor: int) -> None:
    data = os.urandom(300_000)
    platform.write_all(descriptor, memoryview(data), 0)
    platform.start_writeback(descriptor, 0, 200_000)
    platform.finish_writeback(descriptor, 0, 200_000)
    platform.drop_cached(descriptor, 0, len(data))
    assert contents(descriptor) == data


# -- quotas --------------------------------------------------------------------------------------------------


class Quotas:
    """A system on which the file's owner or group may use so much: hard limit and use in bytes, by kind (0, 1)."""

    def __init__(self, limits: dict[int, tuple[int, int]]) -> None:
        self.limits = limits

    def __call__(self, _number: object, _descriptor: object, command: Any, _id: object, found: Any) -> int:
        get, kind = divmod(command.value, 256)
        assert get == 0x800007
        if kind not in self.limits:
            ctypes.set_errno(errno.ESRCH)
            return -1
        hard, used = self.limits[kind]
        found._obj.hard_limit, found._obj.used = hard // 1024, used
        return 0


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({}, None),
        ({0: (0, 5_000)}, None),  # counted, not limited
        ({0: (102_400, 1_000)}, 101_400),
        ({1: (102_400, 1_000)}, 101_400),
        ({0: (102_400, 1_000), 1: (51_200, 51_000)}, 200),
        ({0: (1024, 5_000)}, 0),
    ],
)
def test_what_a_quota_leaves_is_the_least_of_user_and_group(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, limits: dict[int, tuple[int, int]], left: int | None
) -> None:
    monkeypatch.setattr(platform, "_system_call", Quotas(limits))
    assert platform.quota_left(descriptor) == left


def test_no_quota_is_seen_where_the_system_has_no_such_call(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_system_call", None)
    assert platform.quota_left(descriptor) is None


def test_the_real_system_is_asked_without_harm(descriptor: int) -> None:
    left = platform.quota_left(descriptor)
    assert left is None or left >= 0


# -- what a disk is ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "major"), reason="devices have no numbers here")
@pytest.mark.parametrize(
    ("home", "rotational", "expected"),
    [
        ("devices/pci0/ata1/host0/target0/block/sda", "1", True),
        ("devices/pci0/ata1/host0/target0/block/sda/sda1", "1", True),
        ("devices/pci0/usb3/3-1/host6/block/sdb", "1", True),
        ("devices/pci0/nvme/nvme0/nvme0n1", "0", False),
        ("devices/pci0/virtio1/block/vda", "1", False),
        ("devices/virtual/block/dm-0", "1", False),
        ("devices/vbd-51712/block/xvda", "1", False),
    ],
)
def test_disks_that_spin_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str, rotational: str, expected: bool
) -> None:
    file = tmp_path / "file"
    file.touch()
    device = file.stat().st_dev
    place = tmp_path / home
    place.mkdir(parents=True)
    queue = (place.parent if place.name == "sda1" else place) / "queue"
    queue.mkdir()
    (queue / "rotational").write_text(f"{rotational}\n")
    monkeypatch.setattr(platform, "_BLOCK_DEVICES", tmp_path)
    assert not platform.spins(str(file)), "nothing is known of it"
    (tmp_path / f"{os.major(device)}:{os.minor(device)}").symlink_to(place)
    assert platform.spins(str(file)) is expected
    volume = tmp_path / "devices" / "virtual" / "block" / "dm-9"
    (volume / "slaves").mkdir(parents=True)
    (volume / "slaves" / "one").symlink_to(place)
    (tmp_path / f"{os.major(device)}:{os.minor(device)}").unlink()
    (tmp_path / f"{os.major(device)}:{os.minor(device)}").symlink_to(volume)
    assert platform.spins(str(file)) is expected, "what lies on it is no better"
    assert not platform.spins(str(tmp_path / "nothing"))
