"""Who answers for an address: one service for each kind of place, which lists files and streams their bytes."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.errors import FetchError, RecipeError
from paramdelta.storage.remote import transfer
from paramdelta.storage.remote.address import scheme_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from concurrent.futures import Future

    from paramdelta.storage.identity import FileIdentity
    from paramdelta.storage.remote.retries import Patience

_SERVICES: Final = {
    "hf": ("paramdelta.storage.remote.hub", "Hub"),
    "http": ("paramdelta.storage.remote.web", "Web"),
    "https": ("paramdelta.storage.remote.web", "Web"),
    "s3": ("paramdelta.storage.remote.s3", "S3"),
    "s3a": ("paramdelta.storage.remote.s3", "S3"),
}
_OTHERS: Final = ("paramdelta.storage.remote.others", "OtherFiles")
_INSTALL: Final = "Install what reads remote files: pip install 'paramdelta[remote]'"


class Range(NamedTuple):
    """Bytes [begin, begin + size) of the file at an address that has an identity."""

    address: str
    identity: FileIdentity
    begin: int
    size: int


class Service(ABC):
    """Lists and streams files of one kind of place. Blocking methods may be called from any thread but the loop's."""

    lists = True
    """Whether directories can be listed; else files are asked for by name."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience

    def pinned(self, address: str) -> str:
        """Return an address with the revision that it has now, where the place has revisions.

        Raises:
            FetchError: it cannot be told.
        """
        return address

    def listing(self, address: str) -> dict[str, FileIdentity]:
        """Return the files of a directory, by name. Raises FetchError where it cannot be listed."""
        raise NotImplementedError

    def probe(self, address: str, names: Sequence[str]) -> dict[str, FileIdentity | None]:
        """Return those files of a directory that are there; None for others. Raises FetchError."""
        raise NotImplementedError

    @abstractmethod
    def stream(self, wanted: Range) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a range by one request, in the loop's thread; fewer where the connection ends.

        Raises:
            TransientError: it may go better the next time.
            FetchError: it will not.
            InputChangedError: the file does not have the range's identity.
        """

    def start(self, wanted: Range, memory: memoryview) -> Future[None]:
        """Begin to fill ``memory`` with a range, however many requests that takes; the future tells the end."""
        return transfer.start(transfer.receive(self, wanted, memory))

    def read_several(self, ranges: Sequence[tuple[str, FileIdentity, int, int]]) -> list[bytes]:
        """Return the bytes of ranges that are fetched at once. Raises as `stream`, never TransientError."""
        wanted = [Range(*each) for each in ranges]
        buffers = [bytearray(each.size) for each in wanted]
        transfer.wait(transfer.start(transfer.receive_all(self, wanted, [memoryview(buffer) for buffer in buffers])))
        return [bytes(buffer) for buffer in buffers]


def service_for(address: str) -> Service:
    """Return the service that answers for an address.

    Raises:
        FetchError: what it needs is not installed.
        RecipeError: there is no such scheme.
    """
    from paramdelta.storage.remote.retries import Patience

    scheme = scheme_of(address)
    module, name = _SERVICES.get(scheme, _OTHERS)
    try:
        service = getattr(importlib.import_module(module), name)
        made: Service = service(scheme, Patience())
    except ImportError as error:
        raise FetchError(
            f"{scheme}:// needs a package that is not installed ({error.name or error})",
            file=address,
            remedy=_INSTALL,
        ) from error
    except Exception as error:  # of whichever package serves the scheme
        raise RecipeError(
            f"{scheme}:// cannot be used: {type(error).__name__}",
            remedy="It is no kind of address that fsspec knows, or needs settings: see fsspec's configuration files.",
        ) from error
    return made
