"""What a disk may hold after a power cut, from what a merge wrote, synced and renamed."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    from tests.faults.steps import Step

_open, _pwrite = os.open, os.pwrite


class Disk:
    """What was synced, and any part of what was not.

    Files are numbered like inodes. A file's bytes are safe up to its last sync, a directory's entries up to its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.safe: dict[int, bytes] = {}
        self.pending: dict[int, list[tuple[str, int, bytes]]] = {}
        self.entries: dict[Path, int | None] = {}  # None: a directory
        self.changes: list[tuple[Path, Path | None, int | None]] = []  # gone, come, what; not yet synced
        self._next = 0
        for path in (root, *root.rglob("*")) if root.exists() else ():
            self.entries[path] = None if path.is_dir() else self._new(path.read_bytes())
        self._now = dict(self.entries)
        self._open: dict[int, int | Path] = {}

    def _new(self, content: bytes = b"") -> int:
        self._next += 1
        self.safe[self._next], self.pending[self._next] = content, []
        return self._next

    def opened(self, path: Path, descriptor: int) -> None:
        """Take note of a file that was created or opened, or of a directory."""
        if path.is_dir():
            self._open[descriptor] = path
            return
        if self._now.get(path) is None:
            self._change(path, path, self._new())
        number = self._now[path]
        assert number is not None
        self._open[descriptor] = number

    def _change(self, gone: Path, come: Path | None, what: int | None) -> None:
        self._now.pop(gone, None)
        if come is not None:
            self._now[come] = what
        self.changes.append((gone, come, what))

    def made(self, path: Path) -> None:
        """Take note of a new directory."""
        self._change(path, path, None)

    def removed(self, path: Path) -> None:
        """Take note of a file or directory that was removed."""
        self._change(path, None, None)

    def renamed(self, old: Path, new: Path) -> None:
        """Take note of a rename."""
        self._change(old, new, self._now.get(old))

    def changed(self, descriptor: int, what: str, place: int, data: bytes) -> None:
        """Take note of a write, or of a new size."""
        number = self._open.get(descriptor)
        if isinstance(number, int):
            self.pending[number].append((what, place, data))

    def synced(self, descriptor: int) -> None:
        """Take note of a sync, of a file or of a directory."""
        what = self._open.get(descriptor)
        if isinstance(what, Path):
            kept = []
            for change in self.changes:
                places = {path.parent for path in change[:2] if path is not None}
                if what in places:
                    _enter(self.entries, change)
                else:
                    kept.append(change)
            self.changes = kept
        elif what is not None:
            self.safe[what] = _written(self.safe[what], self.pending[what])
            self.pending[what] = []

    def after_a_cut(self, order: random.Random, share: float) -> dict[Path, bytes | None]:
        """Return files and directories: all that is safe, and of each other change a share."""
        entries = dict(self.entries)
        for change in self.changes:
            if order.random() < share:
                _enter(entries, change)
        found: dict[Path, bytes | None] = {}
        for path, number in entries.items():
            parents = set(path.parents)
            if not all(parent in entries for parent in parents if self.root in (parent, *parent.parents)):
                continue
            if number is None:
                found[path] = None
            else:
                lucky = [write for write in self.pending[number] if order.random() < share]
                found[path] = _written(self.safe[number], lucky)
        return found


def _enter(entries: dict[Path, int | None], change: tuple[Path, Path | None, int | None]) -> None:
    gone, come, what = change
    entries.pop(gone, None)
    if come is not None:
        entries[come] = what


def _written(content: bytes, writes: Iterable[tuple[str, int, bytes]]) -> bytes:
    raw = bytearray(content)
    for what, place, data in writes:
        if what == "size":
            raw = raw[:place] + bytes(max(0, place - len(raw)))
        else:
            raw += bytes(max(0, place + len(data) - len(raw)))
            raw[place : place + len(data)] = data
    return bytes(raw)


class Recorder:
    """Records on a `Disk` what a merge does, and looks at what a power cut would leave after each step.

    A write is on the record once it has returned, a sync from when it is asked for: so no write counts as synced that
    another thread was still making.
    """

    def __init__(self, output: Path, look: Callable[[int, Disk], None]) -> None:
        self.disk = Disk(output)
        self._look = look
        self._lock = threading.Lock()

    def __call__(self, step: Step) -> Any:
        """Make the call and return what it returned, or None to let it be made."""
        written = _pwrite(*step.arguments) if step.call == "pwrite" else None
        with self._lock:
            self._look(step.number, self.disk)
            return self._record(step, written)

    def _record(self, step: Step, written: int | None) -> int | None:
        arguments = step.arguments
        if step.call == "open":
            descriptor = _open(*arguments)
            self.disk.opened(Path(arguments[0]), descriptor)
            return descriptor
        if step.call in {"mkdir", "unlink", "rmdir"}:
            (self.disk.made if step.call == "mkdir" else self.disk.removed)(Path(arguments[0]))
        elif step.call == "replace":
            self.disk.renamed(Path(arguments[0]), Path(arguments[1]))
        elif written is not None:
            self.disk.changed(arguments[0], "data", arguments[2], bytes(arguments[1][:written]))
        elif step.call == "ftruncate":
            self.disk.changed(arguments[0], "size", arguments[1], b"")
        elif step.call == "fallocate":
            self.disk.changed(arguments[0], "size", arguments[3], b"")
        elif step.call == "fsync":
            path = Path(f"/proc/self/fd/{arguments[0]}").readlink()
            if path.is_dir():
                self.disk.opened(path, arguments[0])
            self.disk.synced(arguments[0])
        return written
