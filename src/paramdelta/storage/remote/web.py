"""Files of a web server, by range requests (RFC 9110, section 14), each answer held against what was planned with."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
import fsspec

from paramdelta.errors import FetchError
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote import transfer
from paramdelta.storage.remote.refusals import DENIED, changed, refused
from paramdelta.storage.remote.retries import TRANSIENT, TransientError, retry_after
from paramdelta.storage.remote.service import Range, Service

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

    from paramdelta.storage.remote.retries import Patience

_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_OK, _PARTIAL, _CHANGED, _BEYOND = 200, 206, 412, 416
_ABSENT: Final = frozenset({404, 410})
_READ_AHEAD: Final = 256 << 10
_CREDENTIALS: Final = "credentials are looked for in .netrc (or the file that NETRC names)"
_NO_RANGES: Final = "Download the checkpoint, or put it where byte ranges are served."
_CONNECT_SECONDS: Final = 30.0


class Target(NamedTuple):
    """Where a file is asked for, and with which headers.

    Attributes:
        address: what messages call the file: the URL may be signed.
        strict: whether its tag is the one that was planned with.
        proxy: what the request goes through, where the session does not know.
    """

    address: str
    url: str
    headers: Mapping[str, str]
    strict: bool = True
    proxy: str | None = None


class Web(Service):
    """Any server that serves byte ranges. Its directories cannot be listed: files are asked for by name."""

    lists = False

    def __init__(self, scheme: str, patience: Patience) -> None:  # noqa: ARG002
        super().__init__(patience)
        self._session = session_source()

    def probe(self, address: str, names: Sequence[str]) -> dict[str, FileIdentity | None]:
        """Ask for the first byte of each file: that works where HEAD does not, and shows whether ranges are served."""
        found = transfer.wait(transfer.start(self._probe_all(address, names)))
        denied = [status for status in found.values() if isinstance(status, int)]
        if len(denied) == len(found) and denied:  # places that hide what is absent say 403 for it, but not of all
            raise refused(denied[0], address, _CREDENTIALS)
        return {name: each if isinstance(each, FileIdentity) else None for name, each in found.items()}

    async def _probe_all(self, address: str, names: Sequence[str]) -> dict[str, FileIdentity | int | None]:
        gate = asyncio.Semaphore(16)

        async def one(name: str) -> FileIdentity | int | None:
            async with gate:
                return await transfer.repeat(self.patience, f"{address}/{name}", lambda: self._probe(address, name))

        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))

    async def _probe(self, address: str, name: str) -> FileIdentity | int | None:
        """Return a file's identity, None where it is not there, the status where it may not be read."""
        url = f"{address}/{name}"
        async with _answer(await self._session(), Target(url, url, {}), 0, 1) as answer:
            if answer.status in _ABSENT:
                return None
            if answer.status in DENIED:
                return answer.status
            return FileIdentity.elsewhere(_size_of(answer, url), version_of(answer.headers))

    async def stream(self, wanted: Range) -> AsyncGenerator[bytes, None]:
        """Yield what one request gives of a range."""
        async for chunk in stream(await self._session(), Target(wanted.address, wanted.address, {}), wanted):
            yield chunk


def session_source(*, environment: bool = True) -> Any:
    """Return what gives the session, to be awaited in the loop's thread.

    Args:
        environment: whether proxies and .netrc are as the environment says.
    """
    options = {
        "trust_env": environment,
        "read_bufsize": _READ_AHEAD,
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
    }
    return fsspec.filesystem("http", client_kwargs=options).set_session


async def stream(session: aiohttp.ClientSession, target: Target, wanted: Range) -> AsyncIterator[bytes]:
    """Yield what a target gives of a range by one request. Raises as `Service.stream`."""
    async with _answer(session, target, wanted.begin, wanted.size) as answer:
        _check(answer, target, wanted)
        async for chunk in answer.content.iter_any():
            yield chunk


@contextlib.asynccontextmanager
async def _answer(
    session: aiohttp.ClientSession, target: Target, begin: int, size: int
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send one request; what may go better the next time is a TransientError, also while the answer is read."""
    headers = {**target.headers, "Range": f"bytes={begin}-{begin + size - 1}", "Accept-Encoding": "identity"}
    try:
        async with session.get(target.url, headers=headers, proxy=target.proxy) as answer:
            if answer.status in TRANSIENT:
                raise TransientError(f"HTTP {answer.status}", retry_after(answer.headers.get("Retry-After")))
            yield answer
    except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, aiohttp.ClientConnectorCertificateError) as error:
        raise FetchError(f"cannot be fetched: {_cause(error)}", file=target.address) from None  # it shows the URL
    except (aiohttp.ClientError, ConnectionError) as error:
        raise TransientError(_cause(error)) from None


def _cause(error: BaseException) -> str:
    """Return what is wrong, without addresses: one behind a redirect may be signed."""
    known = {
        aiohttp.ClientPayloadError: "the answer ended early",
        aiohttp.ServerDisconnectedError: "the server closed the connection",
        aiohttp.TooManyRedirects: "redirects without end",
        aiohttp.InvalidURL: "no address that can be asked for",
        aiohttp.ClientConnectorCertificateError: "the server's certificate is not trusted",
        ConnectionResetError: "the connection was reset",
    }
    for kind, text in known.items():
        if isinstance(error, kind):
            return text
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error is not None:
        return f"no connection ({error.os_error.strerror or type(error).__name__})"
    return type(error).__name__


def _check(answer: aiohttp.ClientResponse, target: Target, wanted: Range) -> None:
    """See that an answer holds the bytes that were asked for, of the file that was planned with."""
    address, identity = wanted.address, wanted.identity
    if answer.status in {_CHANGED, _BEYOND}:
        raise changed(address, "size", identity.size, _total(answer) or "less")
    if answer.status not in {_OK, _PARTIAL}:
        raise refused(answer.status, address, _CREDENTIALS)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError("the server compresses what it sends", file=address, remedy=_NO_RANGES)
    version = version_of(answer.headers)
    if target.strict and version != identity.version:
        raise changed(address, "tag", identity.version or "none", version or "none")
    if answer.status == _OK:
        _check_whole(answer, wanted)
        return
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if found is None or found[1] is None or int(found[1]) != wanted.begin:
        raise FetchError("the server sends another range than it was asked for", file=address, remedy=_NO_RANGES)
    if found[3] != "*" and int(found[3]) != identity.size:
        raise changed(address, "size", identity.size, found[3])


def _check_whole(answer: aiohttp.ClientResponse, wanted: Range) -> None:
    """See that the whole file was wanted where the whole file comes."""
    size = answer.content_length
    if wanted.begin or wanted.size != wanted.identity.size:
        raise FetchError(
            "the server ignores Range and sends the whole file (HTTP 200)", file=wanted.address, remedy=_NO_RANGES
        )
    if size is not None and size != wanted.identity.size:
        raise changed(wanted.address, "size", wanted.identity.size, size)


def _total(answer: aiohttp.ClientResponse) -> str | None:
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    return found[3] if found is not None else None


def _size_of(answer: aiohttp.ClientResponse, url: str) -> int:
    """Return the size of a file of which the first byte was asked for."""
    if answer.status == _OK and answer.content_length is not None:
        return answer.content_length
    if answer.status in {_PARTIAL, _BEYOND}:
        total = _total(answer)
        if total is not None and total != "*":
            return int(total)
    if answer.status not in {_OK, _PARTIAL}:
        raise refused(answer.status, url, _CREDENTIALS)
    raise FetchError("the server does not say how large this file is", file=url, remedy=_NO_RANGES)


def version_of(headers: Mapping[str, str]) -> str:
    """Return what tells one state of a file from another: its entity tag, or when it was last modified."""
    tag = headers.get("ETag", "").removeprefix("W/").strip('"')
    return tag or headers.get("Last-Modified", "")
