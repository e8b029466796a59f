"""Files in any other place that fsspec knows: Google Cloud Storage, Azure, memory and more.

No answer says by itself which state of a file it is of, so a file is looked at again after each of its ranges.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import fsspec

from paramdelta.errors import FetchError, ParamDeltaError
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote import transfer
from paramdelta.storage.remote.refusals import changed, refused
from paramdelta.storage.remote.retries import TRANSIENT, TransientError
from paramdelta.storage.remote.service import Range, Service

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from paramdelta.storage.remote.retries import Patience

_VERSIONS: Final = ("generation", "etag", "ETag", "md5Hash", "content_md5", "mtime", "updated", "created")
_CREDENTIALS: Final = "credentials are looked for where fsspec's package for this scheme looks for them"
_PIECE: Final = 1 << 20
_AT_ONCE: Final = 32


class OtherFiles(Service):
    """What fsspec makes of a scheme."""

    def __init__(self, scheme: str, patience: Patience) -> None:
        super().__init__(patience)
        self._files = fsspec.filesystem(scheme)
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="paramdelta-fetch")

    def listing(self, address: str) -> dict[str, FileIdentity]:
        """Return the files of a directory, by name, each as it is when it is asked for by itself."""
        return transfer.wait(transfer.start(self._list(address)))

    async def _list(self, address: str) -> dict[str, FileIdentity]:
        def ask() -> list[str]:
            self._files.invalidate_cache()
            entries = self._files.ls(_path(address), detail=True)
            return [str(entry["name"]).rpartition("/")[2] for entry in entries if entry["type"] == "file"]

        async def one(name: str) -> FileIdentity:
            return await transfer.repeat(self.patience, address, lambda: self._look(f"{address}/{name}"))

        names = await transfer.repeat(self.patience, address, lambda: self._asked(ask, address))
        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))

    async def _look(self, address: str) -> FileIdentity:
        def ask() -> dict[str, Any]:
            self._files.invalidate_cache()
            found: dict[str, Any] = self._files.info(_path(address))
            return found

        entry = await self._asked(ask, address)
        return FileIdentity.elsewhere(int(entry["size"]), _version(entry))

    async def stream(self, wanted: Range) -> AsyncGenerator[bytes, None]:
        """Yield a range, and look whether its file is still the one that was planned with."""
        path, end = _path(wanted.address), wanted.begin + wanted.size
        for begin in range(wanted.begin, end, _PIECE):
            last = min(begin + _PIECE, end)
            ask = partial(self._files.cat_file, path, start=begin, end=last)
            piece = await self._asked(ask, wanted.address)
            if last == end:
                await self._check(wanted)
            yield piece

    async def _check(self, wanted: Range) -> None:
        found = await self._look(wanted.address)
        if found != wanted.identity:
            raise changed(wanted.address, "version", _shown(wanted.identity), _shown(found))

    async def _asked(self, ask: Callable[[], Any], address: str) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        except FileNotFoundError as error:
            raise refused(404, address, _CREDENTIALS) from error
        except PermissionError as error:
            raise refused(403, address, _CREDENTIALS) from error
        except (OSError, TimeoutError) as error:
            raise TransientError(f"no connection ({type(error).__name__})") from error
        except ParamDeltaError:
            raise
        except Exception as error:  # of whichever package serves the scheme
            status = getattr(error, "code", None) or getattr(error, "status_code", None)
            if status in TRANSIENT:
                raise TransientError(f"HTTP {status}") from error
            raise FetchError(f"cannot be read ({type(error).__name__})", file=address) from error


def _path(address: str) -> str:
    return address.partition("://")[2]


def _version(entry: dict[str, Any]) -> str:
    return next((str(entry[key]) for key in _VERSIONS if entry.get(key)), "")


def _shown(identity: FileIdentity) -> str:
    return f"{identity.version or 'none'}, {identity.size:,} bytes"
