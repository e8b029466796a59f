"""Serves a directory by byte range on loopback, as fast as the kernel sends: `python -m bench.range_server DIR`.

Prints its port, and ends when its standard input does. A server for benchmarks alone: one request after the other on
each connection, no directories, nothing but GET.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

REQUEST = re.compile(rb"GET (\S+) HTTP/1\.1\r\n")
RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)
LONGEST_REQUEST = 1 << 16


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    root: ClassVar[Path]
    latency: ClassVar[float]

    def handle(self) -> None:
        """Answer until the client goes."""
        connection: socket.socket = self.request
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        try:
            while True:
                while b"\r\n\r\n" not in received:
                    more = connection.recv(LONGEST_REQUEST)
                    if not more:
                        return
                    received += more
                head, _, received = received.partition(b"\r\n\r\n")
                self.answer(connection, head + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return

    def answer(self, connection: socket.socket, head: bytes) -> None:
        """Send one range."""
        time.sleep(self.latency)
        asked, wanted = REQUEST.match(head), RANGE.search(head)
        path = self.root / asked[1].decode().lstrip("/") if asked else self.root
        if wanted is None or not path.is_file():
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
            connection.sendall(
                f'HTTP/1.1 206 Partial Content\r\nContent-Length: {end - begin}\r\nETag: "{size}"\r\n'
                f"Content-Range: bytes {begin}-{end - 1}/{size}\r\n\r\n".encode()
            )
            connection.sendfile(file, begin, end - begin)


class Server(socketserver.ThreadingTCPServer):
    """One thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    given = parser.parse_args()
    Handler.root, Handler.latency = given.root, given.latency
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    main()
