"""What a run reports: how far it is, and what it found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from paramdelta.engine.digests import Digest
    from paramdelta.engine.sums import Measured


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: bytes of output written, of how many, and the shards that are complete.

    ``resumed`` of the bytes were written by earlier runs.
    """

    done: int
    total: int
    shards_done: int
    shards: int
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class NonFinite:
    """How many elements of a tensor became infinite or NaN although no law copied them."""

    infinities: int
    nans: int

    def plus(self, more: NonFinite) -> NonFinite:
        """Return both together."""
        return NonFinite(self.infinities + more.infinities, self.nans + more.nans)


class Requantised(NamedTuple):
    """What a tensor lost when it was written as block-scaled FP8: sums of squares of the errors, and of the results.

    Blocks that were copied are in neither.
    """

    tensor: str
    error: float
    size: float


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What is known of a shard once it lies on stable storage, and what must not be forgotten of it.

    Attributes:
        number: its place in the plan.
        nonfinite: new infinities and NaNs, by tensor.
        requantised: what tensors lost as block-scaled FP8.
        measured: what the deltas come to, by tensor; those without deltas are not there.
    """

    number: int
    digest: Digest
    nonfinite: dict[str, NonFinite]
    requantised: tuple[Requantised, ...]
    measured: dict[str, Measured]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found out: of each shard, in order, and the backends that read the inputs."""

    shards: tuple[FinishedShard, ...]
    backends: tuple[str, ...]

    @property
    def nonfinite(self) -> dict[str, NonFinite]:
        """New infinities and NaNs, by tensor."""
        return {name: found for shard in self.shards for name, found in shard.nonfinite.items()}

    @property
    def measured(self) -> dict[str, Measured]:
        """What the deltas come to, by tensor."""
        return {name: found for shard in self.shards for name, found in shard.measured.items()}

    @property
    def requantised(self) -> tuple[Requantised, ...]:
        """What tensors lost as block-scaled FP8."""
        return tuple(lost for shard in self.shards for lost in shard.requantised)
