"""Page-aligned memory whose address is known: where windows are read to, computed in and written from."""

from __future__ import annotations

from paramdelta.storage import platform


class Buffer:
    """``size`` bytes of page-aligned memory, allocated once and used again for every window.

    First touches of fresh pages are slow, so a worker holds on to its buffers for the whole run.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.view = platform.allocate(size)
        self.address = platform.address_of(self.view)
