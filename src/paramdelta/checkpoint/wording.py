"""How names that come out of files appear in messages: quoted, escaped, never longer than a line or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_NAME = 200
LONGEST_LIST = 10


def clipped(name: str) -> str:
    """Return `name`, its middle left out where it is longer than any honest name."""
    if len(name) <= LONGEST_NAME:
        return name
    half = LONGEST_NAME // 2
    return f"{name[:half]}…{name[-half:]}"


def quoted(name: str) -> str:
    """Return `name` in quotes, with control and other unprintable characters escaped."""
    return repr(clipped(name))


def printable(path: str) -> str:
    """Return `path` as it is, or quoted and escaped where printing it could disturb a terminal."""
    return path if path.isprintable() else repr(path)


def listed(items: Sequence[str]) -> str:
    """Return the first ten of `items`, comma-separated, and how many more there are."""
    shown = ", ".join(items[:LONGEST_LIST])
    rest = len(items) - LONGEST_LIST
    return f"{shown} and {rest} more" if rest > 0 else shown
