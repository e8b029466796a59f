from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from paramdelta.storage import pages, platform
from paramdelta.storage.pages import HUGE_PAGE, PAGE, Buffer, address_of
from paramdelta.storage.platform import ALIGNMENT

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 1_000_003])
def test_a_buffer_is_aligned_for_direct_io_and_has_the_size_asked_for(size: int) -> None:
    buffer = Buffer(size)
    assert buffer.address % PAGE == 0
    assert buffer.address % ALIGNMENT == 0
    assert buffer.size == len(buffer.view) == size


@pytest.mark.parametrize("size", [HUGE_PAGE, HUGE_PAGE + 1, 5 * HUGE_PAGE - 1])
def test_a_large_buffer_is_aligned_to_huge_pages_and_all_of_it_is_there(size: int) -> None:
    buffer = Buffer(size)
    assert buffer.address % HUGE_PAGE == 0
    assert buffer.size == len(buffer.view) == size
    buffer.view[:] = b"\xff" * size
    assert ctypes.string_at(buffer.address, size) == b"\xff" * size


def test_the_view_and_the_address_are_the_same_memory() -> None:
    buffer = Buffer(10_000)
    buffer.view[9_990:] = b"0123456789"
    assert ctypes.string_at(buffer.address + 9_990, 10) == b"0123456789"
    ctypes.memmove(buffer.address, b"begin", 5)
    assert bytes(buffer.view[:5]) == b"begin"


def test_a_buffer_is_zero_at_first_and_writable_throughout() -> None:
    buffer = Buffer(8192)
    assert bytes(buffer.view) == bytes(8192)
    buffer.view[:] = b"\xff" * 8192
    assert bytes(buffer.view) == b"\xff" * 8192


def test_the_address_of_a_slice_is_as_far_from_the_start_as_the_slice() -> None:
    buffer = Buffer(8192)
    assert address_of(buffer.view[5:]) == buffer.address + 5


def test_buffers_do_not_share_memory() -> None:
    one, other = Buffer(4096), Buffer(4096)
    one.view[:] = b"x" * 4096
    assert bytes(other.view) == bytes(4096)


def test_a_buffer_of_no_bytes_has_an_address_and_an_empty_view() -> None:
    buffer = Buffer(0)
    assert len(buffer.view) == 0
    assert buffer.size == 0


def mapped_share(path: Path) -> float:
    with path.open("rb") as file:
        return pages.resident_share(file.fileno(), path.stat().st_size)


@pytest.fixture(params=["own file", "somebody else's file"])
def ownership(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """mincore lies about files of others, for which there is another way to tell."""
    if request.param != "own file":
        monkeypatch.setattr(pages, "_may_see_residency", lambda _: False)


@pytest.mark.usefixtures("ownership")
def test_a_file_just_written_and_read_is_resident(tmp_path: Path) -> None:
    if pages._mincore is None:
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
    monkeypatch.setattr(pages, "_mincore", lambda *_: -1)
    assert mapped_share(tmp_path / "file") == 0.0
    monkeypatch.setattr(pages, "_mincore", None)
    assert mapped_share(tmp_path / "file") == 0.0


def test_nothing_is_resident_of_no_bytes() -> None:
    assert pages.resident_share(0, 0) == 0.0


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, mmap.ALLOCATIONGRANULARITY + 5, 99_999])
def test_a_range_is_mapped_from_the_granularity_below_it(tmp_path: Path, offset: int) -> None:
    data = os.urandom(100_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file, pages.map_range(file.fileno(), offset, 1) as mapping:
        begin = offset % mmap.ALLOCATIONGRANULARITY
        pages.populate(address_of(mapping) + begin, 1)
        assert mapping[begin] == data[offset]
        assert len(mapping) == begin + 1


def test_a_range_that_a_file_does_not_have_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match=r"."):
        pages.map_range(file.fileno(), 5, 6)


def test_pages_behind_the_end_of_a_file_cannot_be_populated_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * pages.PAGE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        address = address_of(memoryview(mapping))
        if pages._advise_memory(address, pages.PAGE, pages._MADV_POPULATE_READ) != 0:
            pytest.skip("this system cannot populate mappings")
        assert pages.populate(address, 8 * pages.PAGE)
        os.truncate(path, pages.PAGE)
        assert pages.populate(address, pages.PAGE)
        assert not pages.populate(address, 8 * pages.PAGE)
