"""The arithmetic of a finished output, done again from its inputs and compared with what is there, window by window."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from paramdelta.checkpoint.files import open_regular, read_exactly
from paramdelta.checkpoint.wording import clipped, printable
from paramdelta.engine import pipeline
from paramdelta.engine.failure import Failure
from paramdelta.errors import CheckpointError, MismatchError
from paramdelta.planning.layout import Layout, OutputShard
from paramdelta.storage import platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from paramdelta.engine.budget import Budget
    from paramdelta.engine.progress import FinishedShard, Progress
    from paramdelta.planning.plan import Plan

_CHUNK: Final = 1 << 20
_MOST_PER_FILE: Final = 20


class Work(NamedTuple):
    """What is computed: a plan, and where in its file each of its shards begins, by the place of a first operation."""

    plan: Plan
    begins: dict[int, int]


def whole(plan: Plan) -> Work:
    """Return the work of computing all of an output."""
    return Work(plan, {shard.first: 0 for shard in plan.shards})


def sample(plan: Plan, share: float, seed: int) -> Work:
    """Return the work of computing a random share of the tensors, at least one; scales come with their weights."""
    groups = list(_groups(plan))
    chosen = sorted(random.Random(seed).sample(range(len(groups)), max(1, round(share * len(groups)))))
    shards = [groups[number] for number in chosen]
    part = replace(plan, layout=Layout(tuple(shard for shard, _ in shards), None))
    return Work(part, {shard.first: begin for shard, begin in shards})


def _groups(plan: Plan) -> Iterator[tuple[OutputShard, int]]:
    """Yield each tensor, its scales with it, as a shard of its own, and where it begins in its file."""
    for shard in plan.shards:
        ends = [*shard.begins[1:], shard.data_bytes]
        first = 0
        for number, place in enumerate(shard.operations):
            if number + 1 < len(ends) and plan.operations[place + 1].op == "scales":
                continue
            begin = shard.begins[first]
            begins = tuple(at - begin for at in shard.begins[first : number + 1])
            yield (
                OutputShard(shard.name, b"", shard.first + first, begins, ends[number] - begin),
                len(shard.header) + begin,
            )
            first = number + 1


def recompute(
    work: Work,
    output: Path,
    budget: Budget,
    io: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> list[Failure]:
    """Return where an output is not what its inputs give. Raises as `pipeline.run`."""
    target = _Comparison(work, output)
    pipeline.run(work.plan, budget, io, target, on_progress, cancelled)
    return sorted(target.failures, key=lambda failure: (failure.file, failure.offset or 0))


def require_same_layout(plan: Plan, output: Path) -> None:
    """See that an output has the shards that a plan makes, header by header.

    Raises:
        MismatchError: it has others: inputs or recipe are not what they were.
    """
    for shard in plan.shards:
        path = output / shard.name
        if not _is_laid_out(path, shard):
            raise MismatchError(
                "is laid out in another way than recipe.yaml and its inputs make it now",
                file=str(path),
                remedy="The arithmetic can be done again only from the very inputs that the output was made of.",
            )


def _is_laid_out(path: Path, shard: OutputShard) -> bool:
    try:
        with open_regular(path) as (descriptor, status):
            header = read_exactly(descriptor, min(len(shard.header), status.st_size), str(path))
    except CheckpointError:
        return False
    return status.st_size == shard.size and header == shard.header


class _Comparison:
    """Compares windows with the output's files."""

    def __init__(self, work: Work, output: Path) -> None:
        self._work, self._output = work, output
        self._lock = threading.Lock()
        self.failures: list[Failure] = []

    def create(self, shard: OutputShard) -> _ComparingSink:
        """Return what compares a shard's windows."""
        path = self._output / shard.name
        begin = self._work.begins[shard.first]
        return _ComparingSink(path, begin, shard.size, lambda place: self._differs(shard, place))

    def completed(self, finished: FinishedShard, /) -> None:
        """Nothing is to be recorded."""

    def _differs(self, shard: OutputShard, place: int) -> None:
        """Take note of a byte, by its place in the shard, that is not what the arithmetic gives."""
        with self._lock:
            if sum(failure.file == shard.name for failure in self.failures) < _MOST_PER_FILE:
                number = bisect_right(shard.begins, place - len(shard.header)) - 1
                tensors = (clipped(self._work.plan.operations[shard.first + number].name),) if number >= 0 else ()
                offset = self._work.begins[shard.first] + place
                self.failures.append(Failure(shard.name, "is not what the inputs give", tensors, offset, 1))


class _ComparingSink:
    """Looks like a file that is written, and reads one instead."""

    def __init__(self, path: Path, begin: int, size: int, differs: Callable[[int], None]) -> None:
        self._path, self._begin, self._size, self._differs = path, begin, size, differs
        with self._refusals():
            self._descriptor = platform.open_for_reading(str(path))

    def write(self, offset: int, window: memoryview) -> None:
        """Compare a window; what reaches beyond the shard is padding."""
        inside = min(len(window), self._size - offset)
        memory = memoryview(bytearray(min(_CHUNK, inside)))
        for at in range(0, inside, _CHUNK):
            made = np.frombuffer(window[at : min(at + _CHUNK, inside)], np.uint8)
            there = np.frombuffer(self._read(offset + at, memory[: len(made)]), np.uint8)
            same = made[: len(there)] == there
            if len(there) < len(made) or not same.all():
                self._differs(offset + at + (len(there) if same.all() else int(np.argmin(same))))
                return

    def _read(self, place: int, memory: memoryview) -> memoryview:
        done = 0
        with self._refusals():
            while done < len(memory):
                count = platform.read_some(self._descriptor, memory[done:], self._begin + place + done)
                if count == 0:
                    break
                done += count
        return memory[:done]

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=printable(str(self._path))) from error

    def finish(self) -> None:
        """Close the file, and let its pages go."""
        platform.drop_cached(self._descriptor, self._begin, self._size)
        self.abandon()

    def abandon(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
