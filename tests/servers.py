"""Servers on loopback for tests of remote files: ranges, tags, redirects, tokens, and everything that goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_PIECE = 64 << 10
_STALL_SECONDS = 3.0


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    path: str
    begin: int
    end: int
    headers: dict[str, str]  # names in lower case

    @property
    def size(self) -> int:
        """Bytes that were asked for."""
        return self.end - self.begin


Fault = str
"""What goes wrong with one answer: ``reset``, ``short``, ``stall``, ``ignore-range``, ``gzip``, ``other-range``, or a
status like ``503``, with seconds of Retry-After as in ``429:0.2``."""


@dataclass
class Script:
    """What goes wrong, and with which requests.

    Attributes:
        choose: the fault of a request, None for none.
        latency: seconds before each answer.
        seen: all requests so far.
        most: how many requests for bytes behind the headers were under way at the same time.
    """

    choose: Callable[[Request], Fault | None] = lambda _: None
    latency: float = 0.0
    seen: list[Request] = field(default_factory=list)
    most: int = 0
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def once(self, fault: Fault, times: int = 1, first: int = 1) -> None:
        """Let the next so many requests go wrong for bytes from ``first`` on: by default not those for headers."""
        left = [times]

        def choose(request: Request) -> Fault | None:
            with self.lock:
                if request.begin < first or not left[0]:
                    return None
                left[0] -= 1
                return fault

        self.choose = choose


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients go away in the middle, and are meant to."""


class FileServer:
    """Serves the files below a directory by range, tagged with a digest of their size and time of change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.script = Script()
        self.tags: dict[str, str | None] = {}
        self.required: Callable[[Request], int | None] = lambda _: None
        handler = type("Handler", (_Handler,), {"server_of_files": self})
        self._server = _Quiet(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def seen(self) -> list[Request]:
        """All requests so far."""
        return self.script.seen

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def tag(self, path: Path) -> str | None:
        """Return the entity tag of a file."""
        name = path.relative_to(self.root).as_posix()
        if name in self.tags:
            return self.tags[name]
        status = path.stat()
        return hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:32]

    def answer(self, handler: _Handler, request: Request) -> None:
        """Answer one request."""
        path = self.root / urlsplit(request.path).path.lstrip("/")
        if not path.is_file():
            handler.refuse(404)
            return
        handler.send_file(path, request, self.tag(path))


class HubServer(FileServer):
    """What the Hub's client asks of the Hub: models at commits, files that are redirected to a second host.

    The directory has ``org/name`` below it. Tokens are asked for where ``gated`` says so.
    """

    commit: ClassVar[str] = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root: Path, storage: FileServer) -> None:
        super().__init__(root)
        self.storage = storage
        self.revisions = {"main": self.commit, self.commit: self.commit}
        self.gated: dict[str, str] = {}
        self.uses_of_signature = 1_000_000
        self.leaked = False  # whether a token came to the second host
        self._signatures: dict[str, int] = {}
        storage.required = self._check_signature

    def _check_signature(self, request: Request) -> int | None:
        self.leaked |= "authorization" in request.headers
        [signature] = parse_qs(urlsplit(request.path).query).get("signature", [""])
        with self.script.lock:
            left = self._signatures.get(signature, 0)
            self._signatures[signature] = left - 1
        return None if left > 0 else 403

    def answer(self, handler: _Handler, request: Request) -> None:
        """Answer one request."""
        parts = urlsplit(request.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._answer_model(handler, request, "/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self._answer_file(handler, request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            handler.refuse(404)

    def _refusal(self, request: Request, name: str) -> tuple[int, str] | None:
        token = self.gated.get(name)
        if token is None:
            return None
        given = request.headers.get("authorization", "")
        if not given:
            return 401, "GatedRepo"
        return None if given == f"Bearer {token}" else (403, "GatedRepo")

    def _answer_model(self, handler: _Handler, request: Request, name: str, revision: str) -> None:
        folder = self.root / name
        if not folder.is_dir():
            handler.refuse(401, {"X-Error-Code": "RepoNotFound"})
        elif (refusal := self._refusal(request, name)) is not None:
            handler.refuse(refusal[0], {"X-Error-Code": refusal[1]})
        elif revision not in self.revisions:
            handler.refuse(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [self._sibling(path) for path in sorted(folder.iterdir())]
            handler.send_json({"id": name, "sha": self.revisions[revision], "siblings": siblings})

    def _sibling(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": self.tag(path)}
        if path.suffix == ".safetensors":
            found["lfs"] = {"sha256": self.tag(path), "size": path.stat().st_size, "pointerSize": 100}
        return found

    def _answer_file(self, handler: _Handler, request: Request, name: str, revision: str, file: str) -> None:
        path = self.root / name / file
        if (refusal := self._refusal(request, name)) is not None:
            handler.refuse(refusal[0], {"X-Error-Code": refusal[1]})
        elif revision not in self.revisions or not path.is_file():
            handler.refuse(404, {"X-Error-Code": "EntryNotFound"})
        elif path.suffix != ".safetensors":
            handler.send_file(path, request, self.tag(path), {"X-Repo-Commit": self.revisions[revision]})
        else:
            signature = f"secret{time.monotonic_ns()}"
            self._signatures[signature] = self.uses_of_signature
            handler.refuse(
                302,
                {
                    "Location": f"{self.storage.url}/{name}/{file}?signature={signature}",
                    "X-Repo-Commit": self.revisions[revision],
                    "X-Linked-Etag": f'"{self.tag(path)}"',
                    "X-Linked-Size": str(path.stat().st_size),
                },
            )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_files: FileServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._do()

    def do_GET(self) -> None:
        """Answer with a body."""
        self._do()

    do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _do(self) -> None:
        server = self.server_of_files
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        begin, end = (int(found[1]), int(found[2]) + 1) if found else (0, 0)
        request = Request(
            self.command, self.path, begin, end, {name.lower(): value for name, value in self.headers.items()}
        )
        script = server.script
        with script.lock:
            script.seen.append(request)
            script.under_way += begin > 0
            script.most = max(script.most, script.under_way)
        time.sleep(script.latency)
        with script.lock:
            script.under_way -= begin > 0
        status = server.required(request)
        if status is not None:
            self.refuse(status)
            return
        self.fault = server.script.choose(request)
        if self.fault is not None and self.fault[0].isdigit():
            code, _, seconds = self.fault.partition(":")
            self.refuse(int(code), {"Retry-After": seconds} if seconds else {})
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            server.answer(self, request)

    def refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Answer with a status and nothing else."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, content: Any) -> None:
        """Answer with JSON."""
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: Path, request: Request, tag: str | None, more: dict[str, str] | None = None) -> None:
        """Answer with a file, or the range of it that was asked for."""
        size = path.stat().st_size
        whole = request.end == 0 or self.fault == "ignore-range"
        begin, end = (0, size) if whole else (request.begin, min(request.end, size))
        if begin >= size and not whole:
            self.refuse(416, {"Content-Range": f"bytes */{size}"})
            return
        if self.fault == "other-range":
            begin += 1
        self.send_response(200 if whole else 206)
        if not whole:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        if tag is not None:
            self.send_header("ETag", f'"{tag}"')
        if self.fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:

            def read(first: int, last: int) -> bytes:
                file.seek(first)
                return file.read(last - first)

            self.send_body(read, begin, end)

    def send_body(self, read: Callable[[int, int], bytes], begin: int, end: int) -> None:
        """Send bytes [begin, end), or half of them where that is what goes wrong."""
        cut = begin + (end - begin) // 2 if self.fault in {"reset", "short", "stall"} else end
        for at in range(begin, cut, _PIECE):
            self.wfile.write(read(at, min(at + _PIECE, cut)))
        if self.fault == "stall":
            time.sleep(_STALL_SECONDS)
        if cut < end:
            self.close_connection = True
        if self.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class Relay(FileServer):
    """Hands requests on to another server, and its answers back, but for what goes wrong on the way."""

    def __init__(self, upstream: str) -> None:
        super().__init__(Path())
        self._upstream = urlsplit(upstream)

    def answer(self, handler: _Handler, request: Request) -> None:
        """Answer one request with what the other server says."""
        connection = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port or 80, timeout=30)
        length = int(request.headers.get("content-length", "0"))
        body = handler.rfile.read(length) if length else None
        connection.request(request.method, request.path, body=body, headers=request.headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"content-length", "transfer-encoding", "connection", "date", "server"}:
                handler.send_header(name, value)
        size = answer.headers["Content-Length"] if request.method == "HEAD" else str(len(content))
        handler.send_header("Content-Length", size or "0")
        handler.end_headers()
        if request.method != "HEAD":
            handler.send_body(lambda begin, end: content[begin:end], 0, len(content))
