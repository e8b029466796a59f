"""Writes a Llama-shaped bf16 triple (base, post, new base): `python -m bench.triple DIR --model 1b --shards 1`.

Weights are Gaussian with standard deviation 0.02 (norms about 1), deltas Gaussian with 0.0007, which is what
post-training leaves behind in models of this size. A triple is kept on disk and made again only if asked for otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.tensors import BYTES_PER_ELEMENT, TensorSpec, header_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ROLES = ("base", "post", "new_base")
WEIGHT_STD = 0.02
DELTA_STD = 0.0007
CHUNK = 1 << 22  # elements made at a time by one thread
MARKER = "triple.json"
FORMAT = 1  # raise when the bytes that a given set of parameters makes change


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a Llama config that decide its tensors' shapes. Embeddings are tied."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    def tensors(self) -> list[TensorSpec]:
        """Return every tensor, in the order in which they are written."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        specs = [TensorSpec("model.embed_tokens.weight", (self.vocab, self.hidden))]
        for layer in range(self.layers):
            parts = {
                "input_layernorm": (self.hidden,),
                "mlp.down_proj": (self.hidden, self.intermediate),
                "mlp.gate_proj": (self.intermediate, self.hidden),
                "mlp.up_proj": (self.intermediate, self.hidden),
                "post_attention_layernorm": (self.hidden,),
                "self_attn.k_proj": (kv, self.hidden),
                "self_attn.o_proj": (self.hidden, query),
                "self_attn.q_proj": (query, self.hidden),
                "self_attn.v_proj": (kv, self.hidden),
            }
            specs += [TensorSpec(f"model.layers.{layer}.{part}.weight", shape) for part, shape in parts.items()]
        return [*specs, TensorSpec("model.norm.weight", (self.hidden,))]

    def config(self) -> dict[str, object]:
        """Return a config.json that transformers reads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 0,
            "dtype": "bfloat16",
            "eos_token_id": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
        }


MODELS = {
    "1b": ModelShape(2048, 16, 32, 8, 64, 8192, 128256),  # Llama-3.2-1B: 146 tensors, 2,471,628,800 bytes
    "3b": ModelShape(3072, 28, 24, 8, 128, 8192, 128256),  # Llama-3.2-3B: 254 tensors, 6,425,499,648 bytes
    "small": ModelShape(1024, 8, 16, 8, 64, 4096, 128256),  # 74 tensors, 514,361,344 bytes
    "mini": ModelShape(1024, 8, 16, 8, 64, 4096, 32000),  # 74 tensors, 317,229,056 bytes
    "tiny": ModelShape(512, 8, 8, 2, 64, 2048, 32000),
}


@dataclass(frozen=True)
class TripleSpec:
    """What decides a triple's bytes."""

    model: str
    shards: int
    seed: int = 0
    format: int = FORMAT


@dataclass(frozen=True)
class Triple:
    """A triple on disk."""

    directory: Path
    tensor_bytes: int  # of one checkpoint

    def path(self, role: str) -> Path:
        """Return the checkpoint that plays the role."""
        return self.directory / role

    def files(self, roles: Sequence[str] = ROLES) -> list[Path]:
        """Return every weight file of the checkpoints."""
        return [path for role in roles for path in sorted(self.path(role).glob("*.safetensors"))]


@dataclass(frozen=True)
class Chunk:
    """A piece of one tensor, at the same place in all three checkpoints."""

    file: int
    offset: int
    elements: int
    mean: float
    seed: int


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite f32 values to the nearest bf16, ties to even; returns bits, overwrites its argument."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    bits += odd + np.uint32(0x7FFF)
    return (bits >> np.uint32(16)).astype(np.uint16)


def split(tensors: list[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Split into runs of whole tensors of about equal size; fewer than asked for where tensors are too large."""
    target = sum(tensor.nbytes for tensor in tensors) / shards
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes / 2 > target * len(groups):
            groups.append([])
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def file_names(count: int) -> list[str]:
    """Return the names that transformers gives to this number of shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def chunks(groups: list[list[TensorSpec]], seed: int) -> list[Chunk]:
    """Return all pieces of all tensors, each with a seed of its own, so that threads cannot change the bytes."""
    found: list[Chunk] = []
    for file, group in enumerate(groups):
        offset = len(header_bytes(group))
        for tensor in group:
            mean = 1.0 if "norm" in tensor.name else 0.0
            for start in range(0, tensor.elements, CHUNK):
                elements = min(CHUNK, tensor.elements - start)
                place = offset + start * BYTES_PER_ELEMENT
                found.append(Chunk(file, place, elements, mean, seed + len(found)))
            offset += tensor.nbytes
    return found


def write_all(descriptor: int, data: NDArray[np.uint16], offset: int) -> None:
    """Write everything, however short the single writes are."""
    view = memoryview(data.data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_weights(directory: Path, groups: list[list[TensorSpec]], seed: int) -> None:
    """Write the weight files of all three checkpoints side by side, a chunk of each at a time."""
    # Drawing all deltas would take most of the time. Windows into one pool, at random places, are as good here.
    pool = np.random.default_rng(seed).standard_normal(4 * CHUNK, dtype=np.float32) * np.float32(DELTA_STD)
    paths = {role: [directory / role / name for name in file_names(len(groups))] for role in ROLES}
    opened = {role: [path.open("wb") for path in paths[role]] for role in ROLES}
    for files in opened.values():
        for file, group in zip(files, groups, strict=True):
            file.write(header_bytes(group))
            file.flush()

    def write(chunk: Chunk) -> None:
        random = np.random.default_rng(chunk.seed)
        weights = random.standard_normal(chunk.elements, dtype=np.float32)
        weights *= np.float32(WEIGHT_STD)
        weights += np.float32(chunk.mean)
        for role in ROLES:
            values = weights.copy()
            if role != "base":
                start = int(random.integers(0, pool.size - chunk.elements))
                values += pool[start : start + chunk.elements]
            write_all(opened[role][chunk.file].fileno(), to_bfloat16(values), chunk.offset)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for _ in workers.map(write, chunks(groups, seed)):
            pass
    for files in opened.values():
        for file in files:
            os.fsync(file.fileno())
            file.close()


def write_sidecars(directory: Path, shape: ModelShape, groups: list[list[TensorSpec]]) -> None:
    """Write config.json and, for several shards, the index."""
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    if len(groups) > 1:
        names = file_names(len(groups))
        placed = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
        size = sum(tensor.nbytes for group in groups for tensor in group)
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_triple(directory: Path, spec: TripleSpec) -> Triple:
    """Return the triple of this description, made if it is not there yet."""
    shape = MODELS[spec.model]
    tensors = shape.tensors()
    triple = Triple(directory, sum(tensor.nbytes for tensor in tensors))
    marker = directory / MARKER
    if marker.is_file() and json.loads(marker.read_text()) == asdict(spec):
        return triple
    groups = split(tensors, spec.shards)
    marker.unlink(missing_ok=True)
    for role in ROLES:
        shutil.rmtree(directory / role, ignore_errors=True)
        (directory / role).mkdir(parents=True)
        write_sidecars(directory / role, shape, groups)
    write_weights(directory, groups, spec.seed)
    marker.write_text(json.dumps(asdict(spec)) + "\n")
    return triple


def main() -> None:
    """Make a triple from the command line."""
    parser = argparse.ArgumentParser(description="Write a Llama-shaped bf16 triple: base, post, new_base.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--shards", type=int, default=1)
    options = parser.parse_args()
    triple = make_triple(options.directory, TripleSpec(options.model, options.shards))
    print(f"{triple.directory}: 3 x {triple.tensor_bytes:,} bytes of tensors")


if __name__ == "__main__":
    main()
