"""Answers that no repetition mends, each as an error that names status and remedy."""

from __future__ import annotations

from typing import Final

from paramdelta.errors import FetchError, InputChangedError

DENIED: Final = frozenset({401, 403})


class DeniedError(FetchError):
    """Credentials are missing, or do not suffice."""


def refused(status: int, address: str, credentials: str) -> FetchError:
    """Return the error for an HTTP status that is no success.

    Args:
        credentials: which ones were sent, and where others would be looked for.
    """
    if status in DENIED:
        what = "needs credentials" if status == 401 else "may not be read"
        return DeniedError(f"{what} (HTTP {status}): {credentials}", file=address)
    if status in {404, 410}:
        return FetchError(f"is not there (HTTP {status})", file=address, remedy="Check the spelling.")
    return FetchError(f"cannot be fetched (HTTP {status})", file=address)


def changed(address: str, what: str, before: object, now: object) -> InputChangedError:
    """Return the error for a file that is not the one that was planned with."""
    return InputChangedError(
        f"changed since the merge was planned ({what} {before} → {now})",
        file=address,
        remedy="Leave the inputs alone while a merge runs, then start again.",
    )
