from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paramdelta.errors import CheckpointError, InputChangedError
from paramdelta.storage import pages, platform, source
from paramdelta.storage.pages import PAGE, Buffer
from paramdelta.storage.platform import ALIGNMENT
from paramdelta.storage.source import BACKENDS, Source, open_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZES = (1, 7, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT, 100_003)


def data_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """A file of each of SIZES, by size."""
    root = tmp_path_factory.mktemp("files")
    for size in SIZES:
        (root / str(size)).write_bytes(data_of(size))
    return {size: str(root / str(size)) for size in SIZES}


@pytest.fixture(scope="module")
def opened(files: dict[int, str]) -> dict[tuple[str, int], Source]:
    """Every file with every backend that the filesystem of the temporary directory has."""
    usable: dict[tuple[str, int], Source] = {}
    for backend, size in itertools.product(BACKENDS, SIZES):
        try:
            usable[backend, size] = open_source(files[size], size, backend)
        except CheckpointError:
            assert backend == "direct"  # the others must work everywhere
    return usable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(data_of(100_003))
    return tmp_path / "file"


def opened_with(backend: str, path: Path) -> Source:
    try:
        return open_source(str(path), path.stat().st_size, backend)
    except CheckpointError:
        if backend != "direct":
            raise
        pytest.skip("the filesystem of the temporary directory has no direct I/O")


def borrowed(opened: Source, offset: int, size: int) -> bytes:
    """Return the bytes that a range holds, checking that none beside the promised room was written."""
    room = opened.room(size)
    buffer = Buffer(room + ALIGNMENT)
    buffer.view[room:] = b"\xa5" * ALIGNMENT
    loan = opened.borrow(offset, size, buffer.view[:room])
    got = ctypes.string_at(loan.address, size)
    opened.give_back(loan)
    assert bytes(buffer.view[room:]) == b"\xa5" * ALIGNMENT
    return got


# -- parity --------------------------------------------------------------------------------------------------


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int, int]:
    """A file size of SIZES, and a range inside it whose ends like to be near multiples of 4096."""
    total = draw(st.sampled_from(SIZES))
    near = [block + step for block in range(0, total + 1, ALIGNMENT) for step in (-1, 0, 1, 3)]
    place = st.one_of(st.integers(0, total), st.sampled_from([p for p in [*near, total] if 0 <= p <= total]))
    begin, end = sorted((draw(place), draw(place)))
    begin = min(begin, end - 1) if end else begin
    return total, begin, max(end, 1) - begin


@given(ranges())
@example((1, 0, 1))
@example((ALIGNMENT - 1, 0, ALIGNMENT - 1))
@example((100_003, 0, 100_003))  # the whole file
@example((100_003, 100_002, 1))  # the last byte
@example((100_003, 98_304, 1_699))  # the last block, which is not whole
@example((100_003, 4095, 2))  # across a page
@example((100_003, 1, 8190))  # odd, from the first page to the second one's end
@example((3 * ALIGNMENT, ALIGNMENT, ALIGNMENT))
def test_every_backend_gives_the_same_bytes(
    opened: dict[tuple[str, int], Source], wanted: tuple[int, int, int]
) -> None:
    """The matrix: {mmap, pread, direct} × file sizes {1, 7, 4095, 4096, 4097, 12288, 100003} × ranges.

    Ranges are drawn freely and near block boundaries: odd offsets, one to all of the bytes, the file's last
    bytes, across pages, whole pages. What is right is a slice of what was written to the file.
    """
    total, offset, size = wanted
    for backend in BACKENDS:
        if (backend, total) in opened:
            assert borrowed(opened[backend, total], offset, size) == data_of(total)[offset : offset + size], backend


def test_the_parity_matrix_holds_every_backend() -> None:
    assert BACKENDS == get_args(source.Backend) == ("mmap", "pread", "direct")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_range_can_be_read_to_the_middle_of_a_larger_buffer(backend: str, path: Path) -> None:
    opened = opened_with(backend, path)
    first, second = opened.room(5_001), opened.room(6_003)
    assert first % ALIGNMENT == 0  # so that the range behind it can be read directly too
    buffer = Buffer(first + second)
    loans = [
        opened.borrow(3, 5_001, buffer.view[:first]),
        opened.borrow(9_999, 6_003, buffer.view[first : first + second]),
    ]
    assert ctypes.string_at(loans[0].address, 5_001) == data_of(100_003)[3:5_004]
    assert ctypes.string_at(loans[1].address, 6_003) == data_of(100_003)[9_999:16_002]
    for loan in loans:
        opened.give_back(loan)
    opened.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_says_which_backend_it_is(backend: str, path: Path) -> None:
    opened = opened_with(backend, path)
    assert opened.backend == backend
    opened.close()


def test_a_mapping_copies_nothing(path: Path) -> None:
    opened = opened_with("mmap", path)
    buffer = Buffer(opened.room(50_000))
    loan = opened.borrow(200, 50_000, buffer.view)
    assert not buffer.address <= loan.address < buffer.address + buffer.size
    assert bytes(buffer.view) == bytes(buffer.size)
    opened.give_back(loan)
    opened.close()


def test_mapped_ranges_take_no_more_than_their_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 * PAGE))
    opened = opened_with("mmap", tmp_path / "file")
    for offset, size in ((0, 1), (PAGE - 1, 2), (3 * PAGE, PAGE), (PAGE + 1, 20 * PAGE)):
        loan = opened.borrow(offset, size, memoryview(b""))
        assert loan.mapping is not None
        assert size <= len(loan.mapping) <= opened.room(size) + mmap.ALLOCATIONGRANULARITY - PAGE
        opened.give_back(loan)
    opened.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_range_reads_the_same_after_it_was_given_back(backend: str, path: Path) -> None:
    opened = opened_with(backend, path)
    for _ in range(3):
        assert borrowed(opened, 12_345, 54_321) == data_of(100_003)[12_345:66_666]
    opened.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_read_at_once(backend: str, path: Path) -> None:
    opened = opened_with(backend, path)
    data = data_of(100_003)
    buffers: list[Buffer] = []

    def read(seed: int) -> bool:
        chance = random.Random(seed)
        buffer = Buffer(opened.room(20_000))
        buffers.append(buffer)
        for _ in range(50):
            offset = chance.randrange(80_000)
            size = chance.randrange(1, 20_000)
            loan = opened.borrow(offset, size, buffer.view)
            same = ctypes.string_at(loan.address, size) == data[offset : offset + size]
            opened.give_back(loan)
            if not same:
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(8)))
    opened.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_releases_the_descriptor(backend: str, path: Path) -> None:
    opened = opened_with(backend, path)
    descriptors = descriptors_of(path)
    assert descriptors
    opened.close()
    assert not descriptors_of(path)


def descriptors_of(path: Path) -> list[int]:
    """Return the descriptors of this process that show `path`."""
    found = []
    for number in range(256):
        try:
            if os.path.samestat(os.fstat(number), path.stat()):
                found.append(number)
        except OSError:  # not open
            continue
    return found


# -- files that are not what they were -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("difference", [-1, 1, -5_000])
def test_a_file_of_another_size_is_not_opened(backend: str, difference: int, path: Path) -> None:
    with pytest.raises(InputChangedError, match="100,003 bytes now") as caught:
        open_source(str(path), 100_003 + difference, backend)
    assert caught.value.file == str(path)
    assert caught.value.remedy
    assert not descriptors_of(path)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_file_that_is_gone_counts_as_changed(backend: str, tmp_path: Path) -> None:
    with pytest.raises(InputChangedError, match="gone") as caught:
        open_source(str(tmp_path / "missing"), 10, backend)
    assert caught.value.file == str(tmp_path / "missing")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [0, 1, 904, ALIGNMENT, 5_000, 2 * ALIGNMENT, 99_999])
def test_a_file_truncated_after_it_was_opened_counts_as_changed(backend: str, left: int, path: Path) -> None:
    opened = opened_with(backend, path)
    os.truncate(path, left)
    for offset in {0, max(0, left - 10), left, 3 * ALIGNMENT}:
        with pytest.raises(InputChangedError) as caught:
            borrowed(opened, offset, 100_003 - offset)
        assert caught.value.file == str(path)
    opened.close()


@pytest.mark.parametrize("backend", ["pread", "direct"])
def test_what_a_truncated_file_still_has_is_not_mistaken_for_more(backend: str, path: Path) -> None:
    # The buffer holds the bytes of an earlier window: a read that stops short must not pass them off as this one's.
    opened = opened_with(backend, path)
    buffer = Buffer(opened.room(20_000))
    opened.borrow(0, 20_000, buffer.view)
    os.truncate(path, 50_000)
    with pytest.raises(InputChangedError):
        opened.borrow(40_000, 20_000, buffer.view)
    opened.close()


@pytest.mark.parametrize("backend", ["pread", "direct"])
def test_a_file_that_ends_early_whatever_its_size_says_counts_as_changed(
    backend: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opened_with(backend, path)
    monkeypatch.setattr(platform, "_read_some", lambda *_: 0)
    with pytest.raises(InputChangedError, match="ends before byte 30"):
        opened.borrow(10, 20, Buffer(opened.room(20)).view)
    opened.close()


# -- reads that stop short or fail ---------------------------------------------------------------------------


def stop_short(monkeypatch: pytest.MonkeyPatch, count: Callable[[int], int]) -> list[int]:
    """Let each read bring `count(wanted)` bytes at most, and return the list of offsets to come."""
    offsets: list[int] = []
    real = platform._read_some

    def some(descriptor: int, view: memoryview, offset: int, flags: int) -> int:
        offsets.append(offset)
        return min(count(len(view)), real(descriptor, view, offset, flags))

    monkeypatch.setattr(platform, "_read_some", some)
    return offsets


@pytest.mark.parametrize("most", [1, 3, 4095, 4097])
def test_positional_reads_go_on_where_one_stopped_short(most: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opened_with("pread", path)
    offsets = stop_short(monkeypatch, lambda _: most)
    size = 5 * most + 1
    assert borrowed(opened, 77, size) == data_of(100_003)[77 : 77 + size]
    assert offsets == [77 + most * number for number in range(6)]
    opened.close()


@pytest.mark.parametrize("most", [4096, 4097, 5000, 8191, 12_288, 20_001])
def test_direct_reads_that_stop_short_go_on_at_whole_blocks(
    most: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opened_with("direct", path)
    offsets = stop_short(monkeypatch, lambda _: most)
    assert borrowed(opened, 4_099, 95_904) == data_of(100_003)[4_099:100_003]
    assert offsets[0] == ALIGNMENT
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert len(offsets) > 1
    opened.close()


def test_direct_reads_that_cannot_get_on_name_a_remedy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opened_with("direct", path)
    stop_short(monkeypatch, lambda _: 100)
    with pytest.raises(CheckpointError, match="stop short") as caught:
        borrowed(opened, 0, 50_000)
    assert "pread" in (caught.value.remedy or "")
    opened.close()


def test_direct_reads_are_aligned_in_offset_length_and_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    real = platform._read_some

    def some(descriptor: int, view: memoryview, offset: int, flags: int) -> int:
        seen.append((offset, len(view), pages.address_of(view)))
        return real(descriptor, view, offset, flags)

    opened = opened_with("direct", path)
    monkeypatch.setattr(platform, "_read_some", some)
    for offset, size in ((0, 1), (1, 4096), (4095, 2), (99_999, 4), (12_345, 67_890)):
        borrowed(opened, offset, size)
    assert len(seen) == 5
    assert all(number % ALIGNMENT == 0 for call in seen for number in call)
    opened.close()


@pytest.mark.parametrize("backend", ["pread", "direct"])
def test_a_device_that_fails_is_an_error_that_says_where(
    backend: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened = opened_with(backend, path)
    monkeypatch.setattr(platform, "_read_some", fail)
    with pytest.raises(CheckpointError, match=r"at offset 8,192 .*Input/output error") as caught:
        borrowed(opened, 8_192, 100)
    assert caught.value.file == str(path)
    assert caught.value.remedy
    opened.close()


def test_a_mapping_whose_pages_cannot_be_had_is_an_error_that_says_where(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opened_with("mmap", path)
    monkeypatch.setattr(pages, "populate", lambda *_: False)
    with pytest.raises(CheckpointError, match="bytes 8,192 to 8,292 cannot be mapped") as caught:
        borrowed(opened, 8_192, 100)
    assert caught.value.file == str(path)
    assert caught.value.remedy
    opened.close()


# -- the choice of a backend ---------------------------------------------------------------------------------


def refuse_direct(monkeypatch: pytest.MonkeyPatch, code: int = errno.EINVAL) -> None:
    real = platform.open_for_reading

    def open_for_reading(path: str, *, direct: bool = False) -> int:
        if direct:
            raise OSError(code, os.strerror(code), path)
        return real(path)

    monkeypatch.setattr(platform, "open_for_reading", open_for_reading)


def chosen(path: Path) -> str:
    opened = open_source(str(path), path.stat().st_size, "auto")
    opened.close()
    return opened.backend


def test_auto_maps_what_the_page_cache_holds(path: Path) -> None:
    if pages._mincore is None:
        pytest.skip("this system does not tell what its page cache holds")
    path.read_bytes()
    assert chosen(path) == "mmap"


def test_auto_reads_directly_what_the_page_cache_does_not_hold(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_with("direct", path).close()
    monkeypatch.setattr(pages, "resident_share", lambda *_: 0.49)
    assert chosen(path) == "direct"
    assert not descriptors_of(path)


def test_auto_reads_through_the_cache_where_it_cannot_read_directly(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "resident_share", lambda *_: 0.0)
    refuse_direct(monkeypatch)
    assert chosen(path) == "pread"


def test_auto_reads_through_the_cache_where_direct_reads_are_refused_only_once_they_are_tried(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(pages, "resident_share", lambda *_: 0.0)
    monkeypatch.setattr(platform, "_read_some", refuse)
    assert chosen(path) == "pread"
    assert not descriptors_of(path)


def test_auto_does_without_a_mapping_where_there_is_no_address_space(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(source, "DirectSource", refuse)
    assert chosen(path) == "pread"
    assert not descriptors_of(path)


def test_an_empty_file_is_served_by_auto_and_pread(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for io in ("auto", "pread"):
        opened = open_source(str(tmp_path / "empty"), 0, io)
        assert borrowed(opened, 0, 0) == b""
        opened.close()


def test_an_empty_file_cannot_be_mapped_and_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty file cannot be mapped"):
        open_source(str(tmp_path / "empty"), 0, "mmap")
    assert not descriptors_of(tmp_path / "empty")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_direct_asked_for_by_name_that_cannot_serve_is_an_error_with_a_remedy(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch, code)
    with pytest.raises(CheckpointError, match=r"cannot be opened \(direct\)") as caught:
        open_source(str(path), 100_003, "direct")
    assert not isinstance(caught.value, InputChangedError)
    assert os.strerror(code) in caught.value.message
    assert "--io auto" in (caught.value.remedy or "")
    assert caught.value.file == str(path)


def test_a_mapping_asked_for_by_name_that_cannot_serve_is_an_error_with_a_remedy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be opened \(mmap\)") as caught:
        open_source(str(path), 100_003, "mmap")
    assert "--io auto" in (caught.value.remedy or "")
    assert not descriptors_of(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_a_server_has_lost_counts_as_changed(
    backend: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(_: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    opened_with(backend, path).close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        with pytest.raises(InputChangedError, match="looked at") as caught:
            open_source(str(path), 100_003, backend)
    assert caught.value.file == str(path)
    assert not descriptors_of(path)


def test_an_unknown_backend_is_a_mistake_of_the_caller(path: Path) -> None:
    with pytest.raises(ValueError, match="unknown backend 'floppy'"):
        open_source(str(path), 100_003, "floppy")


def test_pages_of_a_range_given_back_leave_the_process(tmp_path: Path) -> None:
    status = "/proc/self/smaps"
    if not os.access(status, os.R_OK):
        pytest.skip("this system does not tell which pages of a mapping a process holds")
    path = tmp_path / "large"
    path.write_bytes(bytes(200 * PAGE))
    opened = opened_with("mmap", path)
    loan = opened.borrow(50 * PAGE, 100 * PAGE, memoryview(b""))
    ctypes.string_at(loan.address, loan.size)
    assert resident_bytes(str(path)) == 100 * PAGE
    opened.give_back(loan)
    assert resident_bytes(str(path)) == 0
    opened.close()


def resident_bytes(path: str) -> int:
    """Return how many bytes of the mapping of `path` this process holds."""
    with open("/proc/self/smaps", encoding="utf-8") as file:  # noqa: PTH123
        lines = iter(file)
        for line in lines:
            if line.rstrip().endswith(path):
                return next(int(field.split()[1]) * 1024 for field in lines if field.startswith("Rss:"))
    return 0
