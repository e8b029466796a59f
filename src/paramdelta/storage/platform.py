"""What differs between Linux, macOS and Windows: positional I/O, direct I/O, cache advice, allocation, syncing.

Everything is probed (is the call there, does the filesystem take it), never looked up by system name or version.
Calls that advise return silently where the system has no such advice; calls that promise raise OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any, Final

ALIGNMENT: Final = 4096
"""Bytes. Direct I/O of every common device accepts offsets, lengths and addresses that are multiples of this."""

_RWF_DONTCACHE: Final = 0x80  # Linux 6.14; not named in Python
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY})
_MOST_PER_CALL: Final = 1 << 30  # Linux stops short of 2 GiB in one call anyway

_BLOCK_DEVICES: Final = Path("/sys/dev/block")
_VIRTUAL: Final = frozenset({"virtio", "virtual", "vbd", "xen"})
"""Parts of the names in /sys of devices that have no moving parts of their own."""

_O_BINARY: Final[int] = getattr(os, "O_BINARY", 0)
_O_CLOEXEC: Final[int] = getattr(os, "O_CLOEXEC", 0)
_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)


def _load_c_library() -> Any:
    """Return libc (its calls release the GIL, unlike mmap.madvise), or None where there is none to load."""
    if os.name != "posix":
        return None
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


c_library: Final = _load_c_library()


def c_function(name: str, *argument_types: Any) -> Any:
    """Return a function of the C library that returns an int, or None where it has none of that name."""
    function = getattr(c_library, name, None) if c_library is not None else None
    if function is not None:
        function.argtypes = argument_types
        function.restype = ctypes.c_int
    return function


_off_t: Final = ctypes.c_int64
_fallocate: Final = c_function("fallocate", ctypes.c_int, ctypes.c_int, _off_t, _off_t)
_system_call: Final = getattr(c_library, "syscall", None) if sys.platform.startswith("linux") else None
_sync_file_range: Final = c_function("sync_file_range", ctypes.c_int, _off_t, _off_t, ctypes.c_uint)


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


# --- quotas ----------------------------------------------------------------------------------------------------------


class _Quota(ctypes.Structure):
    """What Linux's quotactl fills in (struct if_dqblk): limits in KiB, use in bytes."""

    _fields_ = (
        ("hard_limit", ctypes.c_uint64),
        ("soft_limit", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("of_files", ctypes.c_uint64 * 3),
        ("grace_ends", ctypes.c_uint64 * 2),
        ("valid", ctypes.c_uint32),
    )


def spins(path: str) -> bool:
    """Return whether a file lies on a disk that is known to spin: Linux tells, but calls virtual disks so, too."""
    try:
        device = os.stat(path).st_dev  # noqa: PTH116
        return _spins(Path(os.path.realpath(_BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}")))
    except (OSError, AttributeError):
        return False


def _spins(device: Path) -> bool:
    below = list((device / "slaves").iterdir()) if (device / "slaves").is_dir() else []
    if below:  # what a volume manager, encryption or a RAID lies on
        return any(_spins(Path(os.path.realpath(each))) for each in below)
    queue = device / "queue" if (device / "queue").is_dir() else device.parent / "queue"  # a partition's is its disk's
    return (queue / "rotational").read_text().strip() == "1" and not _VIRTUAL.intersection(_words(device))


def _words(path: Path) -> set[str]:
    return {part.rstrip("0123456789-") for part in path.parts}


def quota_left(descriptor: int) -> int | None:
    """Return the bytes that quotas of this user and group leave on a file's filesystem.

    None where there is no limit, or the system does not tell. Quotas of projects need no look: filesystems count them
    in what they call free.
    """
    if _system_call is None:
        return None
    quotactl_fd, get_quota = 443, 0x800007  # Linux 5.14; the same number on every architecture that Python runs on
    left = []
    for kind, identity in enumerate((os.geteuid(), os.getegid())):
        found = _Quota()
        arguments = (ctypes.c_int(descriptor), ctypes.c_uint(get_quota << 8 | kind), ctypes.c_int(identity))
        if _system_call(ctypes.c_long(quotactl_fd), *arguments, ctypes.byref(found)) == 0 and found.hard_limit:
            left.append(max(0, found.hard_limit * 1024 - found.used))
    return min(left, default=None)
