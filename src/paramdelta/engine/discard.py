"""A target that keeps nothing: for runs that are made for what they count."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paramdelta.engine.progress import FinishedShard
    from paramdelta.planning.layout import OutputShard


class Discard:
    """A target whose shards go nowhere."""

    def create(self, shard: OutputShard) -> _Nowhere:  # noqa: ARG002 - as `Target` has it
        """Return a sink that drops what is written to it."""
        return _Nowhere()

    def completed(self, finished: FinishedShard, /) -> None:
        """Nothing is to be recorded."""


class _Nowhere:
    """A sink of nothing."""

    def write(self, offset: int, window: memoryview) -> None:
        """Drop a window."""

    def finish(self) -> None:
        """Nothing lies anywhere."""

    def abandon(self) -> None:
        """Nothing is to be cleared."""
