"""Windows in order, to any thread, each with the sink that it goes to; and what windows make for each other."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from paramdelta.engine.digests import Digester
from paramdelta.engine.exchange import Exchange
from paramdelta.engine.windows import Window, cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paramdelta.engine.budget import Budget
    from paramdelta.engine.kernels import Band
    from paramdelta.engine.target import Target
    from paramdelta.planning.plan import Plan
    from paramdelta.storage.sink import Sink


class Feed:
    """Hands out windows in order, to any thread; opens each shard's sink with its first window.

    Attributes:
        bands: what came of each row of blocks, by operation and number: the scales are written by a later window.
        losses: by operation and number: error and size of rows of blocks whose scales are written.
        edges: bytes at the begin of a window that the one before has made, by shard and begin.
        digesters: of each shard that is being written.
    """

    def __init__(self, plan: Plan, budget: Budget, target: Target, done: frozenset[int]) -> None:
        self._lock = threading.Lock()
        self._windows = self._all_windows(plan, budget, target, done)
        self._sinks: dict[int, Sink] = {}
        self._stopped = False
        self.digesters: dict[int, Digester] = {}
        self.bands: Exchange[tuple[int, int], Band] = Exchange()
        self.edges: Exchange[tuple[int, int], bytes] = Exchange()
        self.losses: dict[int, dict[int, tuple[float, float]]] = {}

    def _all_windows(
        self, plan: Plan, budget: Budget, target: Target, done: frozenset[int]
    ) -> Iterator[tuple[Window, Sink]]:
        for number, shard in enumerate(plan.shards):
            if number in done:
                continue
            sink = self._sinks[number] = target.create(shard)
            self.digesters[number] = Digester(shard.size)
            for window in cut(number, shard, plan.operations, budget.window_bytes):
                yield window, sink

    def next(self) -> tuple[Window, Sink] | None:
        """Return the next window and where it goes, None where there are no more."""
        with self._lock:
            return None if self._stopped else next(self._windows, None)

    def take_sink(self, shard: int) -> Sink:
        """Return the sink of a shard all of whose windows are written, and forget it."""
        return self._sinks.pop(shard)

    def stop(self) -> None:
        """Hand out no more windows. Waits for nobody: to create a file may take long where space is zeroed."""
        self._stopped = True
        self.bands.stop()
        self.edges.stop()

    def abandon(self) -> None:
        """Close the sinks of unfinished shards. No worker may be running."""
        while self._sinks:
            _, sink = self._sinks.popitem()
            with suppress(OSError):  # nothing was promised of it
                sink.abandon()
