"""What may happen at a step: death, an error, less than was asked for."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tests.faults.steps import READING, WRITING, Step

if TYPE_CHECKING:
    from collections.abc import Callable

_pwrite, _read, _preadv = os.pwrite, os.read, os.preadv
_GARBAGE: Final = b"\xaa"


class Fault(NamedTuple):
    """The calls that something may happen to, and what, and what happens at later steps.

    Each returns what the call returns instead, or None to let it be; ``later`` is also told how many steps later.
    """

    calls: tuple[tuple[Any, str], ...]
    happen: Callable[[Step], Any]
    later: Callable[[Step, int], Any] = lambda _step, _steps_later: None


def die(_step: Step) -> None:
    """Kill the process before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_halfway(step: Step) -> None:
    """Write the first half, then kill the process."""
    if step.call == "pwrite":
        descriptor, data, offset = step.arguments
        half = len(data) // 2 // 4096 * 4096 or (len(data) // 2 if len(data) < 4096 else 0)
        if half:
            _pwrite(descriptor, data[:half], offset)
    die(step)


def fail_with(code: int) -> Callable[[Step], Any]:
    """Let the call fail."""

    def fail(step: Step) -> Any:
        if step.call in {"fallocate", "sync_file_range"}:
            ctypes.set_errno(code)
            return -1
        raise OSError(code, os.strerror(code))

    return fail


def die_after(steps: int) -> Callable[[Step, int], Any]:
    """Kill the process so many steps later."""
    return lambda step, later: die(step) if later == steps else None


def for_good(code: int) -> Callable[[Step, int], Any]:
    """Let all later calls fail, too."""
    fail = fail_with(code)
    return lambda step, _: fail(step)


def write_less(step: Step) -> Any:
    """Write less than was asked for: a block, or a byte."""
    if step.call != "pwrite":
        return None
    descriptor, data, offset = step.arguments
    return _pwrite(descriptor, data[: 4096 if len(data) > 4096 else 1], offset) if len(data) > 1 else None


def read_less(step: Step) -> Any:
    """Read less than was asked for: a block, or a byte. What else is in the buffer is garbage."""
    if step.call == "read":
        descriptor, size = step.arguments
        return _read(descriptor, 4096 if size > 4096 else 1)
    descriptor, (view, *_), offset, flags = step.arguments
    count = _preadv(descriptor, [view], offset, flags)  # whole: direct reads take no odd sizes
    less = min(count, 4096 if len(view) > 4096 else 1)
    view[less:] = _GARBAGE * (len(view) - less)
    return less


def end_early(step: Step) -> Any:
    """Say that the file ends here."""
    return b"" if step.call == "read" else 0


FAULTS: Final = {
    "killed": Fault(WRITING, die),
    "killed in a write": Fault(WRITING, die_halfway),
    "EIO": Fault(WRITING, fail_with(errno.EIO)),
    "ENOSPC": Fault(WRITING, fail_with(errno.ENOSPC)),
    "EIO, then read-only": Fault(WRITING, fail_with(errno.EIO), for_good(errno.EROFS)),
    **{f"EIO, killed {n} later": Fault(WRITING, fail_with(errno.EIO), die_after(n)) for n in (1, 2, 3, 5, 8)},
    "short write": Fault(WRITING, write_less),
    "EIO in a read": Fault(READING, fail_with(errno.EIO)),
    "short read": Fault(READING, read_less),
    "file ends in a read": Fault(READING, end_early),
}
