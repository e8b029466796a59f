"""Windows in order, to any thread, each with the outputs that it goes to; and what windows make for each other."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.engine.digests import Digester
from paramdelta.engine.exchange import Exchange
from paramdelta.engine.windows import Window, cut

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paramdelta.engine.budget import Budget
    from paramdelta.engine.kernels import Band
    from paramdelta.engine.progress import FinishedShard
    from paramdelta.engine.target import Target
    from paramdelta.planning.plan import Plan
    from paramdelta.storage.sink import Sink


class Variant(NamedTuple):
    """One of the outputs that a run makes at once: a plan, where its shards go, and those that are done already.

    Attributes:
        others: numbers of shards that are none of this run's business.
    """

    plan: Plan
    target: Target
    done: tuple[FinishedShard, ...] = ()
    others: frozenset[int] = frozenset()


class Lane:
    """What windows of one output make for each other, and the sinks of its open shards.

    Attributes:
        number: its place among the outputs of the run.
        wanted: numbers of the shards that are to be there in the end, and ``missing`` of those to be made.
        bands: what came of each row of blocks, by operation and number: the scales are written by a later window.
        losses: by operation and number: error and size of rows of blocks whose scales are written.
        edges: bytes at the begin of a window that the one before has made, by shard and begin.
        sinks: of each shard that is being written, and ``digesters`` too.
    """

    def __init__(self, number: int, variant: Variant) -> None:
        self.number = number
        self.plan, self.target, self.done, others = variant
        self.wanted = frozenset(range(len(self.plan.shards))) - others
        self.missing = self.wanted - {shard.number for shard in self.done}
        self.sinks: dict[int, Sink] = {}
        self.digesters: dict[int, Digester] = {}
        self.bands: Exchange[tuple[int, int], Band] = Exchange()
        self.edges: Exchange[tuple[int, int], bytes] = Exchange()
        self.losses: dict[int, dict[int, tuple[float, float]]] = {}

    def open(self, number: int) -> None:
        """Open the sink of a shard."""
        shard = self.plan.shards[number]
        self.sinks[number] = self.target.create(shard)
        self.digesters[number] = Digester(shard.size)

    def take_sink(self, shard: int) -> Sink:
        """Return the sink of a shard all of whose windows are written, and forget it."""
        return self.sinks.pop(shard)

    def stop(self) -> None:
        """Let no window wait for another any longer."""
        self.bands.stop()
        self.edges.stop()

    def abandon(self) -> None:
        """Close the sinks of unfinished shards. No worker may be running."""
        while self.sinks:
            _, sink = self.sinks.popitem()
            with suppress(OSError):  # nothing was promised of it
                sink.abandon()


class Feed:
    """Hands out windows in order, to any thread; opens each shard's sinks with its first window."""

    def __init__(self, lanes: Sequence[Lane], budget: Budget) -> None:
        self._lanes = lanes
        self._lock = threading.Lock()
        self._windows = self._all_windows(budget)
        self._stopped = False

    def _all_windows(self, budget: Budget) -> Iterator[tuple[Window, list[Lane]]]:
        plan = self._lanes[0].plan  # the others have the same shards
        for number, shard in enumerate(plan.shards):
            lanes = [lane for lane in self._lanes if number in lane.missing]
            if not lanes:
                continue
            for lane in lanes:
                lane.open(number)
            for window in cut(number, shard, plan.operations, budget.window_bytes):
                yield window, lanes

    def next(self) -> tuple[Window, list[Lane]] | None:
        """Return the next window and the outputs that lack it, None where there are no more."""
        with self._lock:
            return None if self._stopped else next(self._windows, None)

    def stop(self) -> None:
        """Hand out no more windows. Waits for nobody: to create a file may take long where space is zeroed."""
        self._stopped = True
        for lane in self._lanes:
            lane.stop()

    def abandon(self) -> None:
        """Close the sinks of unfinished shards. No worker may be running."""
        for lane in self._lanes:
            lane.abandon()
