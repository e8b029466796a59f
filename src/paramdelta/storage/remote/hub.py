"""Models of the Hugging Face Hub, read where they are: a commit is pinned, and each file's storage found through it.

What is asked of the Hub itself is asked by its own client, with the endpoint and the token that it finds; bytes come
from where the Hub sends readers, by range requests. The token goes to the Hub alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import urllib.request
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from paramdelta.errors import FetchError, RecipeError
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote import transfer, web
from paramdelta.storage.remote.refusals import DeniedError, changed, refused
from paramdelta.storage.remote.retries import TRANSIENT, TransientError, retry_after
from paramdelta.storage.remote.service import Range, Service

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from paramdelta.storage.remote.retries import Patience

_MODEL: Final = re.compile(r"hf://([^/@]+/[^/@]+)(?:@(.+))?")
_FILE: Final = re.compile(r"hf://([^/@]+/[^/@]+)@([0-9a-f]{40})/(.+)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SECONDS: Final = 30.0


class Hub(Service):
    """The Hub at ``HF_ENDPOINT``, as whoever is logged in here."""

    def __init__(self, scheme: str, patience: Patience) -> None:  # noqa: ARG002
        super().__init__(patience)
        self._session = web.session_source(environment=False)  # its netrc would displace the token
        self._told: dict[str, Any] = {}
        self._targets: dict[str, asyncio.Future[web.Target]] = {}

    def pinned(self, address: str) -> str:
        """Return the address at the commit that its revision, ``main`` by default, stands for now."""
        name, revision = self._parts(address)
        if revision is not None and _COMMIT.fullmatch(revision):
            return address
        told = self._information(address)
        pinned = f"hf://{name}@{told.sha}"
        self._told[pinned] = told
        return pinned

    def listing(self, address: str) -> dict[str, FileIdentity]:
        """Return the files of a commit, by name, those of folders left out."""
        told = self._told.get(address) or self._information(address)
        return {
            file.rfilename: FileIdentity.elsewhere(file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in told.siblings or []
            if "/" not in file.rfilename
        }

    def _parts(self, address: str) -> tuple[str, str | None]:
        found = _MODEL.fullmatch(address)
        if found is None:
            raise RecipeError(
                f"no model of the Hub: {address}", remedy="Write hf://org/name or hf://org/name@revision."
            )
        return found[1], found[2]

    def _information(self, address: str) -> Any:
        """Return what the Hub tells of a model at a revision: its commit, its files with sizes and digests."""
        name, revision = self._parts(address)

        def ask() -> Any:
            client = huggingface_hub.HfApi()
            return client.model_info(name, revision=revision, files_metadata=True, timeout=_SECONDS)

        return transfer.wait(transfer.start(self._asked(address, ask)))

    async def _asked(self, address: str, ask: Callable[[], Any]) -> Any:
        """Return what the Hub's client answers, asked as often as is of use."""
        if constants.HF_HUB_OFFLINE:
            name = address.removeprefix("hf://").partition("@")[0]
            raise FetchError(
                "is not in the Hub's cache, or not all of it, and HF_HUB_OFFLINE is set",
                file=address,
                remedy=f"Download it first: hf download {name}; or unset that.",
            )

        async def once() -> Any:
            try:
                return await asyncio.to_thread(ask)
            except hub_errors.HFValidationError as error:
                raise FetchError(
                    "is no name of a model of the Hub", file=address, remedy="Check the spelling."
                ) from error
            except hub_errors.HfHubHTTPError as error:
                raise _explained(error, address) from error
            except _CLIENT_ERRORS as error:
                raise TransientError(f"the Hub cannot be reached ({type(error).__name__})") from error

        return await transfer.repeat(self.patience, address, once)

    async def stream(self, wanted: Range) -> AsyncGenerator[bytes, None]:
        """Yield what one request gives of a range, from where the Hub keeps the file."""
        target = await self._target(wanted)
        try:
            async for chunk in web.stream(await self._session(), target, wanted):
                yield chunk
        except DeniedError as error:
            if target.headers:
                raise
            # An address that the Hub has signed is good for a while only: it gives another one.
            self._targets.pop(wanted.address, None)
            raise TransientError("its storage refused the address that the Hub had given") from error

    async def _target(self, wanted: Range) -> web.Target:
        """Return where a file is kept; asked for once, however many ranges are wanted at the same time."""
        if wanted.address not in self._targets:
            self._targets[wanted.address] = asyncio.ensure_future(self._find(wanted))
        asked = self._targets[wanted.address]
        try:
            return await asyncio.shield(asked)
        except Exception:
            self._targets.pop(wanted.address, None)
            raise

    async def _find(self, wanted: Range) -> web.Target:
        found = _FILE.fullmatch(wanted.address)
        if found is None:
            raise RecipeError(f"no file of the Hub at a commit: {wanted.address}")
        name, commit, file = found[1], found[2], found[3]
        url = huggingface_hub.hf_hub_url(name, file, revision=commit)
        headers = huggingface_hub.utils.build_hf_headers()
        told = await self._asked(
            wanted.address, lambda: huggingface_hub.get_hf_file_metadata(url, timeout=_SECONDS, headers=headers)
        )
        if told.size is not None and told.size != wanted.identity.size:
            raise changed(wanted.address, "size", wanted.identity.size, told.size)
        if told.etag is not None and told.etag != wanted.identity.version:
            raise changed(wanted.address, "tag", wanted.identity.version, told.etag)
        is_hub = urlsplit(told.location).netloc == urlsplit(url).netloc
        return web.Target(
            wanted.address, told.location, headers if is_hub else {}, strict=is_hub, proxy=_proxy_for(told.location)
        )


def _proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for a URL."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _explained(error: hub_errors.HfHubHTTPError, address: str) -> Exception:
    """Return what an answer of the Hub means."""
    status = error.response.status_code if error.response is not None else 0
    if status in TRANSIENT:
        return TransientError(f"HTTP {status}", retry_after(error.response.headers.get("Retry-After")))
    if isinstance(error, hub_errors.GatedRepoError):
        return FetchError(
            f"is gated (HTTP {status}), and {_token()} does not open it",
            file=address,
            remedy="Accept its terms on its page at the Hub, and log in as who did: hf auth login, or HF_TOKEN.",
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return FetchError(f"has no such revision (HTTP {status})", file=address, remedy="Check the spelling.")
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return FetchError(
            f"is not there, or is private (HTTP {status}), and {_token()} does not open it",
            file=address,
            remedy="Check the spelling, or log in: hf auth login, or HF_TOKEN.",
        )
    return refused(status, address, f"{_token()} does not open it; hf auth login or HF_TOKEN gives another one")


def _token() -> str:
    """Return which token is sent, never what it is."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "the token of HF_TOKEN"
    if huggingface_hub.get_token():
        return "the token of hf auth login"
    return "no token, since none was found,"


def _client_errors() -> tuple[type[BaseException], ...]:
    """Return what the Hub's client raises where there is no connection: its HTTP library was changed more than once."""
    found: list[type[BaseException]] = [OSError]
    for library, name in (("httpx2", "TransportError"), ("httpx", "TransportError"), ("requests", "RequestException")):
        with contextlib.suppress(ImportError):
            found.append(getattr(importlib.import_module(library), name))
    return tuple(found)


_CLIENT_ERRORS: Final = _client_errors()
