"""What differs between Linux, macOS and Windows: positional I/O, direct I/O, cache advice, allocation, syncing.

Everything is probed (is the call there, does the filesystem take it), never looked up by system name or version.
Calls that advise return silently where the system has no such advice; calls that promise raise OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path
from typing import Any, Final

PAGE: Final = mmap.PAGESIZE
ALIGNMENT: Final = 4096
"""Bytes. Direct I/O of every common device accepts offsets, lengths and addresses that are multiples of this."""

_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_READ: Final = 22  # Linux 5.14; not named in Python 3.11
_RWF_DONTCACHE: Final = 0x80  # Linux 6.14; not named in Python
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY})
_EHWPOISON: Final[int] = getattr(errno, "EHWPOISON", 133)

HUGE_PAGE: Final = 2 << 20
"""Bytes. What most systems call one, or a multiple or part of that: memory aligned to it can be made of them."""

_MOST_PER_CALL: Final = 1 << 30  # Linux stops short of 2 GiB in one call anyway

_O_BINARY: Final[int] = getattr(os, "O_BINARY", 0)
_O_CLOEXEC: Final[int] = getattr(os, "O_CLOEXEC", 0)
_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)


def _c_library() -> Any:
    """Return libc (its calls release the GIL, unlike mmap.madvise), or None where there is none to load."""
    if os.name != "posix":
        return None
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


_libc: Final = _c_library()


def _c_function(name: str, *argument_types: Any) -> Any:
    function = getattr(_libc, name, None) if _libc is not None else None
    if function is not None:
        function.argtypes = argument_types
        function.restype = ctypes.c_int
    return function


_off_t: Final = ctypes.c_int64
_fallocate: Final = _c_function("fallocate", ctypes.c_int, ctypes.c_int, _off_t, _off_t)
_sync_file_range: Final = _c_function("sync_file_range", ctypes.c_int, _off_t, _off_t, ctypes.c_uint)
_madvise: Final = _c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore: Final = _c_function("mincore", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def _last_error(path: str = "") -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), path or None)


# --- opening ---------------------------------------------------------------------------------------------------------


def open_for_reading(path: str, *, direct: bool = False) -> int:
    """Open a file to read; with ``direct`` around the page cache.

    Raises:
        OSError: the file cannot be opened, or not directly (ENOTSUP where the system has no direct I/O).
    """
    return _open(path, os.O_RDONLY, direct=direct)


def open_for_writing(path: str, *, direct: bool = False) -> int:
    """Create a new file to write; with ``direct`` around the page cache. Raises OSError as `open_for_reading`."""
    return _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, direct=direct)


def _open(path: str, flags: int, *, direct: bool) -> int:
    flags |= _O_BINARY | _O_CLOEXEC
    if not direct:
        return os.open(path, flags, 0o666)
    if _O_DIRECT:
        return os.open(path, flags | _O_DIRECT, 0o666)
    no_cache = _fcntl_constant("F_NOCACHE")
    if no_cache is None:
        raise OSError(errno.ENOTSUP, "this system has no direct I/O that paramdelta knows", path)
    descriptor = os.open(path, flags, 0o666)
    try:
        _fcntl(descriptor, no_cache, 1)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _fcntl_constant(name: str, unnamed: int | None = None) -> int | None:
    """Return the constant, or ``unnamed`` where the system has it and Python's fcntl does not name it."""
    try:
        import fcntl
    except ImportError:
        return None
    return getattr(fcntl, name, unnamed)


def _fcntl(descriptor: int, command: int, argument: Any) -> Any:
    import fcntl

    return fcntl.fcntl(descriptor, command, argument)


def raise_open_file_limit() -> None:
    """Lift the soft limit of open files to the hard one: a 671B triple has 489 input shards, macOS starts at 256."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- positional reads and writes -------------------------------------------------------------------------------------


def read_some(descriptor: int, view: memoryview, offset: int, flags: int = 0) -> int:
    """Read up to ``len(view)`` bytes at ``offset`` into ``view``; return how many came, 0 at the end of the file."""
    return _read_some(descriptor, view[:_MOST_PER_CALL], offset, flags)


def write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of ``view`` at ``offset``, however often the system stops short. Raises OSError."""
    while len(view):
        written = _write_some(descriptor, view[:_MOST_PER_CALL], offset)
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        view, offset = view[written:], offset + written


if hasattr(os, "preadv") and hasattr(os, "pwrite"):

    def _read_some(descriptor: int, view: memoryview, offset: int, flags: int) -> int:
        return os.preadv(descriptor, [view], offset, flags)

    def _write_some(descriptor: int, view: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, view, offset)

else:  # Windows: ReadFile and WriteFile take the position in an OVERLAPPED, so that threads need no common cursor

    class _Overlapped(ctypes.Structure):
        _fields_ = (
            ("internal", ctypes.c_void_p),
            ("internal_high", ctypes.c_void_p),
            ("offset_low", ctypes.c_uint32),
            ("offset_high", ctypes.c_uint32),
            ("event", ctypes.c_void_p),
        )

    def _transfer(function: str, descriptor: int, view: memoryview, offset: int) -> int:
        import msvcrt

        handle = msvcrt.get_osfhandle(descriptor)  # type: ignore[attr-defined]
        call = getattr(ctypes.WinDLL("kernel32", use_last_error=True), function)  # type: ignore[attr-defined]
        place = _Overlapped(offset_low=offset & 0xFFFFFFFF, offset_high=offset >> 32)
        moved = ctypes.c_uint32(0)
        memory = (ctypes.c_char * len(view)).from_buffer(view)
        ok = call(ctypes.c_void_p(handle), memory, len(view), ctypes.byref(moved), ctypes.byref(place))
        code = ctypes.get_last_error()  # type: ignore[attr-defined]
        end_of_file = 38
        if not ok and code != end_of_file:
            raise ctypes.WinError(code)  # type: ignore[attr-defined]
        return moved.value

    def _read_some(descriptor: int, view: memoryview, offset: int, flags: int) -> int:  # noqa: ARG001
        return _transfer("ReadFile", descriptor, view, offset)

    def _write_some(descriptor: int, view: memoryview, offset: int) -> int:
        return _transfer("WriteFile", descriptor, view, offset)


def uncached_read_flags(descriptor: int) -> int:
    """Return the flag that makes reads drop the pages that they alone brought into the cache, or 0 if not taken."""
    if not hasattr(os, "preadv") or not sys.platform.startswith("linux"):
        return 0
    try:
        os.preadv(descriptor, [bytearray(1)], 0, _RWF_DONTCACHE)
    except OSError:
        return 0
    return _RWF_DONTCACHE


# --- memory ----------------------------------------------------------------------------------------------------------


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
                resident += _read_some(descriptor, memoryview(bytearray(1)), step * pages // samples * PAGE, flag)
    except OSError:
        return 0.0
    finally:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
    return resident / samples


def restore_floats() -> None:
    """Give this thread the floating-point environment that programs start with, where the C library can do so."""
    call = getattr(_libc, "fesetenv", None) if _libc is not None else None
    if call is None:
        return
    try:
        default = ctypes.addressof(ctypes.c_byte.in_dll(_libc, "_FE_DFL_ENV"))  # macOS
    except ValueError:
        default = -1  # glibc and musl
    call(ctypes.c_void_p(default))


def address_of(memory: memoryview | mmap.mmap) -> int:
    """Return the address of a buffer's first byte. The caller keeps the buffer alive while the address is in use."""
    import numpy as np  # planning imports this module and must start without numpy

    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


def peak_rss() -> int:
    """Return the most bytes of RAM this process has held at once, as the system reports it (VmHWM).

    ``ru_maxrss`` is a last resort: on Linux a child's starts from its parent's.
    """
    with (
        contextlib.suppress(OSError),
        Path("/proc/self/status").open(encoding="ascii", errors="replace") as status,
    ):
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    peak_on_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if peak_on_windows is not None:
        return int(peak_on_windows)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- cache, allocation, durability -----------------------------------------------------------------------------------


def drop_cached(descriptor: int, offset: int, size: int) -> None:
    """Let the page cache go of a clean range of a file. Advice."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Begin to write a dirty range to the device, without waiting. Not durability. Raises as `finish_writeback`."""
    _write_back(descriptor, offset, size, 2)  # SYNC_FILE_RANGE_WRITE


def finish_writeback(descriptor: int, offset: int, size: int) -> None:
    """Wait until a dirty range has left for the device, then drop it from the cache. Not durability.

    Raises:
        OSError: the device failed. The system reports that once: a later sync may well succeed.
    """
    _write_back(descriptor, offset, size, 7)  # WAIT_BEFORE | WRITE | WAIT_AFTER
    if _sync_file_range is not None:
        drop_cached(descriptor, offset, size)


def _write_back(descriptor: int, offset: int, size: int, flags: int) -> None:
    while _sync_file_range is not None and _sync_file_range(descriptor, offset, size, flags) != 0:
        error = _last_error()
        if error.errno in _UNSUPPORTED or error.errno == errno.ESPIPE:
            return
        if error.errno != errno.EINTR:
            raise error


def preallocate(descriptor: int, size: int) -> bool:
    """Reserve ``size`` bytes on the device and set the file's size to it.

    Returns False where the filesystem cannot reserve: the file then has its size but space is not promised.
    The raw call is used, since the C library's emulation would write every block.

    Raises:
        OSError: the device is full (ENOSPC, EDQUOT) or the file would be too large (EFBIG).
    """
    if size == 0:
        return True
    if _fallocate is not None:
        while _fallocate(descriptor, 0, 0, size) != 0:
            error = _last_error()
            if error.errno == errno.EINTR:
                continue
            if error.errno not in _UNSUPPORTED:
                raise error
            break
        else:
            return True
    command = _fcntl_constant("F_PREALLOCATE", 42 if sys.platform == "darwin" else None)
    reserved = False
    if command is not None:
        import struct

        allocate_all, from_the_end = 4, 3
        missing = max(0, size - 512 * os.fstat(descriptor).st_blocks)
        request = struct.pack("=IiqqQ", allocate_all, from_the_end, 0, missing, 0)
        try:
            _fcntl(descriptor, command, request)
            reserved = True
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(descriptor, size)
    return reserved


def sync_file(descriptor: int) -> None:
    """Bring a file's bytes and size to stable storage. A failure is final: the file must be written again."""
    full_sync = _fcntl_constant("F_FULLFSYNC")
    if full_sync is not None:
        try:
            _fcntl(descriptor, full_sync, 0)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to stable storage, where directories can be synced at all."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EISDIR, errno.EINVAL}:  # Windows cannot open directories
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
