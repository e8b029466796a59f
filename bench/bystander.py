"""A file that others have in use while a contender runs, and how much of it the page cache still has afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.measure import warm
from paramdelta.storage.pages import PAGE, resident_share

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 256 << 20
RUN_PAGES = 16  # what one sample of resident_share looks at


@dataclass(frozen=True)
class Bystander:
    """A hot file."""

    path: Path
    size: int

    def heat(self) -> None:
        """Read it twice: pages that were used once only are the first to go."""
        warm([self.path, self.path])

    def share(self) -> float:
        """Return which share of it, from 0 to 1, is in the page cache."""
        return cached_share(self.path)


def cached_share(path: Path) -> float:
    """Return which share of a file, from 0 to 1, is in the page cache; every page is asked for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        return resident_share(descriptor, size, samples=-(-size // (RUN_PAGES * PAGE)))
    finally:
        os.close(descriptor)


def make_bystander(path: Path, size: int = SIZE) -> Bystander:
    """Write one, durably: its pages are clean."""
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for begin in range(0, size, len(block)):
            file.write(block[: size - begin])
        file.flush()
        os.fsync(file.fileno())
    return Bystander(path, size)
