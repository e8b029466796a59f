from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from paramdelta.errors import OutputError
from paramdelta.storage import platform
from paramdelta.storage.pages import Buffer
from paramdelta.storage.platform import ALIGNMENT
from paramdelta.storage.sink import FileSink, output_refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WINDOW = 4 * ALIGNMENT
SIZES = (1, ALIGNMENT - 1, ALIGNMENT, WINDOW - 1, WINDOW, WINDOW + 1, 10 * WINDOW + 12_345)
WAYS = ("direct", "buffered")


def failure(code: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def refuse_direct(monkeypatch: pytest.MonkeyPatch, *, after_creating: bool = False) -> None:
    """Let opening directly fail; with `after_creating` as filesystems do that leave an empty file behind."""
    real = platform._open

    def opened(path: str, flags: int, *, direct: bool) -> int:
        if direct:
            if after_creating and flags & os.O_CREAT:
                os.close(real(path, flags, direct=False))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return real(path, flags, direct=False)

    monkeypatch.setattr(platform, "_open", opened)


@pytest.fixture(params=WAYS)
def create(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], FileSink]:
    """Return what creates a sink that writes directly, or through the page cache."""
    if request.param == "buffered":
        refuse_direct(monkeypatch)

    def create(path: Path, size: int) -> FileSink:
        sink = FileSink(path, size)
        if request.param == "direct" and not sink.direct:
            sink.abandon()
            pytest.skip("the filesystem of the temporary directory has no direct I/O")
        assert sink.direct == (request.param == "direct")
        return sink

    return create


def windows(size: int) -> list[int]:
    return list(range(0, size, WINDOW))


def write_window(sink: FileSink, data: bytes, begin: int) -> None:
    """Write the window of `data` at `begin`, its padding full of bytes that must not last."""
    part = data[begin : begin + WINDOW]
    length = -(-len(part) // ALIGNMENT) * ALIGNMENT
    buffer = Buffer(length)
    buffer.view[:] = part.ljust(length, b"\xa5")
    sink.write(begin, buffer.view)


def open_descriptors() -> int:
    count = 0
    for number in range(256):
        try:
            os.fstat(number)
        except OSError:
            continue
        count += 1
    return count


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_windows_in_any_order_make_the_file_and_the_last_one_is_cut(
    create: Callable[[Path, int], FileSink], size: int, tmp_path: Path
) -> None:
    data = random.Random(size).randbytes(size)
    sink = create(tmp_path / "shard", size)
    order = windows(size)
    random.Random(1).shuffle(order)
    for begin in order:
        write_window(sink, data, begin)
    sink.finish()
    assert (tmp_path / "shard").read_bytes() == data


def test_windows_from_several_threads_make_the_file(create: Callable[[Path, int], FileSink], tmp_path: Path) -> None:
    size = 60 * WINDOW + 4_321
    data = random.Random(0).randbytes(size)
    sink = create(tmp_path / "shard", size)
    order = windows(size)
    random.Random(2).shuffle(order)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda begin: write_window(sink, data, begin), order))
    sink.finish()
    assert (tmp_path / "shard").read_bytes() == data


def test_an_empty_file_is_complete_without_a_window(create: Callable[[Path, int], FileSink], tmp_path: Path) -> None:
    create(tmp_path / "shard", 0).finish()
    assert (tmp_path / "shard").read_bytes() == b""


def test_space_is_reserved_before_the_first_window(create: Callable[[Path, int], FileSink], tmp_path: Path) -> None:
    sink = create(tmp_path / "shard", 1_000_000)
    status = (tmp_path / "shard").stat()
    reserves = platform.preallocate(platform.open_for_writing(str(tmp_path / "other")), 1)
    sink.abandon()
    assert status.st_size == 1_000_000
    if not reserves:
        pytest.skip("the filesystem of the temporary directory cannot reserve")
    assert status.st_blocks * 512 >= 1_000_000


def test_what_was_written_before_a_sink_was_abandoned_is_there(
    create: Callable[[Path, int], FileSink], tmp_path: Path
) -> None:
    data = random.Random(3).randbytes(3 * WINDOW)
    sink = create(tmp_path / "shard", len(data))
    write_window(sink, data, WINDOW)
    sink.abandon()
    assert (tmp_path / "shard").read_bytes()[WINDOW : 2 * WINDOW] == data[WINDOW : 2 * WINDOW]


def test_finishing_and_abandoning_close_the_file(create: Callable[[Path, int], FileSink], tmp_path: Path) -> None:
    create(tmp_path / "first", 0).finish()
    before = open_descriptors()
    create(tmp_path / "second", 0).finish()
    create(tmp_path / "third", 100).abandon()
    incomplete = create(tmp_path / "fourth", 100)
    with pytest.raises(OutputError):
        incomplete.finish()
    assert open_descriptors() == before


def test_finishing_syncs_the_file(
    create: Callable[[Path, int], FileSink], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sink = create(tmp_path / "shard", 100)
    write_window(sink, bytes(100), 0)
    monkeypatch.setattr(platform, "sync_file", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    sink.finish()
    assert synced == [100]  # after the padding was cut


# -- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0, 1, 10])
def test_a_missing_window_is_an_error(create: Callable[[Path, int], FileSink], missing: int, tmp_path: Path) -> None:
    size = 10 * WINDOW + 12_345
    sink = create(tmp_path / "shard", size)
    for begin in windows(size):
        if begin != missing * WINDOW:
            write_window(sink, bytes(size), begin)
    written = size - (WINDOW if missing < 10 else 12_345)
    with pytest.raises(OutputError, match=f"{written:,} of {size:,} bytes were written") as caught:
        sink.finish()
    assert caught.value.file == str(tmp_path / "shard")


def test_an_existing_file_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError) as caught:
        FileSink(path, 100)
    assert caught.value.file == str(path)
    assert path.read_bytes() == b"precious"
    # Where there is no direct I/O at all, or too many files are open, the system has not even looked at the path.
    refuse_direct(monkeypatch)
    with pytest.raises(OutputError):
        FileSink(path, 100)
    assert path.read_bytes() == b"precious"
    monkeypatch.setattr(platform, "_open", failure(errno.EMFILE))
    with pytest.raises(OutputError):
        FileSink(path, 100)
    assert path.read_bytes() == b"precious"


REMEDIES = {
    errno.ENOSPC: "another disk",
    errno.EDQUOT: "quota",
    errno.EFBIG: "--shard-size",
    errno.EROFS: "read-only",
    errno.EACCES: "where you may write",
    errno.EPERM: "where you may write",
}


@pytest.mark.parametrize(("code", "remedy"), REMEDIES.items())
def test_a_window_that_cannot_be_written_names_file_cause_and_remedy(
    create: Callable[[Path, int], FileSink], code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = create(tmp_path / "shard", 1_000_000)
    monkeypatch.setattr(platform, "_write_some", failure(code))
    with pytest.raises(OutputError) as caught:
        write_window(sink, bytes(1_000_000), 0)
    assert caught.value.exit_code == 5
    assert caught.value.file == str(tmp_path / "shard")
    assert os.strerror(code) in caught.value.message
    assert "1,000,000 bytes" in caught.value.message
    assert remedy in (caught.value.remedy or "")
    sink.abandon()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_file_that_finds_no_room_is_an_error_and_leaves_nothing_behind(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    monkeypatch.setattr(platform, "preallocate", failure(code))
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "shard", 1_000_000)
    assert REMEDIES[code] in (caught.value.remedy or "")
    assert caught.value.file == str(tmp_path / "shard")
    assert list(tmp_path.iterdir()) == []
    assert open_descriptors() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_first_block_that_finds_no_room_is_an_error_and_leaves_nothing_behind(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether direct writes are taken is found out by writing a block, which a full disk refuses too.
    before = open_descriptors()
    monkeypatch.setattr(platform, "_write_some", failure(code))
    with pytest.raises(OutputError, match=os.strerror(code)):
        FileSink(tmp_path / "shard", 1_000_000)
    assert list(tmp_path.iterdir()) == []
    assert open_descriptors() == before


def test_more_than_the_disk_holds_is_refused_by_the_real_system(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "shard", 1 << 52)
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_file_that_cannot_be_created_is_an_error(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "open_for_writing", failure(code))
    with pytest.raises(OutputError) as caught:
        FileSink(tmp_path / "shard", 100)
    assert REMEDIES[code] in (caught.value.remedy or "")


def test_a_directory_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file") as caught:
        FileSink(tmp_path / "missing" / "shard", 100)
    assert caught.value.file == str(tmp_path / "missing" / "shard")


@pytest.mark.parametrize("step", ["fsync", "ftruncate"])
def test_a_file_that_cannot_be_cut_or_synced_is_an_error_and_is_closed(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    sink = FileSink(tmp_path / "shard", 100)
    if step == "ftruncate" and not sink.direct:
        sink.abandon()
        pytest.skip("nothing is cut where nothing is written directly")
    write_window(sink, bytes(100), 0)
    monkeypatch.setattr(os, step, failure(errno.EIO))
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)) as caught:
        sink.finish()
    assert caught.value.file == str(tmp_path / "shard")
    assert open_descriptors() == before


def test_a_file_that_shrinks_behind_the_sink_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = FileSink(tmp_path / "shard", 100)
    write_window(sink, bytes(100), 0)
    monkeypatch.setattr(platform, "sync_file", lambda descriptor: os.truncate(descriptor, 50))
    with pytest.raises(OutputError, match="size"):
        sink.finish()


# -- filesystems without direct I/O --------------------------------------------------------------------------


def test_a_file_left_by_a_refused_direct_open_is_created_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch, after_creating=True)
    sink = FileSink(tmp_path / "shard", 5)
    assert not sink.direct
    write_window(sink, b"hello", 0)
    sink.finish()
    assert (tmp_path / "shard").read_bytes() == b"hello"


def test_direct_writes_that_are_refused_only_once_they_are_tried_make_the_sink_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    real = platform._write_some
    tried: list[int] = []

    def refuse_the_first(descriptor: int, view: memoryview, offset: int) -> int:
        tried.append(offset)
        if len(tried) == 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, view, offset)

    monkeypatch.setattr(platform, "_write_some", refuse_the_first)
    sink = FileSink(tmp_path / "shard", 10_000)
    assert not sink.direct
    write_window(sink, b"x" * 10_000, 0)
    sink.finish()
    assert (tmp_path / "shard").read_bytes() == b"x" * 10_000
    assert open_descriptors() == before


def test_a_buffered_sink_never_writes_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    sink = FileSink(tmp_path / "shard", ALIGNMENT + 1)
    write_window(sink, b"x" * (ALIGNMENT + 1), 0)
    assert (tmp_path / "shard").stat().st_size == ALIGNMENT + 1
    sink.finish()


def test_a_buffered_sink_sends_windows_to_the_device_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else a merge would fill the page cache with dirty pages, and with them push out all that others keep there.
    refuse_direct(monkeypatch)
    begun: list[int] = []
    ended: list[int] = []
    monkeypatch.setattr(platform, "start_writeback", lambda _, offset, __: begun.append(offset))
    monkeypatch.setattr(platform, "finish_writeback", lambda _, offset, __: ended.append(offset))
    size = 10 * WINDOW
    sink = FileSink(tmp_path / "shard", size)
    for begin in windows(size):
        write_window(sink, bytes(size), begin)
        assert len(begun) - len(ended) <= 1
    assert begun == windows(size)
    sink.finish()


def test_a_buffered_sink_passes_on_that_the_device_failed_behind_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system reports a failed write-back once: were it overheard here, the sync at the end would succeed.
    refuse_direct(monkeypatch)
    monkeypatch.setattr(platform, "finish_writeback", failure(errno.EIO))
    sink = FileSink(tmp_path / "file", 2 * WINDOW)
    write_window(sink, bytes(2 * WINDOW), 0)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        write_window(sink, bytes(2 * WINDOW), WINDOW)
    sink.abandon()


def test_what_the_system_refuses_is_explained_without_a_size_too(tmp_path: Path) -> None:
    refused = output_refused(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path / "card.md")
    assert str(refused).startswith(f"{tmp_path / 'card.md'}: cannot be written: No space left")
    assert output_refused(OSError(errno.EIO, "?"), tmp_path).remedy is None
