"""A file that is read by byte range: mapped, by positional reads, or around the page cache, behind one protocol.

A range is *borrowed*: the loan has the address of its first byte, which lies in a mapping of the file (nothing is
copied) or in the buffer that the caller lends, and is valid until the loan is given back.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

from paramdelta.errors import CheckpointError, InputChangedError
from paramdelta.storage import platform
from paramdelta.storage.memory import Buffer
from paramdelta.storage.platform import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable

Backend = Literal["mmap", "pread", "direct"]
BACKENDS: Final[tuple[Backend, ...]] = ("mmap", "pread", "direct")
IO_CHOICES: Final = ("auto", *BACKENDS)

MOSTLY_RESIDENT: Final = 0.5
"""From this share of a file in the page cache on, mapping it beats reading it from the device."""


class Loan(NamedTuple):
    """A borrowed range: the address of its first byte, and its size in bytes."""

    address: int
    size: int


class Source(Protocol):
    """Bytes of one input file. All methods may be called from several threads at once."""

    backend: Backend

    def room(self, size: int) -> int:
        """Return how many bytes of buffer a range of ``size`` bytes takes at most."""

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:
        """Return a range of at least one byte; ``memory`` is page-aligned and has ``room(size)`` bytes.

        Raises:
            InputChangedError: the file has become shorter.
            CheckpointError: the device failed.
        """

    def give_back(self, loan: Loan) -> None:
        """Say that a borrowed range is no longer used."""

    def close(self) -> None:
        """Release the file. No range may be in use."""


def open_source(path: str, size: int, io: str = "auto") -> Source:
    """Open a file of ``size`` bytes with the backend ``io`` (``auto``, ``mmap``, ``pread`` or ``direct``).

    ``auto`` maps what the page cache mostly holds, else reads directly where the filesystem allows it, else by
    positional reads.

    Raises:
        CheckpointError: the file cannot be opened, or not with the backend that was asked for.
        InputChangedError: the file does not have ``size`` bytes.
    """
    try:
        if io != "auto":
            return _OPENERS[_known(io)](path, size)
        return _open_automatically(path, size)
    except FileNotFoundError as error:
        raise InputChangedError("the file is gone", file=path) from error
    except OSError as error:
        remedy = "Use --io auto, or pread, which works everywhere." if io != "auto" else None
        raise CheckpointError(f"cannot be opened ({io}): {error.strerror}", file=path, remedy=remedy) from error


def _known(io: str) -> Backend:
    for backend in BACKENDS:
        if io == backend:
            return backend
    raise ValueError(f"unknown backend {io!r}")


def _open_automatically(path: str, size: int) -> Source:
    with contextlib.suppress(OSError):  # no address space (RLIMIT_AS), or a filesystem that maps nothing
        mapped = MappedSource(path, size)
        try:
            resident = mapped.resident_share() >= MOSTLY_RESIDENT
        except OSError:
            resident = False
        if resident:
            return mapped
        mapped.close()
    with contextlib.suppress(OSError):
        return DirectSource(path, size)
    return PositionalSource(path, size)


class _File:
    """An open descriptor whose file has the expected size."""

    def __init__(self, path: str, size: int, *, direct: bool = False) -> None:
        self.path = path
        self.size = size
        self.descriptor = platform.open_for_reading(path, direct=direct)
        try:
            self.check_size()
        except InputChangedError:
            os.close(self.descriptor)
            raise

    def check_size(self) -> None:
        actual = os.fstat(self.descriptor).st_size
        if actual != self.size:
            raise InputChangedError(
                f"has {actual:,} bytes now and had {self.size:,} when the merge was planned",
                file=self.path,
                remedy="Leave the inputs alone while a merge runs, then start again.",
            )

    def read(self, offset: int, memory: memoryview, needed: int, flags: int = 0, grain: int = 1) -> None:
        """Read at least ``needed`` bytes at ``offset``, going on at multiples of ``grain`` where a read stops short."""
        done = 0
        while done < needed:
            try:
                count = platform.read_some(self.descriptor, memory[done:], offset + done, flags)
            except OSError as error:
                raise CheckpointError(
                    f"reading {len(memory):,} bytes at offset {offset:,} failed: {error.strerror}",
                    file=self.path,
                    remedy="Check the disk, or copy the checkpoint to another one.",
                ) from error
            if count == 0:
                self.check_size()
                raise InputChangedError(f"ends before byte {offset + needed:,}", file=self.path)
            if done + count < needed:
                count -= count % grain
                if count == 0:
                    self.check_size()
                    raise CheckpointError("direct reads stop short here", file=self.path, remedy="Use --io pread.")
            done += count


class MappedSource:
    """The file mapped into memory: no copies; best where the page cache holds the file."""

    backend: Backend = "mmap"

    def __init__(self, path: str, size: int) -> None:
        if size == 0:
            raise OSError(errno.EINVAL, "an empty file cannot be mapped", path)
        self._file = _File(path, size)
        try:
            self._map = mmap.mmap(self._file.descriptor, size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file has just become shorter
            try:
                self._file.check_size()
            finally:
                os.close(self._file.descriptor)
            raise error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error), path) from None
        self._address = platform.address_of(self._map)

    def resident_share(self) -> float:
        """Return the share of the file, 0 to 1, that the page cache holds, by a sample."""
        return platform.resident_share(self._file.descriptor, self._address, self._file.size)

    def room(self, size: int) -> int:  # noqa: ARG002
        """No buffer is needed."""
        return 0

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:  # noqa: ARG002
        """Return a range of the mapping.

        A file that shrinks later than this can still end the process with SIGBUS.
        """
        self._file.check_size()
        if not platform.populate(self._address + offset, size):
            self._file.check_size()
            raise CheckpointError(
                f"bytes {offset:,} to {offset + size:,} cannot be read",
                file=self._file.path,
                remedy="Check the disk, or copy the checkpoint to another one.",
            )
        return Loan(self._address + offset, size)

    def give_back(self, loan: Loan) -> None:
        """Unmap the pages: mapped pages count as this process's RSS.

        Their whole folios go, since they came whole; whoever still uses a part of one finds it mapped again.
        """
        offset = loan.address - self._address
        begin = offset - offset % platform.FOLIO
        end = min(-(-(offset + loan.size) // platform.FOLIO) * platform.FOLIO, self._file.size)
        platform.forget(self._address + begin, end - begin)

    def close(self) -> None:
        """Unmap and close the file."""
        self._map.close()
        os.close(self._file.descriptor)


class PositionalSource:
    """Positional reads through the page cache: works everywhere; a truncated file is an error, not a signal."""

    backend: Backend = "pread"

    def __init__(self, path: str, size: int) -> None:
        self._file = _File(path, size)
        self._flags = platform.uncached_read_flags(self._file.descriptor) if size else 0

    def room(self, size: int) -> int:
        """Return ``size``, rounded up so that the next range starts aligned."""
        return _round_up(size)

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:
        """Read the range into ``memory``."""
        self._file.read(offset, memory[:size], size, self._flags)
        if not self._flags:
            platform.drop_cached(self._file.descriptor, offset, size)
        return Loan(platform.address_of(memory), size)

    def give_back(self, loan: Loan) -> None:
        """Nothing to do: the buffer is the caller's."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._file.descriptor)


class DirectSource:
    """Reads around the page cache (O_DIRECT, F_NOCACHE): best from the device, and leaves the cache to its users."""

    backend: Backend = "direct"

    def __init__(self, path: str, size: int) -> None:
        self._file = _File(path, size, direct=True)
        try:  # some filesystems take the flag and refuse the reads
            platform.read_some(self._file.descriptor, Buffer(ALIGNMENT).view, 0)
        except OSError:
            os.close(self._file.descriptor)
            raise

    def room(self, size: int) -> int:
        """Return ``size`` and what reading whole aligned blocks adds to it."""
        return _round_up(size) + ALIGNMENT

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:
        """Read the aligned blocks that hold the range into ``memory``."""
        begin = offset - offset % ALIGNMENT
        end = _round_up(offset + size)
        self._file.read(begin, memory[: end - begin], offset + size - begin, grain=ALIGNMENT)
        return Loan(platform.address_of(memory) + offset - begin, size)

    def give_back(self, loan: Loan) -> None:
        """Nothing to do: the buffer is the caller's."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._file.descriptor)


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


_OPENERS: Final[dict[Backend, Callable[[str, int], Source]]] = {
    "mmap": MappedSource,
    "pread": PositionalSource,
    "direct": DirectSource,
}
