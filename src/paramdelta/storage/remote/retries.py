"""When to ask a server again, and for how long to wait before."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be another the next time."""

MOST_ASKED: Final = 300.0


class TransientError(Exception):
    """What may go better the next time.

    Attributes:
        reason: what a user is told of it.
        wait: seconds to wait, where the server names them.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        tries: how often in a row a request may bring no byte.
        asking: how often a question may go wrong that is asked before anything is under way.
        first: seconds before the second try; each further wait is twice as long.
        longest: most seconds of such a wait.
        stall: seconds without a byte after which a request is given up.
    """

    tries: int = 10
    asking: int = 5
    first: float = 0.5
    longest: float = 30.0
    stall: float = 30.0

    def wait(self, tried: int, asked: float | None) -> float:
        """Return for how many seconds to wait after so many tries without a byte.

        Between half and all of what doubles each time: clients that failed together do not come back together.
        """
        most = min(self.longest, self.first * 2.0 ** min(tried, 30))
        return max(random.uniform(most / 2, most), min(asked or 0.0, MOST_ASKED))


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a ``Retry-After`` asks for; of dates, which need a right clock, nothing is made."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
