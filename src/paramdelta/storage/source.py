"""A file that is read by byte range: mapped, by positional reads, or around the page cache, behind one protocol.

A range is *borrowed*: the loan has the address of its first byte, which lies in a mapping of that range (nothing is
copied) or in the buffer that the caller lends, and is valid until the loan is given back.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

from paramdelta.errors import CheckpointError, InputChangedError
from paramdelta.storage import pages, platform
from paramdelta.storage.pages import PAGE, Buffer
from paramdelta.storage.platform import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable

Backend = Literal["mmap", "pread", "direct"]
BACKENDS: Final[tuple[Backend, ...]] = ("mmap", "pread", "direct")
IO_CHOICES: Final = ("auto", *BACKENDS)

MOSTLY_RESIDENT: Final = 0.5
"""From this share of a file in the page cache on, mapping it beats reading it from the device."""


class Loan(NamedTuple):
    """A borrowed range: the address of its first byte, its size in bytes, and the mapping that holds it, if any."""

    address: int
    size: int
    mapping: mmap.mmap | None = None


class Source(Protocol):
    """Bytes of one input file. All methods may be called from several threads at once."""

    @property
    def backend(self) -> str:
        """How it is read: a `Backend`, or ``remote``."""

    def room(self, size: int) -> int:
        """Return how many bytes of memory a range of ``size`` bytes takes at most while it is on loan."""

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:
        """Return a range of at least one byte; ``memory`` is 4096-aligned and has ``room(size)`` bytes.

        Raises:
            InputChangedError: the file has become shorter.
            CheckpointError: the device failed.
        """

    def await_range(self, loan: Loan) -> None:
        """Wait until a borrowed range is there; several may be borrowed before the first is waited for.

        Raises as `borrow`.
        """

    def give_back(self, loan: Loan) -> None:
        """Say that a borrowed range is no longer used."""

    def interrupt(self) -> None:
        """Let nobody wait for ranges any longer: the run is ending."""

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
    with contextlib.suppress(OSError):  # a filesystem that maps nothing, or no address space at all
        mapped = MappedSource(path, size)
        if mapped.resident_share() >= MOSTLY_RESIDENT:
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
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.descriptor)

    def check_size(self) -> None:
        try:
            actual = os.fstat(self.descriptor).st_size
        except OSError as error:  # a network filesystem whose server has lost the file
            raise InputChangedError(f"cannot be looked at any more: {error.strerror}", file=self.path) from error
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


class _AtOnce:
    """What borrows ranges that are there at once."""

    def await_range(self, loan: Loan) -> None:
        """Nothing to wait for."""

    def interrupt(self) -> None:
        """Nobody waits."""


class MappedSource(_AtOnce):
    """Ranges of the file mapped into memory while they are on loan: no copies; best where the page cache holds it.

    A mapping of a range, not of the whole file: what this process holds is then exactly what is on loan, on every
    system, and address space is never short.
    """

    backend: Backend = "mmap"

    def __init__(self, path: str, size: int) -> None:
        if size == 0:
            raise OSError(errno.EINVAL, "an empty file cannot be mapped", path)
        self._file = _File(path, size)
        try:
            pages.map_range(self._file.descriptor, 0, 1).close()
        except OSError as error:
            try:
                self._file.check_size()  # it may have become empty
            finally:
                self.close()
            raise error from None

    def resident_share(self) -> float:
        """Return the share of the file, 0 to 1, that the page cache holds, by a sample."""
        return pages.resident_share(self._file.descriptor, self._file.size)

    def room(self, size: int) -> int:
        """Return the bytes of the pages that hold the range: not of the lent buffer, but as much of the budget."""
        return _round_up(size, PAGE) + PAGE

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:  # noqa: ARG002
        """Map the range.

        A file that shrinks later than this can still end the process with SIGBUS.
        """
        self._file.check_size()
        mapping = self._map(offset, size)
        address = pages.address_of(mapping) + offset % mmap.ALLOCATIONGRANULARITY
        if not pages.populate(address, size):
            mapping.close()
            self._file.check_size()
            raise self._unreadable(offset, size, "the device failed")
        return Loan(address, size, mapping)

    def _map(self, offset: int, size: int) -> mmap.mmap:
        try:
            return pages.map_range(self._file.descriptor, offset, size)
        except OSError as error:
            self._file.check_size()
            raise self._unreadable(offset, size, error.strerror) from error

    def _unreadable(self, offset: int, size: int, reason: str | None) -> CheckpointError:
        return CheckpointError(
            f"bytes {offset:,} to {offset + size:,} cannot be mapped: {reason}",
            file=self._file.path,
            remedy="Use --io pread, check the disk, or copy the checkpoint to another one.",
        )

    def give_back(self, loan: Loan) -> None:
        """Unmap the range: mapped pages count as this process's RSS."""
        if loan.mapping is not None:
            loan.mapping.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class PositionalSource(_AtOnce):
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
        return Loan(pages.address_of(memory), size)

    def give_back(self, loan: Loan) -> None:
        """Nothing to do: the buffer is the caller's."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DirectSource(_AtOnce):
    """Reads around the page cache (O_DIRECT, F_NOCACHE): best from the device, and leaves the cache to its users."""

    backend: Backend = "direct"

    def __init__(self, path: str, size: int) -> None:
        self._file = _File(path, size, direct=True)
        try:  # some filesystems take the flag and refuse the reads
            platform.read_some(self._file.descriptor, Buffer(ALIGNMENT).view, 0)
        except OSError:
            self._file.close()
            raise

    def room(self, size: int) -> int:
        """Return ``size`` and what reading whole aligned blocks adds to it."""
        return _round_up(size) + ALIGNMENT

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:
        """Read the aligned blocks that hold the range into ``memory``."""
        begin = offset - offset % ALIGNMENT
        end = _round_up(offset + size)
        self._file.read(begin, memory[: end - begin], offset + size - begin, grain=ALIGNMENT)
        return Loan(pages.address_of(memory) + offset - begin, size)

    def give_back(self, loan: Loan) -> None:
        """Nothing to do: the buffer is the caller's."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _round_up(size: int, block: int = ALIGNMENT) -> int:
    return -(-size // block) * block


_OPENERS: Final[dict[str, Callable[[str, int], Source]]] = {
    "mmap": MappedSource,
    "pread": PositionalSource,
    "direct": DirectSource,
}
