"""What tells one state of a file from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells whether a file is still the same: device, inode, size in bytes, modification time in ns.

    A file elsewhere has a size, and in place of the rest a `version`: an entity tag, a digest, a generation; empty
    where the server names none.
    """

    dev: int
    ino: int
    size: int
    mtime_ns: int
    version: str = ""

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity that `status` shows."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @classmethod
    def elsewhere(cls, size: int, version: str) -> FileIdentity:
        """Return the identity of a file that is not on this machine."""
        return cls(0, 0, size, 0, version)
