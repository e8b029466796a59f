"""Just enough of the safetensors format for the benchmarks: bf16 as uint16, which safetensors.numpy cannot name."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

BYTES_PER_ELEMENT = 2  # everything here is bf16


@dataclass(frozen=True)
class TensorSpec:
    """A bf16 tensor to be written."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Count the elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Count the bytes."""
        return self.elements * BYTES_PER_ELEMENT


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: in which file, from which absolute offset on."""

    path: Path
    offset: int
    shape: tuple[int, ...]

    def open(self) -> np.memmap:
        """Return the tensor's bits, mapped read-only, flat."""
        return np.memmap(self.path, dtype=np.uint16, mode="r", offset=self.offset, shape=(prod(self.shape),))


def header_bytes(tensors: list[TensorSpec]) -> bytes:
    """Return length prefix and header of a file that holds the tensors in the given order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """Find all tensors in a checkpoint directory, by name."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}, not BF16")
            found[name] = StoredTensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return found


def count_different(left: Path, right: Path, chunk: int = 1 << 22) -> tuple[int, int]:
    """Count the elements whose bits differ between two checkpoints, and the elements in all.

    Maps one tensor at a time and compares it in chunks, so that memory stays small. Raises ValueError where names or
    shapes differ.
    """
    ours, theirs = read_tensors(left), read_tensors(right)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(f"tensors in only one of the two checkpoints: {', '.join(odd[:5])}")
    different = total = 0
    for name, stored in ours.items():
        if stored.shape != theirs[name].shape:
            raise ValueError(f"{name}: shapes {stored.shape} and {theirs[name].shape}")
        one, other = stored.open(), theirs[name].open()
        for start in range(0, one.size, chunk):
            different += int(np.count_nonzero(one[start : start + chunk] != other[start : start + chunk]))
        total += one.size
    return different, total
