"""Ctrl-C and SIGTERM: the first one stops a merge cleanly, a second one at once."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from paramdelta.errors import CancelledError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


@contextmanager
def cancel_on_signals() -> Iterator[threading.Event]:
    """Yield an event that the first signal sets; a CancelledError inside then carries that signal's exit code.

    A signal that the process was started to ignore (``nohup``) stays ignored.
    """
    cancelled = threading.Event()
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: handler for number, handler in handlers.items() if handler not in {signal.SIG_IGN, None}}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(number)
        cancelled.set()
        restore()

    for number in former:
        signal.signal(number, stop)
    try:
        yield cancelled
    except CancelledError as error:
        error.exit_code = 128 + received[0] if received else error.exit_code
        raise
    finally:
        restore()
