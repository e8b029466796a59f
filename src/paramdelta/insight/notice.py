"""Something to know of numbers before they are believed."""

from __future__ import annotations

from typing import NamedTuple


class Notice(NamedTuple):
    """What makes numbers doubtful: a code for scripts, a message for people."""

    code: str
    message: str
