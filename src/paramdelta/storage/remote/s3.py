"""Objects of S3 and of what speaks its protocol, through s3fs: credentials, region and endpoint are found by it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import botocore.exceptions
import fsspec

from paramdelta.errors import CheckpointError, FetchError
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote import transfer
from paramdelta.storage.remote.refusals import changed, refused
from paramdelta.storage.remote.retries import TRANSIENT, TransientError, retry_after
from paramdelta.storage.remote.service import Range, Service

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable

    from paramdelta.storage.remote.retries import Patience

_CREDENTIALS: Final = (
    "credentials are looked for in AWS_* variables and profiles; FSSPEC_S3_ANON=true reads public buckets without"
)
_CHUNK: Final = 256 << 10
_CONNECTIONS: Final = 64  # botocore takes ten: fewer than ranges are under way
_CHANGED: Final = frozenset({409, 412, 416})


class S3(Service):
    """Buckets, as fsspec is configured for them (``FSSPEC_S3_*``, ``AWS_*``, its configuration files)."""

    def __init__(self, scheme: str, patience: Patience) -> None:  # noqa: ARG002
        super().__init__(patience)
        settings = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
        settings.setdefault("max_pool_connections", _CONNECTIONS)
        settings.setdefault("retries", {"total_max_attempts": 1})  # else two would wait for each other
        self._files = fsspec.filesystem("s3", config_kwargs=settings)

    def listing(self, address: str) -> dict[str, FileIdentity]:
        """Return the objects directly below a prefix, by name."""
        entries = transfer.wait(transfer.start(transfer.repeat(self.patience, address, lambda: self._list(address))))
        return {
            entry["name"].rpartition("/")[2]: FileIdentity.elsewhere(entry["size"], _tag(entry))
            for entry in entries
            if entry["type"] == "file"
        }

    async def _list(self, address: str) -> list[dict[str, Any]]:
        path = address.partition("://")[2]

        asked = self._files._ls(path, detail=True, refresh=True)
        found: list[dict[str, Any]] = await _answered(asked, address)
        return found

    async def stream(self, wanted: Range) -> AsyncGenerator[bytes, None]:
        """Yield what one request gives of a range."""
        bucket, _, key = wanted.address.partition("://")[2].partition("/")
        await _answered(self._files.set_session(), wanted.address)
        client = await _answered(self._files.get_s3(bucket), wanted.address)
        answer = await _answered(
            client.get_object(
                Bucket=bucket,
                Key=key,
                Range=f"bytes={wanted.begin}-{wanted.begin + wanted.size - 1}",
                IfMatch=f'"{wanted.identity.version}"',
                **self._files.req_kw,
            ),
            wanted.address,
        )
        body = answer["Body"]
        try:
            _check(answer, wanted)
            while chunk := await _answered(body.read(_CHUNK), wanted.address):
                yield chunk
        finally:
            body.close()


def _tag(entry: dict[str, Any]) -> str:
    return str(entry.get("ETag", "")).strip('"')


def _check(answer: dict[str, Any], wanted: Range) -> None:
    """See that an answer holds the bytes that were asked for, of the object that was planned with."""
    if _tag(answer) != wanted.identity.version:
        raise changed(wanted.address, "tag", wanted.identity.version, _tag(answer))
    given, _, total = str(answer.get("ContentRange", "")).partition("/")
    if not given.startswith(f"bytes {wanted.begin}-"):
        raise FetchError(
            "the server ignores Range",
            file=wanted.address,
            remedy="Download the checkpoint, or put it where byte ranges are served.",
        )
    if total.isdigit() and int(total) != wanted.identity.size:
        raise changed(wanted.address, "size", wanted.identity.size, total)


async def _answered(asked: Awaitable[Any], address: str) -> Any:
    """Return an answer; raise what an error means."""
    try:
        return await asked
    except botocore.exceptions.ClientError as error:
        raise _explained(error, address) from error
    except (FileNotFoundError, PermissionError) as error:  # what s3fs makes of some of them
        cause = error.__cause__
        if isinstance(cause, botocore.exceptions.ClientError):
            raise _explained(cause, address) from error
        raise refused(404 if isinstance(error, FileNotFoundError) else 403, address, _CREDENTIALS) from error
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise FetchError(f"needs credentials: {_CREDENTIALS}", file=address) from error
    except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError, ConnectionError) as error:
        raise TransientError(f"no connection ({type(error).__name__})") from error
    except botocore.exceptions.BotoCoreError as error:
        raise FetchError(f"cannot be asked for ({type(error).__name__})", file=address) from error
    except (asyncio.IncompleteReadError, aiohttp.ClientError) as error:
        raise TransientError("the answer ended early") from error
    except OSError as error:
        cause = error.__cause__
        if isinstance(cause, botocore.exceptions.ClientError):
            raise _explained(cause, address) from error
        raise TransientError(f"no connection ({type(error).__name__})") from error


def _explained(error: botocore.exceptions.ClientError, address: str) -> CheckpointError | Exception:
    metadata = error.response.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    if status in TRANSIENT or code in {"SlowDown", "RequestTimeout", "InternalError"}:
        return TransientError(f"HTTP {status}", retry_after(metadata.get("HTTPHeaders", {}).get("retry-after")))
    if status in _CHANGED:
        return changed(address, "tag", "as planned", "another")
    return refused(status, address, _CREDENTIALS)
