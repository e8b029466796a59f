"""A finished output against its receipt: every file of the kind, size and content that was written, and no others."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint import strict_json
from paramdelta.checkpoint.checkpoint import MAX_INDEX_BYTES, open_checkpoint
from paramdelta.checkpoint.files import open_regular, read_whole, unreadable
from paramdelta.checkpoint.wording import clipped, printable
from paramdelta.engine.claims import read_claims
from paramdelta.engine.failure import Failure
from paramdelta.engine.receipt import RECEIPT
from paramdelta.engine.regions import check_shards
from paramdelta.errors import BudgetError, CheckpointError, ParamDeltaError
from paramdelta.storage.process import lacks_memory

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from paramdelta.checkpoint.checkpoint import Checkpoint
    from paramdelta.engine.claims import Claims
    from paramdelta.engine.progress import Progress

_CHUNK: Final = 1 << 20


class Checked(NamedTuple):
    """What came of reading an output again.

    Attributes:
        shards: number of files with tensors that the receipt lists.
        bytes_read: bytes of the output's files that were read for digests.
        strangers: names of files beside them that the receipt does not list.
    """

    failures: list[Failure]
    shards: int = 0
    bytes_read: int = 0
    strangers: tuple[str, ...] = ()


def check(
    output: Path,
    workers: int,
    io: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> Checked:
    """Read an output again and hold it against its receipt.

    Raises:
        CheckpointError: there is no receipt, or the system does not let the output be read.
        BudgetError: there is not enough memory, or there are not enough threads.
        CancelledError: the check was stopped.
    """
    with _refusals(output):
        claims, failures = read_claims(output)
        if not claims.sizes:
            return Checked(failures)
        missing = {name: flaw for name, size in claims.sizes.items() if (flaw := _flaw_of(output / name, size))}
        failures += [Failure(name, flaw) for name, flaw in missing.items()]
        there = claims.without(missing)
        small = _check_small_files(output, there)
        failures += [*small.failures, *_check_format(output, claims, there)]
        shards = check_shards(output, there, workers, io, on_progress, cancelled)
        failures += shards.failures
        read = small.bytes_read + shards.bytes_read
        return Checked(failures, len(claims.shards), read, _strangers(output, claims))


@contextlib.contextmanager
def _refusals(output: Path) -> Iterator[None]:
    """Turn what the system refuses into a typed error."""
    try:
        yield
    except BudgetError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise BudgetError(
                "there is not enough memory to read the output again",
                file=printable(str(output)),
                remedy="Use fewer --workers, or raise the limits of this process (ulimit -v).",
            ) from error
        if isinstance(error, OSError):
            raise unreadable(printable(str(output)), error) from error
        raise


def _flaw_of(path: Path, size: int) -> str | None:
    """Return why a file is not worth reading. Nothing else opens one before: a FIFO would be waited for."""
    try:
        with open_regular(path) as (_, status):
            found = status.st_size
    except CheckpointError as error:
        return error.message
    return None if found == size else f"has {found:,} bytes, and {size:,} were written"


class _Read(NamedTuple):
    failures: list[Failure]
    bytes_read: int


def _check_small_files(output: Path, claims: Claims) -> _Read:
    """Read the files that are no shards, and return what is wrong with them."""
    failures, read = [], 0
    for name, wanted in claims.small.items():
        digest = hashlib.sha256()
        try:
            with open_regular(output / name) as (descriptor, _):
                while chunk := os.read(descriptor, _CHUNK):
                    digest.update(chunk)
                    read += len(chunk)
        except CheckpointError as error:
            failures.append(Failure(name, error.message))
        except OSError as error:
            failures.append(Failure(name, f"cannot be read: {error.strerror}"))
        else:
            if digest.hexdigest() != wanted:
                failures.append(Failure(name, "is not what was written: its SHA-256 differs"))
    return _Read(failures, read)


def _check_format(output: Path, claims: Claims, there: Claims) -> Iterator[Failure]:
    """Yield what the safetensors library, and receipt, index and headers against each other, find wrong."""
    for name in there.shards:
        flaw = _refused_by_library(output / name)
        if flaw is not None:
            yield Failure(name, flaw)
    try:
        checkpoint = open_checkpoint(output)
        yield from _unlisted(checkpoint, claims)
        if checkpoint.index is not None:
            yield from _wrong_total(output / checkpoint.index, checkpoint)
    except ParamDeltaError as error:
        yield Failure.of(error, output)


def _refused_by_library(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            known = (file.metadata() or {}).get("format") == "pt"
    except (SafetensorError, OSError) as error:
        return f"the safetensors library refuses it: {printable(clipped(str(error)))}"
    return None if known else "has no format in its metadata, which transformers wants"


def _unlisted(checkpoint: Checkpoint, claims: Claims) -> Iterator[Failure]:
    """Yield what is loaded and not listed by the receipt, and what is listed and not loaded."""
    if checkpoint.index is not None and checkpoint.index not in claims.small:
        yield Failure(checkpoint.index, f"says what is loaded, and {RECEIPT} does not list it")
    loaded = {shard.name for shard in checkpoint.shards}
    for name in sorted(loaded - claims.shards.keys()):
        yield Failure(name, f"has tensors that are loaded, and {RECEIPT} does not list it as such")
    for name in sorted(claims.shards.keys() - loaded):
        yield Failure(name, f"is listed by {RECEIPT}, and none of its tensors is loaded")


def _wrong_total(index: Path, checkpoint: Checkpoint) -> Iterator[Failure]:
    total = sum(ref.nbytes for ref in checkpoint.tensors.values())
    metadata = strict_json.parse(read_whole(index, MAX_INDEX_BYTES)).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said != total:
        shown = printable(clipped(str(said))) if isinstance(said, (int, float, str)) else "no number of"
        yield Failure(index.name, f"says that there are {shown} bytes of tensors, and there are {total:,}")


def _strangers(output: Path, claims: Claims) -> tuple[str, ...]:
    """Return the names of files that the receipt does not list; hidden ones do not count, nor do directories."""
    try:
        files = [entry.name for entry in output.iterdir() if not entry.name.startswith(".") and not entry.is_dir()]
    except OSError:  # opening the checkpoint has failed of that, too
        return ()
    return tuple(sorted(set(files) - claims.sizes.keys() - {RECEIPT}))
