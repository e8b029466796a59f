"""Fetches files by range with the client library alone, and drops them: `python -m bench.fetch_only URL:BYTES …`.

What fsspec reaches when nothing is done with the bytes: the same library, ranges and number of requests at once as
in a merge.
"""

from __future__ import annotations

import argparse
import asyncio

import fsspec


async def fetch(files: list[tuple[str, int]], size: int, at_once: int) -> int:
    """Return how many bytes came."""
    client = fsspec.filesystem("http", asynchronous=True, loop=asyncio.get_running_loop())
    gate = asyncio.Semaphore(at_once)

    async def one(url: str, begin: int, end: int) -> int:
        async with gate:
            return len(await client._cat_file(url, start=begin, end=end))

    places = range(0, max(length for _, length in files), size)  # a range of each file in turn, as a merge asks
    wanted = [(url, at, min(at + size, length)) for at in places for url, length in files if at < length]
    try:
        return sum(await asyncio.gather(*(one(*each) for each in wanted)))
    finally:
        await (await client.set_session()).close()


def main() -> None:
    """Fetch everything, and check that all of it came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="URL and size in bytes, with a colon between them")
    parser.add_argument("--range", type=int, required=True, help="bytes of each request")
    parser.add_argument("--at-once", type=int, required=True, help="how many requests are under way")
    given = parser.parse_args()
    files = [(url, int(length)) for url, _, length in (each.rpartition(":") for each in given.files)]
    came = asyncio.run(fetch(files, given.range, given.at_once))
    if came != sum(length for _, length in files):
        raise SystemExit(f"{came:,} bytes came")


if __name__ == "__main__":
    main()
