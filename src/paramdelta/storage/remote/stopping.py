"""Who waits for a server stops waiting where the run is to end, also before its workers have begun."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from paramdelta.errors import CancelledError

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

_CANCELLED: Final[ContextVar[threading.Event | None]] = ContextVar("cancelled", default=None)


@contextlib.contextmanager
def ended_by(cancelled: threading.Event | None) -> Iterator[None]:
    """Let an event end what waits for servers in this thread meanwhile."""
    token = _CANCELLED.set(cancelled)
    try:
        yield
    finally:
        _CANCELLED.reset(token)


def stop_if_ended() -> None:
    """Raise CancelledError where the event is set."""
    cancelled = _CANCELLED.get()
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("stopped on request")
