"""Where the shards of a run go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from paramdelta.engine.progress import FinishedShard
    from paramdelta.planning.layout import OutputShard
    from paramdelta.storage.sink import Sink


class Target(Protocol):
    """Where the shards go."""

    def create(self, shard: OutputShard) -> Sink:
        """Return a sink for a shard."""

    def completed(self, finished: FinishedShard, /) -> None:
        """Take note that a shard lies on stable storage."""
