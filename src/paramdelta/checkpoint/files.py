"""Reading the small files, and the first bytes of the large ones, here or elsewhere; nothing but regular files."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from paramdelta.checkpoint.wording import printable
from paramdelta.errors import CheckpointError
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote.place import RemotePath

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from paramdelta.storage.remote.place import Place

# O_NONBLOCK: should a FIFO take the file's place between stat and open, open returns and fstat tells.
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open the regular file `path`, or a symlink to one, for reading; yield its descriptor and its status.

    Raises CheckpointError where there is no such file, it is not a regular file, or it cannot be read.
    """
    file = printable(str(path))
    try:
        _require_regular(path.stat(), file)
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    try:
        status = os.fstat(descriptor)
        _require_regular(status, file)
        yield descriptor, status
    finally:
        os.close(descriptor)


class OpenFile:
    """A file that is read from its begin on."""

    def __init__(self, place: Place, identity: FileIdentity, descriptor: int | None) -> None:
        self.identity = identity
        self._place = place
        self._descriptor = descriptor
        self._at = 0

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes; raise CheckpointError where the file ends before."""
        if self._descriptor is not None:
            return read_exactly(self._descriptor, count, printable(str(self._place)))
        if self._at + count > self.identity.size:
            raise CheckpointError(f"the file ended {count} bytes early", file=printable(str(self._place)))
        assert isinstance(self._place, RemotePath)
        begin, self._at = self._at, self._at + count
        return self._place.folder.read(self._place.name, begin, count, self.identity)


@contextmanager
def open_file(place: Place) -> Iterator[OpenFile]:
    """Open the file at a place. Raises CheckpointError as `open_regular`, FetchError where it is elsewhere."""
    if isinstance(place, RemotePath):
        identity = identity_of(place)
        yield OpenFile(place, identity, None)
        return
    with open_regular(place) as (descriptor, status):
        yield OpenFile(place, FileIdentity.of(status), descriptor)


def identity_of(place: Place) -> FileIdentity:
    """Return the identity of the file at a place. Raises CheckpointError where there is no such file."""
    if isinstance(place, RemotePath):
        identity = place.folder.identity(place.name)
        if identity is None:
            raise CheckpointError("no such file", file=printable(str(place)), remedy="Check the spelling.")
        return identity
    with open_regular(place) as (_, status):
        return FileIdentity.of(status)


def prefetch(places: Sequence[Place]) -> None:
    """Fetch the first bytes of files that lie elsewhere, all of one directory, at once. Raises FetchError."""
    remote = [place for place in places if isinstance(place, RemotePath)]
    if remote:
        remote[0].folder.prefetch([place.name for place in remote])


def read_exactly(descriptor: int, count: int, file: str) -> bytes:
    """Return the next `count` bytes of `descriptor`; raise CheckpointError where the file ends before."""
    pieces = []
    missing = count
    while missing:
        try:
            piece = os.read(descriptor, missing)
        except OSError as error:
            raise unreadable(file, error) from error
        if not piece:
            raise CheckpointError(
                f"the file ended {missing} bytes early", file=file, remedy="Is something still writing it?"
            )
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def read_whole(place: Place, limit: int) -> bytes:
    """Return all bytes of a file; raise CheckpointError where there are more than `limit`."""
    with open_file(place) as file:
        size = file.identity.size
        if size > limit:
            raise CheckpointError(
                f"{size} bytes is more than such a file can honestly have (limit: {limit})",
                file=printable(str(place)),
            )
        return file.read(size)


def is_there(path: Place) -> bool:
    """Return whether there is a file or directory; raise CheckpointError where the system will not tell."""
    if isinstance(path, RemotePath):
        return not path.name or path.folder.identity(path.name) is not None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(printable(str(path)), error) from error
    return True


def is_named(place: Place) -> bool:
    """Return whether there is anything at a place, be it a link that leads nowhere."""
    return is_there(place) if isinstance(place, RemotePath) else os.path.lexists(place)


def names_in(folder: Place, expected: Sequence[str]) -> list[str]:
    """Return the names of files in a directory, sorted, hidden ones left out; links that lead nowhere are files.

    Args:
        expected: what is looked for where a place cannot be listed.

    Raises:
        CheckpointError: it cannot be looked into.
    """
    if isinstance(folder, RemotePath):
        return [name for name in folder.folder.names(expected) if not name.startswith(".")]
    try:  # hidden files are not weights: macOS puts "._model.safetensors" beside files on foreign disks
        return sorted(e.name for e in folder.iterdir() if not e.name.startswith(".") and not e.is_dir())
    except OSError as error:
        raise unreadable(printable(str(folder)), error) from error


def has_directory(folder: Place, name: str) -> bool:
    """Return whether a directory of this machine has a directory of this name in it."""
    return not isinstance(folder, RemotePath) and (folder / name).is_dir()


def unreadable(file: str, error: OSError | ValueError) -> CheckpointError:
    """Return the CheckpointError that says why the system would not read `file`."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError("no such file or directory", file=file, remedy="Is it a broken link?")
    reason = getattr(error, "strerror", None) or str(error)
    denied = isinstance(error, PermissionError)
    remedy = "Let your user read it, or copy it to where you can." if denied else None
    return CheckpointError(f"cannot be read: {reason}", file=file, remedy=remedy)


def _require_regular(status: os.stat_result, file: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("not a regular file", file=file)
