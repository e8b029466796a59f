"""What a merge takes from the network: how many bytes, and for how long at a bandwidth that is told or measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paramdelta.planning.units import parse_size
from paramdelta.storage.remote.address import is_remote

if TYPE_CHECKING:
    from paramdelta.planning.plan import Plan

MEASURE: Final = "measure"


@dataclass(frozen=True, slots=True)
class Network:
    """Bytes that come over the network, bytes per second, and the seconds that this takes; None where not known."""

    bytes: int
    bandwidth: float | None
    seconds: float | None


def network_of(plan: Plan, bandwidth: str | int | None = None) -> Network:
    """Return what a merge takes from the network.

    Args:
        bandwidth: bytes per second, like ``100MB``; ``measure`` reads some of the plan's remote files to find out.

    Raises:
        RecipeError: it does not parse.
        FetchError: a file cannot be read, where that is measured.
    """
    wanted = plan.bytes_fetched
    if bandwidth is None or not wanted:
        return Network(wanted, None, None)
    if bandwidth == MEASURE:
        from paramdelta.storage.remote.speed import measure

        rate = measure([(file.path, file.identity) for file in plan.files if is_remote(file.path)])
    else:
        rate = float(parse_size(bandwidth, "bandwidth"))
    return Network(wanted, rate, wanted / rate)
