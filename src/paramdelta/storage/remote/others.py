"""Files in any other place that fsspec knows: Google Cloud Storage, Azure, memory and more.

A generation is pinned where the place has one (gs://). Elsewhere a file is looked at again after each of its ranges:
no answer says by itself which state of the file it is of.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import fsspec

from paramdelta.errors import FetchError
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote import transfer
from paramdelta.storage.remote.refusals import changed, refused
from paramdelta.storage.remote.retries import TransientError
from paramdelta.storage.remote.service import Range, Service

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from paramdelta.storage.remote.retries import Patience

_VERSIONS: Final = ("generation", "etag", "ETag", "md5Hash", "content_md5", "mtime", "updated", "created")
_CREDENTIALS: Final = "credentials are looked for where fsspec's package for this scheme looks for them"


class OtherFiles(Service):
    """What fsspec makes of a scheme."""

    def __init__(self, scheme: str, patience: Patience) -> None:
        super().__init__(patience)
        self._files = fsspec.filesystem(scheme)

    def listing(self, address: str) -> dict[str, FileIdentity]:
        """Return the files of a directory, by name."""

        def ask() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = self._files.ls(_path(address), detail=True, refresh=True)
            return found

        entries = transfer.wait(transfer.start(self._repeated(address, ask)))
        return {
            str(entry["name"]).rpartition("/")[2]: FileIdentity.elsewhere(int(entry["size"]), _version(entry))
            for entry in entries
            if entry["type"] == "file"
        }

    async def stream(self, wanted: Range) -> AsyncGenerator[bytes, None]:
        """Yield a range, and look whether its file is still the one that was planned with."""
        path, end = _path(wanted.address), wanted.begin + wanted.size

        def ask() -> tuple[bytes, dict[str, Any]]:
            content = self._files.cat_file(path, start=wanted.begin, end=end)
            self._files.invalidate_cache()
            return content, self._files.info(path)

        content, entry = await _asked(ask, wanted.address)
        if int(entry["size"]) != wanted.identity.size:
            raise changed(wanted.address, "size", wanted.identity.size, entry["size"])
        if _version(entry) != wanted.identity.version:
            raise changed(wanted.address, "version", wanted.identity.version, _version(entry))
        yield content

    async def _repeated(self, address: str, ask: Callable[[], Any]) -> Any:
        return await transfer.repeat(self.patience, address, lambda: _asked(ask, address))


async def _asked(ask: Callable[[], Any], address: str) -> Any:
    try:
        return await asyncio.to_thread(ask)
    except FileNotFoundError as error:
        raise refused(404, address, _CREDENTIALS) from error
    except PermissionError as error:
        raise refused(403, address, _CREDENTIALS) from error
    except NotImplementedError as error:
        raise FetchError("this kind of place cannot be read by range", file=address) from error
    except OSError as error:
        raise TransientError(f"no connection ({type(error).__name__})") from error


def _path(address: str) -> str:
    return address.partition("://")[2]


def _version(entry: dict[str, Any]) -> str:
    return next((str(entry[key]) for key in _VERSIONS if entry.get(key)), "")
