"""What a run reports: how far it is, and what it found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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


class Requantised(NamedTuple):
    """What a tensor lost when it was written as block-scaled FP8: sums of squares of the errors, and of the results.

    Blocks that were copied are in neither.
    """

    tensor: str
    error: float
    size: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found out: new non-finite values by tensor, the backends that read the inputs, what FP8 lost."""

    nonfinite: dict[str, NonFinite]
    backends: tuple[str, ...]
    requantised: tuple[Requantised, ...]
