"""Checkpoints for tests, written by hand from the format's definition, with no code of the package.

A tensor is given as ``(dtype, shape, data)``: a dtype as headers spell it, the dimensions, the
little-endian bytes. A dict of tensors is written in its own order. For example::

    tensors = {"w": normal((4, 8)), "b": ("F32", (1,), bytes(4))}
    write_checkpoint(tmp_path / "post", tensors, shards=2, config={"model_type": "llama"})
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

Tensor = tuple[str, Sequence[int], bytes]
Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, Sequence[int]]

FORMAT_PT = {"format": "pt"}
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def skip_without_direct_io(io: str, directory: Path) -> None:
    """Skip the test where `io` is "direct" and the filesystem of `directory` has no direct I/O (some tmpfs)."""
    if io != "direct":
        return
    (directory / "probe").write_bytes(bytes(4096))
    try:
        descriptor = os.open(directory / "probe", os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        pytest.skip(f"no direct I/O in the directory for temporary files: {error}")
    os.close(descriptor)
    (directory / "probe").unlink()


# -- tensors -------------------------------------------------------------------------------------------------


def normal(shape: Sequence[int], dtype: str = "BF16", *, seed: int = 0, scale: float = 0.02) -> Tensor:
    """Return a tensor of Gaussian weights, reproducible from `seed`, as BF16, F16, F32 or F64."""
    values = np.random.default_rng(seed).normal(0.0, scale, tuple(shape))
    return dtype, shape, encode(values, dtype)


def encode(values: Any, dtype: str) -> bytes:
    """Return the bytes of `values` as BF16 (through F32, ties to even), F16, F32, F64 or an integer dtype."""
    if dtype == "BF16":
        bits = np.asarray(values, "<f4").view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    kind = {"F": "f", "I": "i", "U": "u", "B": "b"}[dtype[0]]
    return np.asarray(values, f"<{kind}{BITS[dtype] // 8}").tobytes()


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor of this dtype and shape occupies."""
    return BITS[dtype] * math.prod(shape) // 8


def at_odd_offsets(tensors: Tensors) -> dict[str, Tensor]:
    """Return `tensors` behind a U8 tensor of 3 bytes, so that no data is aligned to its elements."""
    return {"odd.padding": ("U8", (3,), b"\1\2\3"), **tensors}


def llama_shapes(
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 96,
    intermediate: int = 128,
    *,
    kv: int = 32,
    tied: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a Llama model (Llama-3-8B: 4096, 32, 128256, 14336, kv=1024)."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "mlp.down_proj": (hidden, intermediate),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "post_attention_layernorm": (hidden,),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.v_proj": (kv, hidden),
            }.items()
        }
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (vocab, hidden)}


# -- files ---------------------------------------------------------------------------------------------------


def header_bytes(tree: Any, *, align: int = 8) -> bytes:
    """Return the opening of a file whose header is the JSON `tree`, or the bytes `tree` as they are."""
    raw = tree if isinstance(tree, bytes) else json.dumps(tree, separators=(",", ":")).encode()
    if not isinstance(tree, bytes):
        raw += b" " * (-(8 + len(raw)) % align)
    return len(raw).to_bytes(8, "little") + raw


def file_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = FORMAT_PT, *, align: int = 8) -> bytes:
    """Return a whole ``.safetensors`` file; its data begins at a multiple of `align` (1: anywhere)."""
    tree: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        assert len(data) == byte_count(dtype, shape), name
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header_bytes(tree, align=align) + b"".join(bytes(data) for _, _, data in tensors.values())


def write_checkpoint(
    root: Path,
    tensors: Tensors,
    *,
    shards: int | Sequence[Sequence[str]] = 1,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = FORMAT_PT,
    align: int = 8,
) -> Path:
    """Write `tensors` as a checkpoint in the directory `root`, which is made if need be, and return `root`.

    `shards` is how many files, or which tensor names go into each. One file is ``model.safetensors`` without
    an index; several are ``model-00001-of-0000N.safetensors`` with one. ``config.json`` is written if given.
    """
    root.mkdir(parents=True, exist_ok=True)
    split = _split(list(tensors), shards)
    names = _shard_names(len(split))
    for name, members in zip(names, split, strict=True):
        part = {member: tensors[member] for member in members}
        (root / name).write_bytes(file_bytes(part, metadata, align=align))
    if len(split) > 1:
        sizes = sum(len(data) for _, _, data in tensors.values())
        write_index(root, dict(zip(names, split, strict=True)), total_size=sizes)
    if config is not None:
        (root / "config.json").write_text(json.dumps(config, indent=2))
    return root


def write_index(
    root: Path,
    members: Mapping[str, Sequence[str]],
    *,
    total_size: int = 0,
    name: str = "model.safetensors.index.json",
) -> Path:
    """Write the index that says which tensors each shard of `members` holds, and return its path."""
    weight_map = {tensor: shard for shard, tensors in members.items() for tensor in tensors}
    path = root / name
    path.write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2))
    return path


def sparse_checkpoint(root: Path, shapes: Shapes, shards: int = 1, dtype: str = "BF16") -> Path:
    """Write a checkpoint of any size whose data is a hole: real headers, zeros that take no space on disk."""
    root.mkdir(parents=True, exist_ok=True)
    split = _split(list(shapes), shards)
    names = _shard_names(len(split))
    total = 0
    for name, members in zip(names, split, strict=True):
        tree: dict[str, Any] = {"__metadata__": FORMAT_PT}
        position = 0
        for member in members:
            end = position + byte_count(dtype, shapes[member])
            tree[member] = {"dtype": dtype, "shape": list(shapes[member]), "data_offsets": [position, end]}
            position = end
        opening = header_bytes(tree)
        with (root / name).open("wb") as file:
            file.write(opening)
            file.truncate(len(opening) + position)
        total += position
    if len(split) > 1:
        write_index(root, dict(zip(names, split, strict=True)), total_size=total)
    return root


def _split(names: Sequence[str], shards: int | Sequence[Sequence[str]]) -> list[list[str]]:
    if not isinstance(shards, int):
        return [list(members) for members in shards]
    return [list(names[i * len(names) // shards : (i + 1) * len(names) // shards]) for i in range(shards)]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
