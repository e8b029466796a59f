"""``OUT/.paramdelta``: all that a run keeps before it publishes: lock, journal, shards. Finished shards outlive it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from typing import TYPE_CHECKING, Final

import filelock

from paramdelta.checkpoint.discovery import STAGING
from paramdelta.checkpoint.files import read_whole
from paramdelta.checkpoint.wording import listed, printable
from paramdelta.engine.journal import FRESH_JOURNAL, JOURNAL, RECORD, JournalWriter, read_journal
from paramdelta.engine.shard_locks import SUFFIX, refuse_running
from paramdelta.errors import CheckpointError, OutputError
from paramdelta.planning.identity import differences, digest_of, identity_of
from paramdelta.storage import platform

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from paramdelta.engine.progress import FinishedShard
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.plan import Plan

SHARED_RECIPE: Final = "shared.yaml"
"""What is merged, where several runs make the shards: who publishes reads it."""

_LOCK: Final = "lock"
_HOLDER: Final = "holder.json"
PROBE: Final = "probe"
"""A file that is created to see what the filesystem takes, and removed at once."""

_KEPT: Final = frozenset({_LOCK, _HOLDER, JOURNAL, SHARED_RECIPE})
_BEFORE_THE_JOURNAL: Final = frozenset({_LOCK, _HOLDER, FRESH_JOURNAL, PROBE, SHARED_RECIPE})
_MOST_LINES: Final = 20
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class Staging:
    """The staging directory of an output, while this process holds its lock.

    Attributes:
        path: the directory.
        finished: shards that are done, by name: those of earlier runs, and those that this one has added.
    """

    def __init__(self, output: Path, plan: Plan) -> None:
        self.path = output / STAGING
        self.finished: dict[str, FinishedShard] = {}
        self._output = output
        self._plan = plan
        self._lock = filelock.FileLock(self.path / _LOCK, timeout=0)
        self._journal: JournalWriter | None = None
        self._is_ours = False  # until then what lies there is another merge's
        self._goes_on = False  # whether there is a journal of this very merge

    @property
    def is_locked(self) -> bool:
        """Whether this process holds the lock."""
        return bool(self._lock.is_locked)

    def acquire(self, *, created: bool, patience: float = 0) -> None:
        """Take the lock, and say who holds it.

        Args:
            created: whether this run has made the directory, and may remove it.
            patience: seconds to wait for the lock.

        Raises:
            OutputError: another run holds the lock, or the filesystem has none.
        """
        try:
            self._lock.acquire(timeout=patience)
            locked = not isinstance(self._lock, filelock.SoftFileLock)  # what some versions fall back to
        except filelock.Timeout:
            raise OutputError(
                f"another run is writing this output{self._holder()}",
                file=str(self._output),
                remedy="Wait until it has ended, or choose another output.",
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            locked = False
        if not locked:
            self._refuse_lockless(created=created)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # good to know, and not needed
            self._write_holder(json.dumps(holder).encode())

    def _write_holder(self, content: bytes) -> None:
        """Write it as a new file: what somebody put in its place, a link or a pipe, is removed, not written to."""
        path = self.path / _HOLDER
        path.unlink(missing_ok=True)
        descriptor = platform.open_for_writing(str(path))
        try:
            platform.write_all(descriptor, memoryview(bytearray(content)), 0)
        finally:
            os.close(descriptor)

    def _holder(self) -> str:
        try:
            holder = json.loads(read_whole(self.path / _HOLDER, 4096))
            return f": process {holder['pid']:d} on {printable(holder['host'])}, since {printable(holder['since'])}"
        except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return ""

    def _refuse_lockless(self, *, created: bool) -> None:
        with contextlib.suppress(OSError):
            self._lock.release(force=True)
        if created:
            with contextlib.suppress(OSError):
                (self.path / _LOCK).unlink()
        raise OutputError(
            "this filesystem has no locks",
            file=str(self._output),
            remedy="Choose an output on another filesystem, and copy it here when it is done.",
        )

    def _finished_before(self, published: Iterable[str]) -> dict[str, FinishedShard]:
        """Return the shards that an earlier run of this very merge has finished.

        Raises:
            OutputError: the earlier run was of another merge; lists what differs.
        """
        journal = read_journal(self.path, self._plan)
        self._goes_on = journal is not None
        if journal is None:
            return {}
        identity = identity_of(self._plan)
        if digest_of(journal.identity) != digest_of(identity):
            raise self._another_merge(differences(journal.identity, identity))
        sizes = {shard.name: shard.size for shard in self._plan.shards}
        staged = (entry.name for entry in self.path.iterdir())
        places = {**dict.fromkeys(published, self._output), **dict.fromkeys(staged, self.path)}
        return {
            name: finished
            for name, finished in journal.shards.items()
            if name in places and _has_size(places[name] / name, sizes[name])
        }

    def take_stock(self, *, overwrite: bool, published: Iterable[str] = ()) -> None:
        """See which shards an earlier run of this very merge has finished. Removes nothing and needs no lock.

        Args:
            overwrite: start anew, whatever is there.
            published: names that are in place already, of a run that died while it published.

        Raises:
            OutputError: the earlier run was of another merge, and what differs is listed; or what lies there is not of
                any run.
        """
        self._refuse_strangers()
        self._goes_on = False
        self.finished = {} if overwrite else self._finished_before(published)

    def _refuse_strangers(self) -> None:
        """Refuse to clear a directory that no run has left: a run writes its journal before anything of size."""
        if os.path.lexists(self.path / JOURNAL):
            return
        locks = {f"{shard.name}{SUFFIX}" for shard in self._plan.shards}
        strangers = sorted({entry.name for entry in self.path.iterdir()} - _BEFORE_THE_JOURNAL - locks)
        if strangers:
            raise OutputError(
                f"holds files in {STAGING} that paramdelta did not write: {printable(listed(strangers))}",
                file=str(self._output),
                remedy="Move them elsewhere, or choose another output.",
            )

    def leftovers(self) -> list[Path]:
        """Return the files that `begin` removes: those of earlier runs that are no finished shards."""
        return [entry for entry in self.path.iterdir() if entry.name not in {*_KEPT, *self.finished}]

    def _another_merge(self, differing: list[str]) -> OutputError:
        lines = [f"  {line}" for line in differing[:_MOST_LINES]]
        if len(differing) > _MOST_LINES:
            lines.append(f"  and {len(differing) - _MOST_LINES:,} more")
        return OutputError(
            "\n".join(["holds an unfinished merge that differs from this one:", *lines]),
            file=str(self._output),
            remedy="Repeat that merge to finish it, use --overwrite to start anew, or choose another output.",
        )

    def begin(self) -> None:
        """Remove what earlier runs left unfinished, and open the journal. Raises OSError."""
        refuse_running(self.path)
        self._is_ours = True
        leftovers = self.leftovers()
        if not self._goes_on:  # it is of another merge
            leftovers.append(self.path / SHARED_RECIPE)
        records = [path for path in leftovers if path.name.endswith(RECORD)]
        _clear(path for path in leftovers if path not in records)
        if (self.path / JOURNAL).is_dir():
            _clear([self.path / JOURNAL])
        self._journal = JournalWriter(self.path, identity_of(self._plan), self.finished, self._plan)
        _clear(records)  # now that the journal says what they say

    def begin_some(self, recipe: str) -> None:
        """Make ready for runs that make some of the shards each: the journal says of what, and holds no shards.

        Args:
            recipe: the same, as who publishes reads it.

        Raises:
            OSError: the system refuses.
        """
        if self._goes_on and os.path.lexists(self.path / SHARED_RECIPE):
            return
        content = bytearray(recipe.encode())
        (self.path / SHARED_RECIPE).unlink(missing_ok=True)
        descriptor = platform.open_for_writing(str(self.path / SHARED_RECIPE))
        try:
            platform.write_all(descriptor, memoryview(content), 0)
            platform.sync_file(descriptor)
        finally:
            os.close(descriptor)
        JournalWriter(self.path, identity_of(self._plan), self.finished, self._plan).close()

    def missing(self) -> list[OutputShard]:
        """Return the shards that are still to be made."""
        return [shard for shard in self._plan.shards if shard.name not in self.finished]

    def record(self, finished: FinishedShard) -> None:
        """Take note, durably, of a shard that lies on stable storage here. Raises OSError."""
        platform.sync_directory(self.path)
        if self._journal is not None:
            self._journal.add(finished)
        self.finished[self._plan.shards[finished.number].name] = finished

    def leave(self, *, published: bool) -> None:
        """Give the directory up: all of it where the output is published or nothing is worth keeping.

        What the system refuses here is passed over: it must not hide what ended the run, and the next run sees to it.
        """
        with contextlib.suppress(OSError):
            if self._journal is not None:
                self._journal.close()
        self._journal = None
        if not self.is_locked:
            return
        keep = False
        with contextlib.suppress(OSError):
            keep = self._tidy(published=published)
        with contextlib.suppress(OSError):
            self._lock.release()
        if not keep:
            with contextlib.suppress(OSError):  # Windows removes no open file: its lock goes with the release
                self.path.rmdir()
        with contextlib.suppress(OSError):
            platform.sync_directory(self._output)

    def _tidy(self, *, published: bool) -> bool:
        """Remove what nobody needs any more; return whether the directory stays."""
        if self._is_ours or published:
            keep = bool(self.finished) and not published
            kept = {_LOCK, JOURNAL, SHARED_RECIPE, *self.finished} if keep else {_LOCK, JOURNAL}
            _clear(entry for entry in self.path.iterdir() if entry.name not in kept)
            if not keep:
                platform.sync_directory(self.path)  # what has no journal would be no run's, and in the way
                _clear([self.path / JOURNAL])
        else:
            keep = os.path.lexists(self.path / JOURNAL)
            kept = {_LOCK, SHARED_RECIPE} if keep else {_LOCK}
            _clear(self.path / name for name in _BEFORE_THE_JOURNAL - kept)
            if not keep:
                _clear(self.path / f"{shard.name}{SUFFIX}" for shard in self._plan.shards)
        if not keep:
            (self.path / _LOCK).unlink()
        return keep

    def sweep(self) -> None:
        """Remove the directory that a run left which died when all was published. Raises as `acquire`."""
        self.acquire(created=False)
        try:
            self._refuse_strangers()
            self._is_ours = True
        finally:
            self.leave(published=self._is_ours)


def _clear(leftovers: Iterable[Path]) -> None:
    for leftover in leftovers:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def sweep(output: Path, plan: Plan) -> None:
    """Remove what a run left in a finished output that died just before its end, unless another run is there."""
    staging = Staging(output, plan)
    if not staging.path.is_dir() or staging.path.is_symlink():
        return
    with contextlib.suppress(OutputError, OSError):
        staging.sweep()


def kept_text(stagings: Sequence[Staging], needs: str | None = None) -> str:
    """Return what a message says of shards that a failed run leaves behind, nothing where there are none.

    Args:
        needs: without what the same command would fail again.
    """
    number = sum(len(staging.finished) for staging in stagings)
    if not number:
        return ""
    all_of_them = number + sum(len(staging.missing()) for staging in stagings)
    return (
        f"{number} of {all_of_them} shards are finished and kept in {STAGING}: the same command"
        f"{f' with {needs}' if needs else ''} goes on from there, --overwrite starts anew."
    )
