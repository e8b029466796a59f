from __future__ import annotations

import ctypes

import pytest

from paramdelta.storage.memory import Buffer
from paramdelta.storage.platform import ALIGNMENT, HUGE_PAGE, PAGE, address_of


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
