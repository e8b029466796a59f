"""The running process: its limits, its floating-point environment, the memory that it has held."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from paramdelta.storage.pages import allocate
from paramdelta.storage.platform import c_library

if TYPE_CHECKING:
    import threading

_USUAL_STACK: Final = 8 << 20
_FIRST_STEPS: Final = 1 << 20


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


def lacks_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that the system gives this process no more memory."""
    while error is not None:
        refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
        unmapped = type(error) is ImportError and "failed to map segment" in str(error)  # what the C library says of it
        if isinstance(error, MemoryError) or refused or unmapped:
            return True
        error = error.__cause__
    return False


def start_thread(thread: threading.Thread) -> None:
    """Start a thread if there is room for its stack and first steps: one that dies of those is waited for for ever.

    Raises:
        OSError: there is no such room.
        RuntimeError: the system gives no more threads.
    """
    allocate(_stack_size() + _FIRST_STEPS)
    thread.start()


def _stack_size() -> int:
    try:
        import resource
    except ImportError:
        return _USUAL_STACK
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _USUAL_STACK if soft == resource.RLIM_INFINITY else soft


def restore_floats() -> None:
    """Give this thread the floating-point environment that programs start with, where the C library can do so."""
    call = getattr(c_library, "fesetenv", None) if c_library is not None else None
    if call is None:
        return
    try:
        default = ctypes.addressof(ctypes.c_byte.in_dll(c_library, "_FE_DFL_ENV"))  # macOS
    except ValueError:
        default = -1  # glibc and musl
    call(ctypes.c_void_p(default))


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
