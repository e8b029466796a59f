"""Digests of shards, taken as windows are written: the same however a shard is cut into windows, and in any order.

A file is a row of leaves of 64 KiB, the last one shorter. The digest of a region, 64 leaves, is the sum modulo 2^64 of
XXH3-64 of each leaf, seeded with the leaf's number in the file; that of the file is XXH3-128 of all regions' digests,
as little-endian integers. They find damage, and say where; against forgery they are no protection.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    from typing import Self

LEAF: Final = 1 << 16
REGION: Final = 64 * LEAF
_MODULUS: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class Digest:
    """The digest of a file, in hex: of the whole, and of each of its regions of `REGION` bytes."""

    whole: str
    regions: tuple[str, ...]

    @classmethod
    def of(cls, sums: list[int]) -> Self:
        """Return the digest of a file whose regions have these sums."""
        regions = b"".join(each.to_bytes(8, "little") for each in sums)
        return cls(xxhash.xxh3_128_hexdigest(regions), tuple(f"{each:016x}" for each in sums))


class Digester:
    """Takes the bytes of a file in pieces of any size, in any order, from any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._sums = [0] * -(-size // REGION)
        self._missing = size
        self._cut: dict[int, bytearray] = {}
        self._left: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, begin: int, data: memoryview) -> None:
        """Take the bytes from ``begin`` on; each byte of the file once."""
        sums: dict[int, int] = defaultdict(int)
        end = begin + len(data)
        for number in range(begin // LEAF, -(-end // LEAF)):
            first, last = number * LEAF, min((number + 1) * LEAF, self._size)
            here = data[max(first, begin) - begin : min(last, end) - begin]
            if len(here) == last - first:
                sums[first // REGION] += xxhash.xxh3_64_intdigest(here, number)
            else:
                self._add_cut(number, max(first, begin) - first, last - first, here)
        with self._lock:
            self._missing -= len(data)
            for region, value in sums.items():
                self._sums[region] = (self._sums[region] + value) % _MODULUS

    def _add_cut(self, number: int, offset: int, size: int, data: memoryview) -> None:
        """Keep a part of a leaf that a window's boundary cuts; digest the leaf once all of it is there."""
        with self._lock:
            leaf = self._cut.setdefault(number, bytearray(size))
            leaf[offset : offset + len(data)] = data
            self._left[number] = self._left.get(number, size) - len(data)
            if self._left[number] == 0:
                region = number * LEAF // REGION
                value = xxhash.xxh3_64_intdigest(self._cut.pop(number), number)
                self._sums[region] = (self._sums[region] + value) % _MODULUS
                del self._left[number]

    def result(self) -> Digest:
        """Return the digest.

        Raises:
            ValueError: some bytes have not been taken, or were taken twice.
        """
        if self._missing or self._cut:
            raise ValueError(f"{abs(self._missing)} bytes are missing" if self._missing > 0 else "bytes came twice")
        return Digest.of(self._sums)
