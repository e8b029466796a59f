"""Memory in pages: fresh, or mapped from a file; and which pages of a file the system holds already."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from typing import Final

from paramdelta.storage.platform import c_function, read_some

PAGE: Final = mmap.PAGESIZE
HUGE_PAGE: Final = 2 << 20
"""Bytes. What most systems call one, or a multiple or part of that: memory aligned to it can be made of them."""

_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_READ: Final = 22  # Linux 5.14; not named in Python 3.11
_EHWPOISON: Final[int] = getattr(errno, "EHWPOISON", 133)

_madvise: Final = c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore: Final = c_function("mincore", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Buffer:
    """``size`` bytes of page-aligned memory, allocated once and used again for every window.

    First touches of fresh pages are slow, so a worker holds on to its buffers for the whole run.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.view = allocate(size)
        self.address = address_of(self.view)


def allocate(size: int) -> memoryview:
    """Return ``size`` bytes of fresh, page-aligned, writable memory that no file backs.

    In huge pages where the system has them, but for the rest behind the last whole one: a device moves a range of
    scattered small pages in requests of a megabyte or less (virtio takes 254 pieces), which costs speed.
    """
    memory = _anonymous(size + HUGE_PAGE if size >= HUGE_PAGE else max(size, PAGE))
    begin = -address_of(memory) % HUGE_PAGE if size >= HUGE_PAGE else 0
    view = memoryview(memory)[begin : begin + size]
    if size >= HUGE_PAGE:
        _advise_memory(address_of(view), size - size % HUGE_PAGE, _MADV_HUGEPAGE)
    return view


def _anonymous(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


def populate(address: int, size: int) -> bool:
    """Map the pages of a file mapping in one call rather than one fault each.

    Returns False where a page cannot be had, since the file has become shorter or the device failed: touching it
    would end the process. True says nothing where the system has no such call.
    """
    return _advise_memory(address, size, _MADV_POPULATE_READ) not in {errno.EFAULT, _EHWPOISON}


def _advise_memory(address: int, size: int, advice: int) -> int:
    """Return 0, or the error number of a refusal."""
    begin = address - address % PAGE
    if _madvise is None or _madvise(begin, address + size - begin, advice) == 0:
        return 0
    return ctypes.get_errno()


def map_range(descriptor: int, offset: int, size: int) -> mmap.mmap:
    """Map bytes of a file to read, from the allocation granularity below ``offset`` on.

    Raises:
        OSError: the filesystem maps nothing, there is no address space, or the file has become shorter.
    """
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        return mmap.mmap(descriptor, offset + size - begin, access=mmap.ACCESS_READ, offset=begin)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None


def resident_share(descriptor: int, size: int, samples: int = 64) -> float:
    """Estimate which share (0 to 1) of a file lies in the page cache, from evenly spread samples.

    Returns 0.0 where the system does not tell.
    """
    pages = -(-size // PAGE)
    if pages == 0:
        return 0.0
    if not _may_see_residency(descriptor):
        return _share_read_without_waiting(descriptor, pages, samples)
    if _mincore is None:
        return 0.0
    run = 16
    seen = resident = 0
    for step in range(samples):
        first = step * pages // samples
        count = min(run, pages - first)
        try:
            mapping = map_range(descriptor, first * PAGE, min(count * PAGE, size - first * PAGE))
        except OSError:
            return 0.0
        with mapping:
            vector = ctypes.create_string_buffer(run)
            begin = address_of(mapping) + first * PAGE % mmap.ALLOCATIONGRANULARITY
            if _mincore(begin, count * PAGE, ctypes.addressof(vector)) != 0:
                return 0.0
        seen += count
        resident += sum(byte & 1 for byte in vector.raw[:count])
    return resident / seen


def _may_see_residency(descriptor: int) -> bool:
    """Return whether mincore tells the truth: of a file that is neither owned nor writable it calls all resident."""
    if not hasattr(os, "geteuid"):
        return False
    owner = os.fstat(descriptor).st_uid
    return os.geteuid() in {0, owner}


def _share_read_without_waiting(descriptor: int, pages: int, samples: int) -> float:
    """Return the share of sampled pages that can be read at once; 0.0 where the system always waits."""
    flag = getattr(os, "RWF_NOWAIT", 0)
    if not flag:
        return 0.0
    resident = 0
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or each sample would start a read-ahead
    try:
        for step in range(samples):
            with contextlib.suppress(BlockingIOError):
                resident += read_some(descriptor, memoryview(bytearray(1)), step * pages // samples * PAGE, flag)
    except OSError:
        return 0.0
    finally:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
    return resident / samples


class _View(ctypes.Structure):
    """Python's own description of a buffer (Py_buffer), as far as anybody needs it here; the rest is room."""

    _fields_ = (("address", ctypes.c_void_p), ("rest", ctypes.c_byte * 128))


_get_buffer: Final = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_View), ctypes.c_int)
_release_buffer: Final = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_View),)
_release_buffer.restype = None


def address_of(memory: memoryview | mmap.mmap) -> int:
    """Return the address of a buffer's first byte. The caller keeps the buffer alive while the address is in use."""
    view = _View()  # not through numpy, which takes longer to import than the first windows to read
    _get_buffer(memory, ctypes.byref(view), 0)
    try:
        return int(view.address)
    finally:
        _release_buffer(ctypes.byref(view))
