"""Where files lie: a path on this machine, or a directory or file elsewhere that is used in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from paramdelta.storage.remote import address

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from paramdelta.storage.identity import FileIdentity
    from paramdelta.storage.remote.service import Service

HEAD_BYTES = 64 << 10
"""What is fetched of a file at first: the whole header of most shards."""


class RemoteFolder:
    """A directory elsewhere as it was when it was first looked at: its files are pinned then.

    Attributes:
        address: with the revision that is pinned, where the service has revisions.
    """

    def __init__(self, text: str) -> None:
        from paramdelta.storage.remote.service import service_for

        checked = address.checked(text)
        self._service: Service = service_for(checked)
        self.address = self._service.pinned(checked)
        self._files: dict[str, FileIdentity | None] = {}
        self._heads: dict[str, bytes] = {}
        self._listed = False

    def names(self, expected: Sequence[str]) -> list[str]:
        """Return the names of the files that are there; of ``expected`` ones only where the place cannot be listed.

        Raises:
            FetchError: the place cannot be reached, or gives nothing without credentials.
        """
        self._look(expected)
        return sorted(name for name, identity in self._files.items() if identity is not None)

    def identity(self, name: str) -> FileIdentity | None:
        """Return the identity of a file, None where there is no such file. Raises as `names`."""
        self._look([name])
        return self._files.get(name)

    def _look(self, names: Iterable[str]) -> None:
        if self._service.lists:
            if not self._listed:
                self._files.update(self._service.listing(self.address))
                self._listed = True
            return
        unknown = [name for name in names if name not in self._files]
        if unknown:
            self._files.update(self._service.probe(self.address, unknown))

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch the first bytes of several files at once. Raises as `names`."""
        self._look(names)
        there = {name: found for name in names if (found := self._files.get(name)) is not None}
        sizes = {name: min(found.size, HEAD_BYTES) for name, found in there.items()}
        wanted = [(f"{self.address}/{name}", there[name], 0, size) for name, size in sizes.items()]
        self._heads.update(zip(sizes, self._service.read_several(wanted), strict=True))

    def read(self, name: str, begin: int, size: int, expected: FileIdentity) -> bytes:
        """Return ``size`` bytes of a file that has the identity ``expected``.

        Raises:
            FetchError: they cannot be had.
            InputChangedError: the file is another one now.
        """
        head = self._heads.get(name, b"")
        if begin + size <= len(head):
            return head[begin : begin + size]
        [content] = self._service.read_several([(f"{self.address}/{name}", expected, begin, size)])
        return content


class RemotePath:
    """A directory elsewhere, or a file in it, with as much of the interface of a path as checkpoints need."""

    __slots__ = ("folder", "name")

    def __init__(self, folder: RemoteFolder, name: str = "") -> None:
        self.folder = folder
        self.name = name

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.folder, name)

    def __str__(self) -> str:
        return f"{self.folder.address}/{self.name}" if self.name else self.folder.address

    def __fspath__(self) -> str:
        return str(self)

    @property
    def parent(self) -> RemotePath:
        """The directory."""
        return RemotePath(self.folder)

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix


Place: TypeAlias = Path | RemotePath


def place_of(text: str) -> Place:
    """Return the place that a text names. Raises RecipeError where an address may not be used."""
    if not address.is_remote(text):
        return Path(text)
    return file_at(text) if address.names_file(text) else RemotePath(RemoteFolder(text))


def file_at(text: str) -> Place:
    """Return the place of a file, whatever its name ends in. Raises as `place_of`."""
    if not address.is_remote(text):
        return Path(text)
    folder, name = address.split_file(address.checked(text))
    return RemotePath(RemoteFolder(folder), name)
