"""Tensors of more than 2^31 and 2^32 bytes, right to the last element: inputs are holes, the output is looked at."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from paramdelta.engine import pipeline
from paramdelta.engine.budget import Budget, Shape
from paramdelta.planning.plan import make_plan
from paramdelta.planning.recipe import Recipe
from tests.make import sparse_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from paramdelta.engine.progress import FinishedShard
    from paramdelta.planning.layout import OutputShard

SHAPES = {"first": (5,), "huge": ((1 << 16) + 3, (1 << 15) + 1), "large": (1 << 30, 1), "last": (7,)}  # BF16


def nonzero(data: bytes | memoryview) -> int:
    return int(np.count_nonzero(np.frombuffer(data, np.uint8)))


class Looking:
    """A target that keeps the pages in which something is expected, and counts the rest."""

    def __init__(self, places: set[int]) -> None:
        self._pages = {place // 4096 for place in places}
        self.pages: dict[int, bytes] = {}
        self.others = 0
        self._lock = threading.Lock()

    def create(self, _shard: OutputShard) -> Looking:
        return self

    def completed(self, finished: FinishedShard, /) -> None:
        pass

    def write(self, offset: int, window: memoryview) -> None:
        first, last = offset // 4096, (offset + len(window) - 1) // 4096
        found = {page: bytes(window[page * 4096 - offset :][:4096]) for page in self._pages if first <= page <= last}
        inside = np.frombuffer(window, np.uint8)
        others = int(np.count_nonzero(inside)) - sum(
            int(np.count_nonzero(np.frombuffer(f, np.uint8))) for f in found.values()
        )
        with self._lock:
            self.pages |= found
            self.others += others if offset else 0

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def test_the_last_elements_of_huge_tensors_are_right(tmp_path: Path) -> None:
    codes = {"post": 0x4040, "base": 0x3F80, "new_base": 0x4000}  # 3 - 1 + 2 = 4
    for role, code in codes.items():
        sparse_checkpoint(tmp_path / role, SHAPES)
        path = tmp_path / role / "model.safetensors"
        with path.open("r+b") as file:
            data = 8 + int.from_bytes(file.read(8), "little")
            for place in places_of():
                file.seek(data + place)
                file.write(code.to_bytes(2, "little"))
    plan = make_plan(Recipe.of(*(tmp_path / role for role in codes)))
    header = len(plan.shards[0].header)
    wanted = {header + place for place in places_of()}
    looking = Looking(wanted)
    pipeline.run(plan, Budget.of(1 << 30, 4, (8 << 20) - 4096, Shape.of(plan.operations)), "pread", looking)
    found = {place: looking.pages[place // 4096][place % 4096 :][:2] for place in wanted}
    assert set(found.values()) == {(0x4080).to_bytes(2, "little")}
    assert looking.others == 0


def places_of() -> list[int]:
    """Return, in bytes of tensor data, the first and last elements of each tensor, and those around 2^31 and 2^32."""
    sizes = [2 * int(np.prod(shape, dtype=np.int64)) for shape in SHAPES.values()]
    begins = np.cumsum([0, *sizes]).tolist()
    assert sizes[1] > 1 << 32
    assert sizes[2] >= 1 << 31
    ends = [end - 2 for end in begins[1:]]
    powers = [begin + power + step for begin in begins[1:3] for power in (1 << 31, 1 << 32) for step in (-2, 0)]
    return sorted({*begins[:-1], *ends, *(place for place in powers if place < begins[-1])})
