"""How fast files elsewhere come: ranges of them are read for a few seconds, as a run would, and thrown away."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, wait
from itertools import cycle
from typing import TYPE_CHECKING, Final

from paramdelta.storage.remote.service import Range, service_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from paramdelta.storage.identity import FileIdentity
    from paramdelta.storage.remote.service import Service

SECONDS: Final = 3.0
_RANGE: Final = 1 << 20  # of slow lines, too, some are whole before the time is over
_AT_ONCE: Final = 24


def measure(files: Sequence[tuple[str, FileIdentity]], seconds: float = SECONDS) -> float:
    """Return bytes per second, measured over the files in turn. Raises FetchError where one cannot be read."""
    ranges = _ranges(files)
    memories = [bytearray(_RANGE) for _ in range(_AT_ONCE)]
    running: dict[Future[None], tuple[bytearray, int]] = {}
    begin, done = time.perf_counter(), 0
    while memories and (time.perf_counter() - begin < seconds or not done):
        while memories:
            service, wanted = next(ranges)
            memory = memories.pop()
            running[service.start(wanted, memoryview(memory)[: wanted.size])] = memory, wanted.size
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            memory, size = running.pop(future)
            future.result()
            memories.append(memory)
            done += size
    spent = time.perf_counter() - begin
    for future in running:
        future.cancel()
    return done / spent


def _ranges(files: Sequence[tuple[str, FileIdentity]]) -> Iterator[tuple[Service, Range]]:
    """Yield ranges of all files in turn, over and over."""
    opened = [(service_for(address), address, identity) for address, identity in files]
    numbers = dict.fromkeys(range(len(opened)), 0)
    for place in cycle(numbers):
        service, address, identity = opened[place]
        begin = numbers[place] % max(1, identity.size)
        size = min(_RANGE, identity.size - begin)
        numbers[place] = begin + size
        yield service, Range(address, identity, begin, size)
