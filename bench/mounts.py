"""Filesystems that are there for one benchmark only. Needs root."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def mounted(kind: str, target: Path, options: str) -> Iterator[Path]:
    """Mount a filesystem that has no device on a new directory.

    Raises:
        OSError: it cannot be mounted; the message is that of `mount`.
    """
    target.mkdir()
    done = subprocess.run(["mount", "-t", kind, "-o", options, kind, str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(done.stderr.strip().replace(f"{target}: ", ""))
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


@contextlib.contextmanager
def overlay(lower: Path, scratch: Path) -> Iterator[Path]:
    """Lay an empty directory over another one, as containers do. Raises OSError as `mounted`."""
    upper, work = scratch / "upper", scratch / "work"
    for folder in (upper, work):
        folder.mkdir()
    with mounted("overlay", scratch / "overlay", f"lowerdir={lower},upperdir={upper},workdir={work}") as mount:
        yield mount
