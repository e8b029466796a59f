"""What a run reports: how far it is, and what it found out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: bytes of output written, of how many, and the shards that are complete."""

    done: int
    total: int
    shards_done: int
    shards: int


@dataclass(frozen=True, slots=True)
class NonFinite:
    """How many elements of a tensor became infinite or NaN although no law copied them."""

    infinities: int
    nans: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found out: tensors with new non-finite values, and the backends that read the inputs."""

    nonfinite: dict[str, NonFinite]
    backends: tuple[str, ...]
