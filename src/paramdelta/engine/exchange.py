"""What one window makes and another needs: put in by one worker, waited for by others."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from paramdelta.errors import CancelledError

if TYPE_CHECKING:
    from collections.abc import Iterable

K = TypeVar("K")
V = TypeVar("V")


class Exchange(Generic[K, V]):
    """Values by key. Windows are handed out in order and need only what earlier ones make: nobody waits in a circle."""

    def __init__(self) -> None:
        self._values: dict[K, V] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def put(self, key: K, value: V) -> None:
        """Give a value to whoever waits for it, now or later."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def wait_for(self, key: K) -> V:
        """Return a value, once it is there.

        Raises:
            CancelledError: the run has been stopped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or key in self._values)
            if self._stopped:
                raise CancelledError("stopped")
            return self._values[key]

    def take(self, keys: Iterable[K]) -> list[V]:
        """Return values that are there, and forget them."""
        with self._changed:
            return [self._values.pop(key) for key in keys]

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
