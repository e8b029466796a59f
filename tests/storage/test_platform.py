from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from paramdelta.storage import platform
from paramdelta.storage.platform import address_of

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


def test_the_limit_of_open_files_is_lifted_and_never_lowered() -> None:
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    # In a process of its own: a lowered hard limit could not be raised again for other tests.
    program = (
        "import resource\n"
        "from paramdelta.storage import platform\n"
        "for soft, hard, after in ((64, 5000, 4096), (64, 1000, 1000), (900, 1000, 1000)):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "    platform.raise_open_file_limit()\n"
        "    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (after, hard)\n"
        "    platform.raise_open_file_limit()\n"
        "    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (after, hard)\n"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 5000:
        pytest.skip(f"the hard limit of open files is {hard} here")
    subprocess.run([sys.executable, "-c", program], check=True)


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


# -- memory --------------------------------------------------------------------------------------------------


def test_peak_rss_is_at_least_what_the_process_holds_now() -> None:
    psutil = pytest.importorskip("psutil")
    assert platform.peak_rss() > 1_000_000
    assert platform.peak_rss() >= psutil.Process().memory_info().rss - MIB


def test_peak_rss_grows_with_touched_memory_and_does_not_fall_again() -> None:
    # In a process of its own: how high other tests drove this one's peak is not known. Linux sums per-processor
    # counters that lag by some pages each, so the peak it reports can go back by a little.
    program = (
        "from paramdelta.storage import platform\n"
        "before = platform.peak_rss()\n"
        "memory = bytearray(b'x') * (64 << 20)\n"
        "during = platform.peak_rss()\n"
        "del memory\n"
        "after = platform.peak_rss()\n"
        "assert 60 << 20 <= during - before <= 80 << 20, (before, during)\n"
        "assert after >= during - (1 << 20), (during, after)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_peak_rss_is_known_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoProc:
        def __init__(self, _: str) -> None:
            pass

        def open(self, **_: str) -> None:
            raise FileNotFoundError

    monkeypatch.setattr(platform, "Path", NoProc)
    assert 1_000_000 < platform.peak_rss() < 1 << 40


def mapped_share(path: Path) -> float:
    with path.open("rb") as file:
        return platform.resident_share(file.fileno(), path.stat().st_size)


@pytest.fixture(params=["own file", "somebody else's file"])
def ownership(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """mincore lies about files of others, for which there is another way to tell."""
    if request.param != "own file":
        monkeypatch.setattr(platform, "_may_see_residency", lambda _: False)


@pytest.mark.usefixtures("ownership")
def test_a_file_just_written_and_read_is_resident(tmp_path: Path) -> None:
    if platform._mincore is None:
        pytest.skip("this system does not tell what its page cache holds")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 123))
    path.read_bytes()
    assert mapped_share(path) > 0.95


@pytest.mark.usefixtures("ownership")
def test_a_file_that_the_cache_let_go_of_is_not_resident(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 123))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        platform.drop_cached(file.fileno(), 0, 0)
    share = mapped_share(path)
    if share > 0.95:
        pytest.skip("the filesystem of the temporary directory keeps its pages whatever it is told (tmpfs does)")
    assert share < 0.05


@pytest.mark.parametrize("size", [1, 4096, 4097, 100_000])
def test_the_resident_share_of_small_files_is_a_share(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert 0.0 <= mapped_share(path) <= 1.0


def test_nothing_is_resident_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    monkeypatch.setattr(platform, "_mincore", lambda *_: -1)
    assert mapped_share(tmp_path / "file") == 0.0
    monkeypatch.setattr(platform, "_mincore", None)
    assert mapped_share(tmp_path / "file") == 0.0


def test_nothing_is_resident_of_no_bytes() -> None:
    assert platform.resident_share(0, 0) == 0.0


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, mmap.ALLOCATIONGRANULARITY + 5, 99_999])
def test_a_range_is_mapped_from_the_granularity_below_it(tmp_path: Path, offset: int) -> None:
    data = os.urandom(100_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file, platform.map_range(file.fileno(), offset, 1) as mapping:
        begin = offset % mmap.ALLOCATIONGRANULARITY
        platform.populate(address_of(mapping) + begin, 1)
        assert mapping[begin] == data[offset]
        assert len(mapping) == begin + 1


def test_a_range_that_a_file_does_not_have_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match=r"."):
        platform.map_range(file.fileno(), 5, 6)


def test_pages_behind_the_end_of_a_file_cannot_be_populated_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * platform.PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        address = address_of(memoryview(mapping))
        if platform._advise_memory(address, platform.PAGE, platform._MADV_POPULATE_READ) != 0:
            pytest.skip("this system cannot populate mappings")
        assert platform.populate(address, 8 * platform.PAGE)
        os.truncate(path, platform.PAGE)
        assert platform.populate(address, platform.PAGE)
        assert not platform.populate(address, 8 * platform.PAGE)


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
        if platform._sync_file_range is None or platform._mincore is None:
            pytest.skip("this system cannot, or does not tell")
        share = platform.resident_share(file.fileno(), 3 * MIB)
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
