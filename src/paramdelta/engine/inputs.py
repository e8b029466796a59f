"""The input files of a plan, opened when first needed, closed when no later shard needs them, watched for change."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from paramdelta.engine.budget import DEVICE_WINDOW, LARGEST_WINDOW, REMOTE_WORKERS
from paramdelta.errors import CancelledError, InputChangedError, ParamDeltaError
from paramdelta.storage import platform
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote.address import is_remote
from paramdelta.storage.source import Source, open_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.plan import InputFile, Plan


class Inputs:
    """The open input files of a run. `source` may be called from several threads at once."""

    def __init__(self, files: Sequence[InputFile], io: str) -> None:
        self._files = files
        self._io = io
        self._open: dict[int, Source] = {}
        self._lock = threading.Lock()
        self._interrupted = False
        self.backends: set[str] = set()

    def source(self, place: int) -> Source:
        """Return the input file at ``place`` in the plan.

        Raises:
            InputChangedError: it is not the file that was planned with.
            CheckpointError: it cannot be opened.
        """
        source = self._open.get(place)
        if source is not None:
            return source
        with self._lock:
            if self._interrupted:
                raise CancelledError("stopped on request")
            if place not in self._open:
                check_identity(self._files[place])
                self._open[place] = _open(self._files[place], self._io)
                self.backends.add(self._open[place].backend)
            return self._open[place]

    def room(self, place: int, size: int) -> int:
        """Return how many bytes of buffer a range of ``size`` bytes of a file takes."""
        return self.source(place).room(size)

    def interrupt(self) -> None:
        """Let no worker wait for bytes any longer, nor open another file."""
        with self._lock:
            self._interrupted = True
            for source in self._open.values():
                source.interrupt()

    def close(self, places: Iterable[int] | None = None) -> None:
        """Close the files at ``places``, or all. No window that reads them may be under way."""
        with self._lock:
            for place in list(self._open) if places is None else places:
                source = self._open.pop(place, None)
                if source is not None:
                    source.close()


def _open(file: InputFile, io: str) -> Source:
    """Open an input; ``io`` says how files of this machine are read, what is elsewhere comes in one way only."""
    if is_remote(file.path):
        from paramdelta.storage.remote.source import RemoteSource

        return RemoteSource(file.path, file.identity)
    return open_source(file.path, file.identity.size, io)


def check_identity(file: InputFile) -> None:
    """Check that a file is still the one that was planned with. What is elsewhere is checked with every answer.

    Raises:
        InputChangedError: it is another file, or has another size or time of change.
    """
    if is_remote(file.path):
        return
    try:
        identity = FileIdentity.of(Path(file.path).stat())
    except OSError as error:
        raise InputChangedError(f"cannot be found any more: {error.strerror}", file=file.path) from error
    if identity != file.identity:
        changes = [
            f"{field} {getattr(file.identity, field)} → {getattr(identity, field)}"
            for field in ("dev", "ino", "size", "mtime_ns")
            if getattr(identity, field) != getattr(file.identity, field)
        ]
        raise InputChangedError(
            f"changed since the merge was planned ({', '.join(changes)})",
            file=file.path,
            remedy="Leave the inputs alone while a merge runs, then start again.",
        )


def require_backend(files: Sequence[InputFile], io: str) -> None:
    """See that every file can be opened with the backend that was asked for by name, before anything is undone.

    Raises:
        CheckpointError: one cannot.
        InputChangedError: one is not the file that was planned with.
    """
    if io != "auto":
        for file in files:
            check_identity(file)
            _open(file, io).close()


def largest_window(plan: Plan, io: str) -> int:
    """Return how large a window may be, as the first shard's inputs lie: in the page cache, or on which device."""
    files = [plan.files[place] for place in sorted(files_of(plan, plan.shards[0]))] if plan.shards else []
    for file in files:
        with contextlib.suppress(ParamDeltaError):  # whoever reads it tells what is wrong
            if is_remote(file.path):
                return LARGEST_WINDOW  # every request costs a round trip
            source = _open(file, io)
            source.close()
            if source.backend == "mmap" or platform.spins(file.path):
                return LARGEST_WINDOW
    return DEVICE_WINDOW


def usual_workers(plan: Plan) -> int | None:
    """Return how many workers suit the places where inputs lie, None where the processors decide."""
    return REMOTE_WORKERS if any(is_remote(file.path) for file in plan.files) else None


def last_uses(plan: Plan) -> list[list[int]]:
    """Return, for each output shard, the input files that no later shard reads."""
    last: dict[int, int] = {}
    for number, shard in enumerate(plan.shards):
        last.update(dict.fromkeys(files_of(plan, shard), number))
    ended: list[list[int]] = [[] for _ in plan.shards]
    for file, number in last.items():
        ended[number].append(file)
    return ended


def files_of(plan: Plan, shard: OutputShard) -> set[int]:
    """Return the places of the input files that an output shard is made from."""
    parts = (part for place in shard.operations for part in plan.operations[place].parts)
    return {file for part in parts for operand in part.operands for file in operand.files}
