"""How much RAM a run may hold, and what it does with it: how many workers, and how large a window."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.engine.digests import LEAF
from paramdelta.errors import BudgetError
from paramdelta.planning.units import format_size
from paramdelta.storage.pages import PAGE
from paramdelta.storage.platform import ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from paramdelta.planning.parts import Operation

DEFAULT_MEMORY: Final = 400_000_000
LARGEST_WINDOW: Final = (8 << 20) - ALIGNMENT
"""Bytes. What lies at an odd place is read with a block more than its size: that shall be a power of two, not more."""

DEVICE_WINDOW: Final = (2 << 20) - ALIGNMENT
"""Bytes. The largest window where inputs come from a device without moving parts: the less memory it is told to fill,
the more of that is still in the processor's caches, where it is then read and written. What is mapped costs something
for every window instead, and so does every seek."""

COMFORTABLE_WINDOW: Final = (1 << 20) - ALIGNMENT
SMALLEST_WINDOW: Final = (64 << 10) - ALIGNMENT
RESERVE: Final = 16_000_000
"""Bytes left for what is not a buffer: thread stacks, the allocator's slack, progress display."""

REMOTE_WORKERS: Final = 8
"""How many workers wait for ranges from a network: each has a window's worth of every input under way."""

_DIFFERS: Final = 3_000_000
"""Bytes by which the same process may hold more the next time: what is called the least shall work then, too."""

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_PROCESS_CGROUPS: Final = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan asks of a worker's memory, whatever the size of its tensors.

    Attributes:
        operands: most ranges that any part of an operation is read from: source tensors, and their scales.
        bytes_per_byte: most input bytes for one output byte, rounded up.
        grain: most bytes of a row of blocks that is written, which windows do not cut; 1 where there are none.
        edges: most bytes of scales that a window needs beyond those of its share.
        block: most elements of a block that is written, which are held in f64.
        outputs: how many are made at once, of the same inputs.
    """

    operands: int
    bytes_per_byte: int
    grain: int = 1
    edges: int = 0
    block: int = 0
    outputs: int = 1

    @classmethod
    def of(cls, operations: Iterable[Operation], outputs: int = 1) -> Self:
        """Return the shape of a plan's operations, made for so many outputs at once."""
        operands = bytes_per_byte = grain = 1
        edges = block = 0
        for operation in operations:
            if operation.blocks is not None:
                grain = max(grain, operation.grain * operation.itemsize)
                block = max(block, operation.blocks.rows * operation.blocks.columns)
            for part in operation.parts:
                if not part.operands:
                    continue
                scales = [operand.scale for operand in part.operands if operand.scale is not None]
                bits = sum(DTYPES[operand.dtype].bits for operand in part.operands)
                bits_of_scales = sum(8 * scale.rows * scale.row_bytes for scale in scales)
                share = -(-(bits * part.elements + bits_of_scales) // max(1, part.elements))
                operands = max(operands, len(part.operands) + len(scales))
                bytes_per_byte = max(bytes_per_byte, -(-share // DTYPES[operation.dtype].bits))
                edges = max(edges, sum(2 * scale.row_bytes for scale in scales))
        return cls(operands, bytes_per_byte, grain, edges, block, outputs)

    @property
    def least_window(self) -> int:
        """Bytes of the smallest window that is of use: whole grains fit into it, wherever the first one begins."""
        grains = -(-self.grain // ALIGNMENT) * ALIGNMENT + 2 * ALIGNMENT
        return max(SMALLEST_WINDOW, grains)

    def arena(self, window: int) -> int:
        """Return the bytes that the inputs of one window take, read into a buffer or mapped, whole blocks of each."""
        slack = self.operands * 3 * max(ALIGNMENT, PAGE) + self.edges
        return self.bytes_per_byte * (window + 2 * ALIGNMENT) + slack

    def worker(self, window: int) -> int:
        """Return the bytes of RAM that one worker takes: inputs, and the window with a page of slack on either side.

        Each further output has a window of its own, and two leaves of its digest that the window's boundaries cut.
        """
        made = window + 2 * ALIGNMENT
        return self.arena(window) + made + (self.outputs - 1) * (made + 2 * LEAF) + 8 * self.block


@dataclass(frozen=True, slots=True)
class Budget:
    """How a plan is carried out on this machine; no byte of the output depends on it.

    Attributes:
        memory: most bytes of RSS of the whole process.
        window_bytes: bytes of output in one window; a multiple of 4096.
        arena_bytes: bytes of input buffer that each worker has.
    """

    memory: int
    workers: int
    window_bytes: int
    arena_bytes: int

    @classmethod
    def of(cls, memory: int, workers: int, window_bytes: int, shape: Shape) -> Self:
        """Return the budget of so many workers with windows of this size."""
        return cls(memory, workers, window_bytes, shape.arena(window_bytes))


def decide(
    memory: int | None,
    workers: int | None,
    shape: Shape,
    used: int,
    peak: int,
    largest: int = LARGEST_WINDOW,
    usual: int | None = None,
) -> Budget:
    """Return the budget of a run.

    Args:
        memory: most bytes of RSS, or None for `default_memory`.
        workers: number of worker threads, or None to choose.
        shape: what the plan asks of a worker.
        used: bytes of RSS that the process holds already: interpreter, kernels, plan.
        peak: the most it has held so far.
        largest: most bytes of a window, if no grain asks for more.
        usual: number of workers where memory suffices, `default_workers` where None.

    Raises:
        BudgetError: the memory is too small; the message names the least that works.
    """
    least = max(peak, used + RESERVE + (workers or 1) * shape.worker(shape.least_window))
    if memory is None:
        memory = max(least, default_memory(shape, used))
    if memory < least:
        told = -(-(least + _DIFFERS) // 1_000_000)
        raise BudgetError(
            f"a memory budget of {format_size(memory)} is too small: the least that works here is {told} MB",
            remedy=f"Use --memory {told}MB or more."
            + (f" Fewer than {workers} workers need less." if workers and workers > 1 else "")
            + (f" Fewer than {shape.outputs} outputs at once need less." if shape.outputs > 1 else ""),
        )
    free = memory - used - RESERVE
    chosen = workers or usual or default_workers()
    comfortable = max(COMFORTABLE_WINDOW, shape.least_window)
    while workers is None and chosen > 1 and chosen * shape.worker(comfortable) > free:
        chosen -= 1
    window = max(largest, shape.least_window)
    while window > shape.least_window and chosen * shape.worker(window) > free:
        window = max((window + ALIGNMENT) // 2 - ALIGNMENT, shape.least_window)
    return Budget.of(memory, chosen, window, shape)


def default_memory(shape: Shape, used: int) -> int:
    """Return the bytes of RSS that a run may hold by default, ``used`` of them already.

    The least of `DEFAULT_MEMORY` and a quarter of what is available; but where that is too little to be fast, up to
    half of it.
    """
    available = available_memory()
    fast = RESERVE + default_workers() * shape.worker(max(DEVICE_WINDOW, shape.least_window))
    return min(DEFAULT_MEMORY, max(available // 4, used + min(fast, available // 2)))


def default_workers() -> int:
    """Return how many workers keep processors and disk busy: reading, computing and writing overlap between them."""
    return max(4, min(8, 2 * usable_processors()))


def usable_processors() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes of RAM to be had: the least of the system's view and every memory cgroup on the path."""
    return min([int(psutil.virtual_memory().available), *_cgroup_room()])


def _cgroup_room() -> Iterator[int]:
    """Yield, for each memory cgroup from this process's own up to the root, its limit less what cannot be reclaimed."""
    try:
        lines = _PROCESS_CGROUPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            yield from _rooms(_CGROUP_ROOT, path, ("memory.max", "memory.high"), "memory.current", "")
        elif "memory" in controllers.split(","):
            root = _CGROUP_ROOT / "memory"
            yield from _rooms(root, path, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")


def _rooms(root: Path, path: str, limit_files: tuple[str, ...], usage_file: str, prefix: str) -> Iterator[int]:
    group = root / path.lstrip("/")
    if not group.is_dir():  # inside a container the path is the host's; the mount shows the container's own group
        group = root
    while True:
        limits = [limit for name in limit_files if (limit := _number(group / name)) is not None]
        usage = _number(group / usage_file)
        if limits and usage is not None:
            yield max(0, min(limits) - usage + _reclaimable(group / "memory.stat", prefix))
        if group == root:
            return
        group = group.parent


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def _reclaimable(file: Path, prefix: str) -> int:
    try:
        stat = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))
