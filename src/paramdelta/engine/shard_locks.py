"""Who makes which shards of an output that several runs make together: a lock file for each shard.

They are taken while the output's own lock is held. A run that makes some shards keeps that no longer; a run that makes
all of them, or publishes, keeps it to its end. So such a run sees every run that makes some.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import filelock

from paramdelta.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SUFFIX: Final = ".lock"


class ShardTakenError(OutputError):
    """Another run is making a shard."""


class ShardLocks:
    """The locks that a run holds of an output's shards."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging
        self._held: list[filelock.BaseFileLock] = []

    def take(self, names: Iterable[str]) -> None:
        """Take the locks of shards, all or none. Raises ShardTakenError where another run has one, OSError."""
        try:
            for name in names:
                lock = filelock.FileLock(self._staging / f"{name}{SUFFIX}", timeout=0)
                lock.acquire()
                self._held.append(lock)
        except filelock.Timeout:
            self.release()
            raise ShardTakenError(
                f"another run is making its shard {name}",
                file=str(self._staging.parent),
                remedy="Give each run shards of its own, or wait until that one has ended.",
            ) from None

    def release(self) -> None:
        """Give the locks back. Their files stay: one that is removed while another run opens it locks nothing."""
        while self._held:
            with contextlib.suppress(OSError):
                self._held.pop().release()


def refuse_running(staging: Path) -> None:
    """Refuse to go on where a run is making some of the shards. The output's own lock must be held.

    Raises:
        ShardTakenError: a run is.
    """
    for path in sorted(staging.glob(f"*{SUFFIX}")):
        probe = ShardLocks(staging)
        probe.take([path.name.removesuffix(SUFFIX)])
        probe.release()
