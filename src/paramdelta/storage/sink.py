"""A shard being written: aligned windows in any order, by any thread, into a file of known size."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Protocol

from paramdelta.errors import OutputError
from paramdelta.storage import platform
from paramdelta.storage.pages import Buffer

if TYPE_CHECKING:
    from pathlib import Path


class Sink(Protocol):
    """One output file of known size. `write` may be called from several threads at once."""

    def write(self, offset: int, window: memoryview) -> None:
        """Write a window.

        Offset, address and length are multiples of `platform.ALIGNMENT`; what reaches beyond the file's size is
        padding, and does not last.
        """

    def finish(self) -> None:
        """Bring everything to stable storage and close."""

    def abandon(self) -> None:
        """Close without any promise."""


class FileSink:
    """A local file: space reserved for real, written directly where the filesystem allows it.

    Elsewhere writes go through the page cache, whose dirty pages are sent to the device window by window, so that
    they neither pile up nor push other files out. Methods raise OutputError where the system refuses.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._behind: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._written = 0
        try:
            self._descriptor, self.direct = _create(path, size)
        except OSError as error:
            raise output_refused(error, path, size) from error

    def write(self, offset: int, window: memoryview) -> None:
        """Write one window."""
        inside = min(len(window), self._size - offset)
        try:
            if self.direct:
                platform.write_all(self._descriptor, window, offset)
            else:
                platform.write_all(self._descriptor, window[:inside], offset)
                self._push_out(offset, inside)
        except OSError as error:
            raise output_refused(error, self._path, self._size) from error
        with self._lock:
            self._written += inside

    def _push_out(self, offset: int, size: int) -> None:
        """Start this window on its way to the device, and wait for an earlier one."""
        platform.start_writeback(self._descriptor, offset, size)
        with self._lock:
            self._behind.append((offset, size))
            earlier = self._behind.pop(0) if len(self._behind) > 1 else None
        if earlier is not None:
            platform.finish_writeback(self._descriptor, *earlier)

    def finish(self) -> None:
        """Check the byte count, cut the padding of the last window, sync, close."""
        if self._written != self._size:
            self.abandon()
            raise OutputError(f"{self._written:,} of {self._size:,} bytes were written", file=str(self._path))
        try:
            try:
                if self.direct:
                    os.ftruncate(self._descriptor, self._size)
                platform.sync_file(self._descriptor)
            finally:
                os.close(self._descriptor)
            size = self._path.stat().st_size
        except OSError as error:
            raise output_refused(error, self._path, self._size) from error
        if size != self._size:
            raise OutputError("does not have the size that was written", file=str(self._path))

    def abandon(self) -> None:
        """Close the file as it is."""
        os.close(self._descriptor)


def _create(path: Path, size: int) -> tuple[int, bool]:
    """Create and reserve a file; return its descriptor and whether it is written directly."""
    descriptor, direct = _open(path)
    try:
        platform.preallocate(descriptor, size)
    except OSError:
        os.close(descriptor)
        path.unlink()
        raise
    return descriptor, direct


def _open(path: Path) -> tuple[int, bool]:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    try:
        descriptor = platform.open_for_writing(str(path), direct=True)
    except OSError:  # no direct I/O on this filesystem: some create the file before they say so
        path.unlink(missing_ok=True)
        return platform.open_for_writing(str(path)), False
    try:  # some filesystems take the flag and refuse the writes
        platform.write_all(descriptor, Buffer(platform.ALIGNMENT).view, 0)
    except OSError as error:
        os.close(descriptor)
        path.unlink()
        if error.errno != errno.EINVAL:
            raise
        return platform.open_for_writing(str(path)), False
    return descriptor, True


def output_refused(error: OSError, path: Path, size: int | None = None) -> OutputError:
    """Return the OutputError that explains why the system refused to write ``path``."""
    remedy = {
        errno.ENOSPC: "Free some space, or choose an output on another disk.",
        errno.EDQUOT: "Your disk quota is used up: free some space, or choose an output elsewhere.",
        errno.EFBIG: "This filesystem does not take files that large: use a smaller --shard-size.",
        errno.EACCES: "Choose an output where you may write.",
        errno.EPERM: "Choose an output where you may write.",
        errno.EROFS: "The filesystem is read-only: choose an output elsewhere.",
    }.get(error.errno or 0)
    wanted = f" ({size:,} bytes)" if size is not None else ""
    return OutputError(f"cannot be written{wanted}: {error.strerror}", file=str(path), remedy=remedy)
