"""Where an output may lie: beside its inputs, never among them, on a disk that is there."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from paramdelta.checkpoint.discovery import STAGING
from paramdelta.checkpoint.wording import printable
from paramdelta.errors import OutputError
from paramdelta.storage import platform
from paramdelta.storage.remote.address import is_remote
from paramdelta.storage.sink import output_refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paramdelta.planning.plan import Plan

_REMEDY = "Choose another output."


def refuse_inputs(path: Path, plan: Plan) -> None:
    """Raise OutputError where the output would be, or lie inside, an input, or would hold a file of one."""
    with refusals(path):
        real = Path(os.path.realpath(path))
        own, staging = _aliases(real), _aliases(real / STAGING)
        above = own.union(*map(_aliases, real.parents))
        named = {file.path for file in plan.files} | {str(car.source) for car in plan.sidecars}
        files = {file for file in named if not is_remote(file)}
        for source in (source for source in plan.inputs if not is_remote(source.path)):
            if not above.isdisjoint(_aliases(source.path)):
                raise OutputError(
                    f"lies in an input, {source.role} ({printable(source.path)}): inputs are never written",
                    file=str(path),
                    remedy=_REMEDY,
                )
            if not Path(source.path).is_dir():
                files.add(source.path)
        # Where a file is named, and where it lies if that is a link.
        homes = {os.path.dirname(place): file for file in files for place in (file, os.path.realpath(file))}  # noqa: PTH120
        for home, file in homes.items():
            around = (Path(home), *Path(os.path.realpath(home)).parents)
            if not own.isdisjoint(_aliases(home or ".")) or any(not staging.isdisjoint(_aliases(at)) for at in around):
                raise OutputError(
                    f"holds a file of an input ({printable(file)}): inputs are never written",
                    file=str(path),
                    remedy=_REMEDY,
                )


def free_space(path: Path) -> int:
    """Return the bytes that this user can still write where ``path`` is or will be, as disk and quotas allow.

    Raises:
        OutputError: neither ``path`` nor any directory above it is there.
    """
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            free, left = shutil.disk_usage(place).free, _quota_left(place)
            return free if left is None else min(free, left)
    raise OutputError("lies on no disk that is there", file=str(path), remedy=_REMEDY)


def _quota_left(place: Path) -> int | None:
    try:
        descriptor = os.open(place, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return None
    try:
        return platform.quota_left(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path, created: list[Path]) -> None:
    """Create ``path`` and its parents; add those that did not exist to ``created``, outermost first."""
    for directory in (*reversed(path.parents), path):
        if directory.is_dir():
            continue
        try:
            directory.mkdir()
        except FileExistsError:  # another run was faster
            if not directory.is_dir():
                raise
            continue
        created.append(directory)
        platform.sync_directory(directory.parent)


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what the system refuses into an OutputError about ``path``."""
    try:
        yield
    except OSError as error:
        raise output_refused(error, path) from error
    except ValueError as error:  # a name that no system call takes
        raise OutputError(f"cannot be written: {error}", file=printable(str(path))) from error


def _aliases(path: str | Path) -> set[object]:
    """Return what names a file or directory: its real path and, for what has several, its device and inode."""
    names: set[object] = {os.path.normcase(os.path.realpath(path))}
    with contextlib.suppress(OSError):
        status = os.stat(path)  # noqa: PTH116
        if status.st_ino:
            names.add((status.st_dev, status.st_ino))
    return names
