"""The output directory: locked, staged in ``.paramdelta/``, published index last, or left as it was found.

If the index (or the single model file) exists under its final name, everything that it names is complete and synced.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import filelock

from paramdelta.errors import OutputError
from paramdelta.planning.layout import INDEX_FILE, SINGLE_FILE
from paramdelta.planning.units import format_size
from paramdelta.storage import platform
from paramdelta.storage.sink import FileSink, output_refused

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.plan import Plan

STAGING: Final = ".paramdelta"
RECEIPT: Final = "paramdelta.json"


class OutputDirectory:
    """OUT while a run writes it. As a context manager it holds the lock, and cleans up unless `publish` was reached.

    Raises:
        OutputError: OUT exists and may not be replaced, is an input, is locked by another run, or cannot be written.
    """

    def __init__(self, path: Path, plan: Plan, *, overwrite: bool) -> None:
        self.path = path
        self._plan = plan
        self._overwrite = overwrite
        self._staging = path / STAGING
        self._created: list[Path] = []
        self._lock = filelock.FileLock(self._staging / "lock", timeout=0)

    def __enter__(self) -> Self:
        refuse_inputs(self.path, self._plan)
        self._refuse_strangers()
        self._refuse_full_disk()
        try:
            self._created = _make_directories(self._staging)
            self._acquire()
            for leftover in self._staging.iterdir():
                if leftover.name != "lock":
                    leftover.unlink()
            if self._overwrite:
                self._remove_old()
        except OSError as error:
            self._clean_up()
            raise output_refused(error, self.path) from error
        except OutputError:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._clean_up()

    def create(self, shard: OutputShard) -> FileSink:
        """Return the sink of a shard, in the staging directory."""
        return FileSink(self._staging / shard.name, shard.size)

    def completed(self, _shard: OutputShard, /) -> None:
        """Make the entry of a finished shard durable."""
        platform.sync_directory(self._staging)

    def publish(self, receipt: dict[str, Any]) -> None:
        """Give everything its final name, the index last.

        Raises:
            OutputError: the system refuses; the index is then not in place.
        """
        index = self._plan.layout.index
        small = {RECEIPT: f"{json.dumps(receipt, indent=2)}\n".encode()}
        if index is not None:
            small[INDEX_FILE] = index
        names = [car.name for car in self._plan.sidecars]
        names += [RECEIPT, *(shard.name for shard in self._plan.shards)]
        if index is not None:
            names.append(INDEX_FILE)
        try:
            for car in self._plan.sidecars:
                _write_durably(self._staging / car.name, car.source.read_bytes())
            for name, content in small.items():
                _write_durably(self._staging / name, content)
            platform.sync_directory(self._staging)
            self._rename(names[:-1])
            self._rename(names[-1:])
        except OSError as error:
            for name in reversed(names):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            raise output_refused(error, self.path) from error
        self._created = []

    def _rename(self, names: list[str]) -> None:
        for name in names:
            (self._staging / name).replace(self.path / name)
        platform.sync_directory(self.path)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise OutputError(
                "another run is writing this output",
                file=str(self.path),
                remedy="Wait until it has ended, or choose another output.",
            ) from None

    def _refuse_strangers(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise OutputError("exists and is not a directory", file=str(self.path), remedy="Choose another output.")
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name != STAGING)
        if not others:
            return
        receipt = read_receipt(self.path)
        if receipt is None:
            raise OutputError(
                f"exists, is not empty, and was not written by paramdelta: {', '.join(others[:5])}",
                file=str(self.path),
                remedy="Choose another output, or empty this directory yourself.",
            )
        if not self._overwrite:
            raise OutputError(
                "holds the output of another merge",
                file=str(self.path),
                remedy="Use --overwrite to replace it, or choose another output.",
            )

    def _refuse_full_disk(self) -> None:
        wanted, free = sum(shard.size for shard in self._plan.shards), free_space(self.path)
        if self._overwrite:
            free += sum(size for _, size in _files_of(read_receipt(self.path) or {}))
        if free < wanted:
            raise OutputError(
                f"the output takes {format_size(wanted)} and the disk has {format_size(free)} free",
                file=str(self.path),
                remedy="Free some space, or choose an output on another disk.",
            )

    def _remove_old(self) -> None:
        """Remove what the old receipt lists, and nothing else; what makes the old output loadable goes first."""
        receipt = read_receipt(self.path)
        if receipt is None:
            return
        names = [name for name, _ in _files_of(receipt)]
        for name in (INDEX_FILE, SINGLE_FILE):
            if name in names:
                (self.path / name).unlink(missing_ok=True)
        platform.sync_directory(self.path)
        for name in [*names, RECEIPT]:
            (self.path / name).unlink(missing_ok=True)
        platform.sync_directory(self.path)

    def _clean_up(self) -> None:
        """Remove the staging directory, if it is this run's, and the directories that it created and left empty."""
        if self._lock.is_locked:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._lock.release()
            with contextlib.suppress(OSError):  # Windows removes no open file: its lock goes with the release
                self._staging.rmdir()
            with contextlib.suppress(OSError):
                platform.sync_directory(self.path)
        for directory in reversed(self._created):
            with contextlib.suppress(OSError):
                directory.rmdir()


def read_receipt(path: Path) -> dict[str, Any] | None:
    """Return the receipt of a finished output, or None where there is none that can be read."""
    try:
        receipt = json.loads((path / RECEIPT).read_bytes())
    except (OSError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) and "fingerprint" in receipt else None


def is_complete(path: Path, plan: Plan) -> bool:
    """Return whether ``path`` already holds the output of exactly this plan."""
    receipt = read_receipt(path)
    if receipt is None or receipt["fingerprint"] != plan.fingerprint:
        return False
    if plan.layout.index is not None and not (path / INDEX_FILE).is_file():
        return False
    return all(
        (path / shard.name).is_file() and (path / shard.name).stat().st_size == shard.size for shard in plan.shards
    )


def refuse_inputs(path: Path, plan: Plan) -> None:
    """Raise OutputError where the output would be, or lie inside, an input."""
    resolved = path.resolve()
    for source in plan.inputs:
        root = Path(source.path).resolve()
        if resolved == root or root in resolved.parents:
            raise OutputError(
                f"lies in an input, {source.role} ({source.path}): inputs are never written",
                file=str(path),
                remedy="Choose another output.",
            )


def free_space(path: Path) -> int:
    """Return the bytes that an ordinary user can still write where ``path`` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _files_of(receipt: dict[str, Any]) -> list[tuple[str, int]]:
    """Return name and size of every file that a receipt lists; names that are no plain file names are left out."""
    entries = receipt.get("files", [])
    return [(e["name"], e["bytes"]) for e in entries if Path(e["name"]).name == e["name"]]


def _make_directories(path: Path) -> list[Path]:
    """Create ``path`` and its parents; return those that did not exist, outermost first."""
    missing = [directory for directory in [*reversed(path.parents), path] if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        platform.sync_directory(directory.parent)
    return missing


def _write_durably(path: Path, content: bytes) -> None:
    descriptor = platform.open_for_writing(str(path))
    try:
        platform.write_all(descriptor, memoryview(content), 0)
        platform.sync_file(descriptor)
    finally:
        os.close(descriptor)
