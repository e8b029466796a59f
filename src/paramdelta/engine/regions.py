"""Shards read again region by region, by several threads, and held against their digests."""

from __future__ import annotations

import ctypes
import itertools
import threading
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash

from paramdelta.checkpoint.files import open_regular, read_exactly
from paramdelta.checkpoint.header import PREFIX_BYTES, parse_header, parse_length
from paramdelta.checkpoint.wording import clipped, quoted
from paramdelta.engine.digests import LEAF, REGION, Digest
from paramdelta.engine.failure import Failure
from paramdelta.engine.progress import Progress
from paramdelta.engine.receipt import RECEIPT
from paramdelta.errors import BudgetError, CancelledError, ParamDeltaError, VerificationError
from paramdelta.storage.pages import Buffer
from paramdelta.storage.process import lacks_memory, start_thread
from paramdelta.storage.source import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from paramdelta.engine.claims import Claims
    from paramdelta.storage.source import Source

_MOST_PER_FILE: Final = 20
_POLL_SECONDS: Final = 0.2
_DIFFERS: Final = "somewhere here something is not as it was written"


class Reread(NamedTuple):
    """What is wrong with shards, and how many bytes of them were read to know it."""

    failures: list[Failure]
    bytes_read: int


def check_shards(
    output: Path,
    claims: Claims,
    workers: int,
    io: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> Reread:
    """Read every shard and return which regions are not what was written.

    Raises:
        BudgetError: the threads could not be started.
        CancelledError: the check was stopped.
        VerificationError: not everything was read, for whatever reason.
    """
    reader = _Reader(output, claims)
    threads: list[threading.Thread] = []
    try:
        failures = list(reader.open(io))
        _start(threads, reader, workers)
        while running := [thread for thread in threads if thread.is_alive()]:
            running[0].join(_POLL_SECONDS)
            if cancelled is not None and cancelled.is_set():
                reader.stop()
            if on_progress is not None:
                on_progress(reader.progress())
    finally:
        reader.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        reader.close()
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("stopped on request")
    reader.require_end()
    if on_progress is not None:
        on_progress(reader.progress())
    return Reread([*failures, *reader.failures()], reader.bytes_read)


def _start(threads: list[threading.Thread], reader: _Reader, workers: int) -> None:
    """Start threads, each added to ``threads`` before it runs: none is ever forgotten.

    None gets a region before all are there: what it took of the memory could be what another one needs to begin.
    """
    wanted = min(workers, reader.regions)
    try:
        with reader.lock:
            for number in range(wanted):
                name = f"paramdelta-verify-{number}"
                threads.append(threading.Thread(target=reader.run, args=(Buffer(reader.room),), name=name, daemon=True))
                start_thread(threads[-1])
    except (OSError, RuntimeError, MemoryError) as error:  # no address space, or no more threads
        raise BudgetError(
            f"only {number} of {wanted} threads could be started: {error}",
            remedy="Use fewer --workers, or raise the limits of this process (ulimit -v, ulimit -u).",
        ) from error


class _Reader:
    """Hands regions to threads, reads and digests them, and collects what is wrong. Held, the lock stops all that."""

    def __init__(self, output: Path, claims: Claims) -> None:
        self._output, self._claims = output, claims
        self._sources: dict[str, Source] = {}
        self._regions: Iterator[tuple[str, int]] = iter(())
        self.lock = threading.Lock()
        self._done = 0  # bytes that need no further look, whether they could be read or not
        self._counts: Counter[str] = Counter()
        self._flaws: dict[str, list[tuple[int, str]]] = defaultdict(list)  # the first ones of each file
        self._error: BaseException | None = None
        self.regions = 0
        self.room = 1
        self.bytes_read = 0

    def open(self, io: str) -> Iterator[Failure]:
        """Open the shards; yield why some cannot be read, or are not worth reading."""
        for name, digest in self._claims.shards.items():
            if Digest.of([int(each, 16) for each in digest.regions]) != digest:
                yield Failure(RECEIPT, f"the digests of {quoted(name)} contradict each other")
                continue
            try:
                self._sources[name] = open_source(str(self._output / name), self._claims.sizes[name], io)
            except ParamDeltaError as error:
                if lacks_memory(error):
                    raise
                yield Failure(name, error.message)
        counts = {name: len(self._claims.shards[name].regions) for name in self._sources}
        self._regions = ((name, number) for name, count in counts.items() for number in range(count))
        self.regions = sum(counts.values())
        self.room = max([1, *(source.room(REGION) for source in self._sources.values())])

    def close(self) -> None:
        """Close the shards. No thread may be reading."""
        for source in self._sources.values():
            source.close()

    def progress(self) -> Progress:
        """Return how far the reading is."""
        sizes = self._sizes()
        complete = bisect_right(list(itertools.accumulate(sizes)), self._done)
        return Progress(self._done, sum(sizes), complete, len(sizes))

    def _sizes(self) -> list[int]:
        return [self._claims.sizes[name] for name in self._sources]

    def stop(self) -> None:
        """Hand out no more regions."""
        with self.lock:
            self._regions = iter(())

    def run(self, memory: Buffer) -> None:
        """Read regions until there are none left. Whatever goes wrong, the calling thread raises it."""
        try:
            while (region := self._next()) is not None:
                self._check(*region, memory)
        except BaseException as error:
            self._error = error
            self.stop()

    def _next(self) -> tuple[str, int] | None:
        with self.lock:
            return next(self._regions, None)

    def require_end(self) -> None:
        """Raise what ended a thread; see that nothing was left out."""
        if self._error is not None:
            raise self._error
        if self._done != sum(self._sizes()):
            raise VerificationError(
                f"only {self._done:,} of {sum(self._sizes()):,} bytes were read", file=str(self._output)
            )

    def _check(self, name: str, number: int, memory: Buffer) -> None:
        begin, size = self._extent(name, number)
        try:
            found = self._digest(self._sources[name], begin, size, memory)
        except ParamDeltaError as error:
            if lacks_memory(error):
                raise
            flaw, count = error.message, 0
        else:
            flaw, count = "" if found == int(self._claims.shards[name].regions[number], 16) else _DIFFERS, size
        with self.lock:
            self._done += size
            self.bytes_read += count
            if flaw:
                self._counts[name] += 1
                insort(self._flaws[name], (number, flaw))
                del self._flaws[name][_MOST_PER_FILE:]

    def _extent(self, name: str, number: int) -> tuple[int, int]:
        """Return where a region begins, and its size."""
        begin = number * REGION
        return begin, min(REGION, self._claims.sizes[name] - begin)

    def _digest(self, source: Source, begin: int, size: int, memory: Buffer) -> int:
        loan = source.borrow(begin, size, memory.view)
        try:
            return _digest_at(loan.address, begin, size)
        finally:
            source.give_back(loan)

    def failures(self) -> list[Failure]:
        """Return the first regions of each file that are not what they should be, and how many more there are."""
        found = []
        for name, flaws in sorted(self._flaws.items()):
            tensors = TensorExtents.of(self._output / name)
            for number, flaw in flaws:
                begin, size = self._extent(name, number)
                found.append(Failure(name, flaw, tensors.between(begin, begin + size), begin, size))
            more = self._counts[name] - len(flaws)
            found += [Failure(name, f"and {more:,} more regions like these")] if more else []
        return found


def _digest_at(address: int, begin: int, size: int) -> int:
    """Return the digest of a region that lies in memory; no reference to it is left behind."""
    data = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    leaves = range(0, size, LEAF)
    return sum(xxhash.xxh3_64_intdigest(data[at : at + LEAF], (begin + at) // LEAF) for at in leaves) % 2**64


class TensorExtents(NamedTuple):
    """Where the tensors of a shard begin and end in its file, in that order."""

    names: list[str]
    begins: list[int]
    ends: list[int]

    @classmethod
    def of(cls, path: Path) -> TensorExtents:
        """Return those of a shard, none where its header does not tell."""
        try:
            with open_regular(path) as (descriptor, status):
                prefix = read_exactly(descriptor, PREFIX_BYTES, str(path))
                raw = read_exactly(descriptor, parse_length(prefix, status.st_size, str(path)), str(path))
            header = parse_header(raw, status.st_size, str(path))
        except (ParamDeltaError, OSError):
            return cls([], [], [])
        first, entries = header.data_offset, header.tensors.values()
        return cls(list(header.tensors), [first + each.begin for each in entries], [first + e.end for e in entries])

    def between(self, begin: int, end: int) -> tuple[str, ...]:
        """Return which tensors have bytes in a range of the file."""
        return tuple(map(clipped, self.names[bisect_right(self.ends, begin) : bisect_left(self.begins, end)]))
