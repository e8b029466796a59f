"""A file elsewhere as the source of a run: ranges are asked for at once, and arrive in the caller's buffers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from typing import TYPE_CHECKING

from paramdelta.errors import CancelledError
from paramdelta.storage import pages
from paramdelta.storage.platform import ALIGNMENT
from paramdelta.storage.remote.service import Range, service_for
from paramdelta.storage.source import Loan

if TYPE_CHECKING:
    from paramdelta.storage.identity import FileIdentity


class RemoteSource:
    """Ranges of one file elsewhere, as it was when the merge was planned."""

    backend = "remote"

    def __init__(self, address: str, identity: FileIdentity) -> None:
        self._address = address
        self._identity = identity
        self._service = service_for(address)
        self._lock = threading.Lock()
        self._arriving: dict[int, concurrent.futures.Future[None]] = {}
        self._interrupted = False

    def room(self, size: int) -> int:
        """Return ``size``, rounded up so that the next range starts aligned."""
        return -(-size // ALIGNMENT) * ALIGNMENT

    def borrow(self, offset: int, size: int, memory: memoryview) -> Loan:
        """Ask for a range: it is there once `await_range` has returned."""
        loan = Loan(pages.address_of(memory), size)
        with self._lock:
            if self._interrupted:
                raise CancelledError("stopped on request")
            wanted = Range(self._address, self._identity, offset, size)
            self._arriving[loan.address] = self._service.start(wanted, memory[:size])
        return loan

    def await_range(self, loan: Loan) -> None:
        """Wait until a range has arrived.

        Raises:
            FetchError: it cannot be had.
            InputChangedError: the file is another one now.
            CancelledError: `interrupt` was called.
        """
        with self._lock:
            future = self._arriving[loan.address]
        try:
            future.result()
        except concurrent.futures.CancelledError as error:
            raise CancelledError("stopped on request") from error

    def give_back(self, loan: Loan) -> None:
        """Say that a range is no longer used."""
        with self._lock:
            self._arriving.pop(loan.address, None)

    def interrupt(self) -> None:
        """Give up all ranges that have not arrived, and take no more."""
        with self._lock:
            self._interrupted = True
            arriving = list(self._arriving.values())
        for future in arriving:
            future.cancel()

    def close(self) -> None:
        """Wait until nothing arrives any more. No range may be in use."""
        self.interrupt()
        for future in self._arriving.values():
            with contextlib.suppress(Exception, concurrent.futures.CancelledError):
                future.exception(timeout=1)
