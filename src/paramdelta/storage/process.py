"""The running process: its limits, its floating-point environment, the memory that it has held."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

from paramdelta.storage.platform import c_library


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
