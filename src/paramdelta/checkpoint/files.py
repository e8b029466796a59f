"""Reading the small files, and the first bytes of the large ones; never anything but regular files."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from paramdelta.checkpoint.wording import printable
from paramdelta.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# O_NONBLOCK: should a FIFO take the file's place between stat and open, open returns and fstat tells.
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open the regular file `path`, or a symlink to one, for reading; yield its descriptor and its status.

    Raises CheckpointError where there is no such file, it is not a regular file, or it cannot be read.
    """
    file = printable(str(path))
    try:
        _require_regular(path.stat(), file)
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    try:
        status = os.fstat(descriptor)
        _require_regular(status, file)
        yield descriptor, status
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, count: int, file: str) -> bytes:
    """Return the next `count` bytes of `descriptor`; raise CheckpointError where the file ends before."""
    pieces = []
    missing = count
    while missing:
        try:
            piece = os.read(descriptor, missing)
        except OSError as error:
            raise unreadable(file, error) from error
        if not piece:
            raise CheckpointError(
                f"the file ended {missing} bytes early", file=file, remedy="Is something still writing it?"
            )
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def read_whole(path: Path, limit: int) -> bytes:
    """Return all bytes of `path`; raise CheckpointError where there are more than `limit`."""
    file = printable(str(path))
    with open_regular(path) as (descriptor, status):
        if status.st_size > limit:
            raise CheckpointError(
                f"{status.st_size} bytes is more than such a file can honestly have (limit: {limit})",
                file=file,
            )
        return read_exactly(descriptor, status.st_size, file)


def is_there(path: Path) -> bool:
    """Return whether there is a file or directory `path`; raise CheckpointError where the system will not tell."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(printable(str(path)), error) from error
    return True


def unreadable(file: str, error: OSError | ValueError) -> CheckpointError:
    """Return the CheckpointError that says why the system would not read `file`."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError("no such file or directory", file=file, remedy="Is it a broken link?")
    reason = getattr(error, "strerror", None) or str(error)
    denied = isinstance(error, PermissionError)
    remedy = "Let your user read it, or copy it to where you can." if denied else None
    return CheckpointError(f"cannot be read: {reason}", file=file, remedy=remedy)


def _require_regular(status: os.stat_result, file: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("not a regular file", file=file)
