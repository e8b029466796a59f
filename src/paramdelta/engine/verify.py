"""A finished output against its receipt: every byte re-read, every digest, header and index checked."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import threading
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import xxhash

from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.checkpoint.discovery import STAGING
from paramdelta.checkpoint.files import open_regular, read_exactly
from paramdelta.checkpoint.header import PREFIX_BYTES, parse_header, parse_length
from paramdelta.checkpoint.unsupported import unfinished
from paramdelta.checkpoint.wording import clipped, listed, printable, quoted
from paramdelta.engine.digests import LEAF, REGION, Digest
from paramdelta.engine.progress import Progress
from paramdelta.engine.receipt import RECEIPT, listed_files, read_receipt
from paramdelta.errors import CancelledError, CheckpointError, ParamDeltaError
from paramdelta.storage.pages import Buffer
from paramdelta.storage.source import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from paramdelta.storage.source import Source

_CHUNK: Final = 1 << 20


class Failure(NamedTuple):
    """Something that is not as it should be: in which file, and where that is known.

    Attributes:
        tensors: names of those of which a part lies there.
        offset: byte of the file at which it begins, and ``size`` bytes within which it lies.
    """

    file: str
    message: str
    tensors: tuple[str, ...] = ()
    offset: int | None = None
    size: int | None = None

    def __str__(self) -> str:
        where = "" if self.offset is None else f", byte {self.offset:,}"
        where += "" if self.offset is None or self.size in {None, 1} else f" to {self.offset + (self.size or 0) - 1:,}"
        which = f" ({listed([quoted(name) for name in self.tensors])})" if self.tensors else ""
        return f"{printable(self.file)}{where}{which}: {self.message}"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a receipt says of an output's files.

    Attributes:
        small: SHA-256 in hex of each file that is no shard.
        shards: digest of each shard.
        sizes: bytes of each file.
    """

    small: dict[str, str]
    shards: dict[str, Digest]
    sizes: dict[str, int]


def read_claims(output: Path) -> Claims:
    """Return what the receipt in an output says.

    Raises:
        CheckpointError: there is none, or it was written without digests.
    """
    if not output.is_dir():
        raise CheckpointError("no such directory", file=printable(str(output)), remedy="Check the spelling.")
    receipt = read_receipt(output)
    if receipt is None and (output / STAGING).is_dir():
        raise unfinished(output)
    if receipt is None:
        raise CheckpointError(
            f"no {RECEIPT} that makes sense: not an output of paramdelta, or damaged",
            file=printable(str(output)),
            remedy="Only what paramdelta has written can be verified.",
        )
    try:
        shards = {entry["name"]: _digest_of(entry) for entry in receipt["files"] if "xxh3" in entry}
        small = {entry["name"]: str(entry["sha256"]) for entry in receipt["files"] if "xxh3" not in entry}
        if receipt["region_bytes"] != REGION or not shards:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{RECEIPT} has no digests that this version understands",
            file=printable(str(output / RECEIPT)),
            remedy="It was written by another version of paramdelta: verify with that one.",
        ) from None
    return Claims(small, shards, listed_files(receipt))


def _digest_of(entry: dict[str, Any]) -> Digest:
    regions = entry["regions"]
    return Digest(str(entry["xxh3"]), tuple(regions[at : at + 16] for at in range(0, len(regions), 16)))


def check_small_files(output: Path, claims: Claims) -> Iterator[Failure]:
    """Yield what is wrong with the files that are no shards."""
    for name, wanted in claims.small.items():
        try:
            with open_regular(output / name) as (descriptor, status):
                if status.st_size != claims.sizes[name]:
                    yield _other_size(name, status.st_size, claims.sizes[name])
                    continue
                digest = hashlib.sha256()
                while chunk := os.read(descriptor, _CHUNK):
                    digest.update(chunk)
        except CheckpointError as error:
            yield Failure(name, error.message)
        except OSError as error:
            yield Failure(name, f"cannot be read: {error.strerror}")
        else:
            if digest.hexdigest() != wanted:
                yield Failure(name, "is not what was written: its SHA-256 differs")


def _other_size(name: str, size: int, wanted: int) -> Failure:
    return Failure(name, f"has {size:,} bytes, and {wanted:,} were written")


def check_format(output: Path, claims: Claims) -> Iterator[Failure]:
    """Yield what the safetensors library, and index and headers against each other, find wrong."""
    from safetensors import SafetensorError, safe_open

    for name in claims.shards:
        try:
            with safe_open(output / name, framework="numpy") as file:
                if (file.metadata() or {}).get("format") != "pt":
                    yield Failure(name, "has no format in its metadata, which transformers wants")
        except (SafetensorError, OSError) as error:
            yield Failure(name, f"the safetensors library refuses it: {error}")
    try:
        checkpoint = open_checkpoint(output)
    except ParamDeltaError as error:
        named = () if error.tensor is None else (error.tensor,)
        yield Failure(os.path.basename(error.file or str(output)), error.message, named)  # noqa: PTH119
        return
    if checkpoint.index is not None:
        total = sum(ref.nbytes for ref in checkpoint.tensors.values())
        said = json.loads((output / checkpoint.index).read_bytes()).get("metadata", {}).get("total_size")
        if said != total:
            yield Failure(checkpoint.index, f"says that there are {said} bytes of tensors, and there are {total:,}")


def check_shards(
    output: Path,
    claims: Claims,
    workers: int,
    io: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> list[Failure]:
    """Read every shard and return which regions are not what was written.

    Raises:
        CancelledError: the check was stopped.
    """
    failures: list[Failure] = []
    sources: dict[str, Source] = {}
    try:
        for name, digest in claims.shards.items():
            flaw = _open(output, name, claims.sizes[name], digest, io, sources)
            failures += [] if flaw is None else [flaw]
        reader = _Reader(output, claims, sources)
        threads = [
            threading.Thread(target=reader.run, name=f"paramdelta-verify-{n}", daemon=True) for n in range(workers)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0 if threads[0].is_alive() else -1].join(0.2)
            if cancelled is not None and cancelled.is_set():
                reader.stop()
            if on_progress is not None:
                on_progress(reader.progress())
        for thread in threads:
            thread.join()
        if on_progress is not None:
            on_progress(reader.progress())
    finally:
        for source in sources.values():
            source.close()
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("stopped on request")
    return [*failures, *sorted(reader.failures, key=lambda each: (each.file, each.offset or 0))]


def _open(output: Path, name: str, size: int, digest: Digest, io: str, sources: dict[str, Source]) -> Failure | None:
    """Open a shard; return why it cannot be read, or is not worth reading."""
    path = output / name
    try:
        actual = path.stat().st_size
    except OSError as error:
        return Failure(name, f"cannot be found: {error.strerror}")
    if actual != size:
        return _other_size(name, actual, size)
    if len(digest.regions) != -(-size // REGION) or Digest.of([int(each, 16) for each in digest.regions]) != digest:
        return Failure(RECEIPT, f"the digests of {quoted(name)} contradict each other")
    try:
        sources[name] = open_source(str(path), size, io)
    except ParamDeltaError as error:
        return Failure(name, error.message)
    return None


class _Reader:
    """Hands regions to threads, reads and digests them, and collects what is wrong."""

    def __init__(self, output: Path, claims: Claims, sources: dict[str, Source]) -> None:
        self._output, self._claims, self._sources = output, claims, sources
        self._regions = ((name, number) for name in sources for number in range(len(claims.shards[name].regions)))
        self._lock = threading.Lock()
        self._done = 0
        self.failures: list[Failure] = []

    def progress(self) -> Progress:
        """Return how far the reading is."""
        sizes = [self._claims.sizes[name] for name in self._sources]
        complete = bisect_right(list(itertools.accumulate(sizes)), self._done)
        return Progress(self._done, sum(sizes), complete, len(sizes))

    def stop(self) -> None:
        """Hand out no more regions."""
        with self._lock:
            self._regions = (each for each in ())  # type: ignore[var-annotated]

    def run(self) -> None:
        """Read regions until there are none left."""
        memory = Buffer(max([source.room(REGION) for source in self._sources.values()], default=0) or 1)
        while True:
            with self._lock:
                region = next(self._regions, None)
            if region is None:
                return
            name, number = region
            begin = number * REGION
            size = min(REGION, self._claims.sizes[name] - begin)
            try:
                found = self._digest(self._sources[name], begin, size, memory)
            except ParamDeltaError as error:
                failure: Failure | None = self._failure(name, begin, size, error.message)
            else:
                same = found == int(self._claims.shards[name].regions[number], 16)
                message = "somewhere here something is not as it was written"
                failure = None if same else self._failure(name, begin, size, message)
            with self._lock:
                self._done += size
                self.failures += [] if failure is None else [failure]

    def _digest(self, source: Source, begin: int, size: int, memory: Buffer) -> int:
        loan = source.borrow(begin, size, memory.view)
        try:
            data = memoryview((ctypes.c_char * size).from_address(loan.address)).cast("B")
            leaves = range(0, size, LEAF)
            return sum(xxhash.xxh3_64_intdigest(data[at : at + LEAF], (begin + at) // LEAF) for at in leaves) % 2**64
        finally:
            del data
            source.give_back(loan)

    def _failure(self, name: str, begin: int, size: int, message: str) -> Failure:
        return Failure(name, message, tensors_at(self._output / name, begin, begin + size), begin, size)


def tensors_at(path: Path, begin: int, end: int) -> tuple[str, ...]:
    """Return which tensors of a shard lie in a range of bytes, none where that cannot be told."""
    try:
        with open_regular(path) as (descriptor, status):
            prefix = read_exactly(descriptor, PREFIX_BYTES, str(path))
            raw = read_exactly(descriptor, parse_length(prefix, status.st_size, str(path)), str(path))
        header = parse_header(raw, status.st_size, str(path))
    except (ParamDeltaError, OSError):
        return ()
    first = header.data_offset
    return tuple(clipped(n) for n, (_, _, a, b) in header.tensors.items() if first + a < end and first + b > begin)


def summed_up(failures: Sequence[Failure]) -> str:
    """Return the first failures, a line each, and how many more there are."""
    shown = 20
    lines = [f"  {failure}" for failure in failures[:shown]]
    return "\n".join([*lines, *([f"  and {len(failures) - shown:,} more"] if len(failures) > shown else [])])
