"""From operations to output shards: which tensor lies where, and every header to the byte."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paramdelta.checkpoint.discovery import MODEL_FILE, MODEL_INDEX
from paramdelta.checkpoint.header import TensorEntry, build_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from paramdelta.checkpoint.checkpoint import Checkpoint
    from paramdelta.planning.parts import Operation

SINGLE_FILE: Final = MODEL_FILE
INDEX_FILE: Final = MODEL_INDEX
_METADATA: Final = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One output file.

    Attributes:
        header: the bytes that open the file, length field and padding included; a multiple of 4096 bytes.
        first: place of its first operation in the plan; its operations follow each other.
        begins: where each of its tensors begins, in bytes from the end of the header.
        data_bytes: bytes of all its tensors.
    """

    name: str
    header: bytes
    first: int
    begins: tuple[int, ...]
    data_bytes: int

    @property
    def operations(self) -> range:
        """Places in the plan of the operations that make this shard."""
        return range(self.first, self.first + len(self.begins))

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """All output shards, and the index that names them (None where a single file is its own index)."""

    shards: tuple[OutputShard, ...]
    index: bytes | None


def lay_out(operations: Sequence[Operation], sizes: Sequence[tuple[str, int]], *, with_index: bool) -> Layout:
    """Return the layout of ``operations`` over shards.

    Args:
        operations: in output order.
        sizes: name of each shard and how many of the operations fall into it, in order.
        with_index: whether an index is written beside the shards.
    """
    shards = []
    first = 0
    for name, count in sizes:
        shards.append(_lay_out_shard(name, first, operations[first : first + count]))
        first += count
    return Layout(tuple(shards), build_index(shards, operations) if with_index else None)


def _lay_out_shard(name: str, first: int, operations: Sequence[Operation]) -> OutputShard:
    entries = []
    begins = []
    position = 0
    for operation in operations:
        begins.append(position)
        end = position + operation.nbytes
        entries.append((operation.name, TensorEntry(operation.dtype, operation.shape, position, end)))
        position = end
    return OutputShard(name, build_header(entries, _METADATA), first, tuple(begins), position)


def build_index(shards: Iterable[OutputShard], operations: Sequence[Operation]) -> bytes:
    """Return the bytes of the index that names every tensor's shard, in the form that transformers writes."""
    shards = list(shards)
    weight_map = {operations[place].name: shard.name for shard in shards for place in shard.operations}
    metadata = {"total_size": sum(shard.data_bytes for shard in shards)}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    return f"{text}\n".encode()


def like_checkpoint(checkpoint: Checkpoint, shards: Iterable[int]) -> list[tuple[str, int]]:
    """Return the shards of ``checkpoint`` with the number of tensors in each; one file becomes model.safetensors.

    Args:
        shards: for each operation, in order, the shard that it falls into. A shard that gets none is left out.
    """
    counts = Counter(shards)
    if checkpoint.index is None:
        return [(SINGLE_FILE, counts.total())]
    return [(shard.name, counts[place]) for place, shard in enumerate(checkpoint.shards) if counts[place]]


def by_size(operations: Iterable[Operation], most_bytes: int) -> list[tuple[str, int]]:
    """Return shards that hold at most ``most_bytes`` of tensors each; a tensor larger than that gets its own."""
    counts: list[int] = []
    filled = 0
    for tensors, size in _inseparable(operations):
        if not counts or filled + size > most_bytes:
            counts.append(0)
            filled = 0
        counts[-1] += tensors
        filled += size
    if len(counts) <= 1:
        return [(SINGLE_FILE, sum(counts))]
    return [(f"model-{number:05}-of-{len(counts):05}.safetensors", n) for number, n in enumerate(counts, start=1)]


def _inseparable(operations: Iterable[Operation]) -> Iterator[tuple[int, int]]:
    """Yield number and bytes of operations that go into one shard together: scales follow what they are found with."""
    tensors = size = 0
    for operation in operations:
        if tensors and operation.op != "scales":
            yield tensors, size
            tensors = size = 0
        tensors, size = tensors + 1, size + operation.nbytes
    if tensors:
        yield tensors, size
