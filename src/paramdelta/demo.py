"""A small Llama-shaped triple, made, merged and checked: the whole program in seconds, with nothing to download."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from safetensors import safe_open

from paramdelta import api
from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.checkpoint.header import TensorEntry, build_header
from paramdelta.errors import OutputError, VerificationError
from paramdelta.storage.sink import output_refused

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from paramdelta.results import MergeResult

HIDDEN: Final = 512
LAYERS: Final = 4
VOCABULARY: Final = 8192


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo did: the merge's own result, and how many elements were checked."""

    merge: MergeResult
    elements: int


def run(
    directory: str | None = None,
    say: Callable[[str], None] | None = None,
    cancelled: threading.Event | None = None,
) -> DemoResult:
    """Make a triple, merge it, check every element.

    Args:
        directory: where to keep triple and result; a temporary directory by default, which is removed.
        say: called with a line on each step.
        cancelled: set it, from any thread, to stop the merge.

    Raises:
        OutputError: ``directory`` is not empty, or cannot be written.
        VerificationError: the result is wrong.
    """
    say = say or _quietly
    with ExitStack() as stack:
        root = Path(directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="paramdelta-demo-")))
        if directory:
            _refuse_used(root)
        say(f"making three Llama-shaped checkpoints ({LAYERS} layers, hidden size {HIDDEN}), sharded differently")
        try:
            make_triple(root)
        except OSError as error:
            raise output_refused(error, root) from error
        say("merging: post - base + new_base")
        result = api.merge(root / "post", root / "base", root / "new_base", root / "merged", cancelled=cancelled)
        say("checking every element against exact arithmetic")
        return DemoResult(result, check(root))


def _refuse_used(root: Path) -> None:
    try:
        used = root.exists() and any(root.iterdir())
    except OSError as error:
        raise output_refused(error, root) from error
    if used:
        raise OutputError("is not empty", file=str(root), remedy="Choose a directory that does not exist, or is empty.")


def _quietly(line: str) -> None:
    """Say nothing."""


def make_triple(root: Path) -> None:
    """Write ``post``, ``base`` and ``new_base`` below ``root``: bf16, with weights and deltas of ordinary size."""
    random = np.random.default_rng(0)
    base = {name: (0.02 * random.standard_normal(shape)).astype(np.float32) for name, shape in _shapes()}
    for name, shards in (("base", 2), ("post", 3), ("new_base", 1)):
        scale = 0.0 if name == "base" else 0.0007
        tensors = {
            key: _to_bf16(weights + scale * random.standard_normal(weights.shape).astype(np.float32))
            for key, weights in base.items()
        }
        _save(root / name, tensors, shards)


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        yield f"{stem}.input_layernorm.weight", (HIDDEN,)
        for projection, rows in (("q", HIDDEN), ("k", HIDDEN // 4), ("v", HIDDEN // 4), ("o", HIDDEN)):
            yield f"{stem}.self_attn.{projection}_proj.weight", (rows, HIDDEN)
        yield f"{stem}.post_attention_layernorm.weight", (HIDDEN,)
        for projection in ("gate", "up"):
            yield f"{stem}.mlp.{projection}_proj.weight", (4 * HIDDEN, HIDDEN)
        yield f"{stem}.mlp.down_proj.weight", (HIDDEN, 4 * HIDDEN)
    yield "model.norm.weight", (HIDDEN,)


def _to_bf16(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (weights.view(np.uint32) >> 16).astype(np.uint16)


def _save(directory: Path, tensors: dict[str, NDArray[np.uint16]], shards: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        entries = []
        position = 0
        for name in part:
            end = position + tensors[name].nbytes
            entries.append((name, TensorEntry("BF16", tensors[name].shape, position, end)))
            position = end
            weight_map[name] = file
        header = build_header(entries, {"format": "pt"})
        (directory / file).write_bytes(header + b"".join(tensors[name].tobytes() for name in part))
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def check(root: Path) -> int:
    """Compare every element of ``root/merged`` with integer arithmetic on the triple; return how many there are.

    Weights of this size are multiples of 2⁻⁴⁸, so their sums are exact as integers of that unit.

    Raises:
        VerificationError: an element differs, or the safetensors library cannot open the output.
    """
    checkpoints = [open_checkpoint(root / name) for name in ("post", "base", "new_base", "merged")]
    elements = 0
    for name in checkpoints[0].tensors:
        codes = []
        for checkpoint in checkpoints:
            ref = checkpoint.tensors[name]
            with Path(checkpoint.shards[ref.shard].path).open("rb") as file:
                codes.append(np.fromfile(file, np.uint16, ref.nbytes // 2, offset=ref.offset))
        post, base, new = (_fixed_point(code) for code in codes[:3])
        if not np.array_equal(_round_to_bf16(post - base + new), codes[3]):
            raise VerificationError("does not hold the exact result", file=str(root / "merged"), tensor=name)
        elements += codes[0].size
    for shard in checkpoints[3].shards:
        with safe_open(shard.path, framework="numpy") as library:
            if len(list(library.keys())) != len(checkpoints[3].tensors):
                raise VerificationError("reads differently through the safetensors library", file=str(shard.path))
    return elements


def _fixed_point(code: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Return bf16 codes as integers in units of 2⁻⁴⁸."""
    exponent = (code >> 7 & 0xFF).astype(np.int64)
    significand = (code & 0x7F).astype(np.int64) + 0x80
    shift = exponent - 127 - 7 + 48
    if shift.min(initial=0) < 0 or exponent.max(initial=0) > 127:
        raise VerificationError("a weight of the demo is too small or too large to be checked with 64-bit integers")
    magnitude = significand << shift
    return np.where(code >> 15, -magnitude, magnitude)


def _round_to_bf16(sums: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Return integers in units of 2⁻⁴⁸, rounded to bf16 to nearest, ties to even."""
    magnitude = np.abs(sums)
    length = np.frexp(magnitude.astype(np.float64))[1].astype(np.int64)  # exact: sums are below 2⁵³
    dropped = np.maximum(length - 8, 0)
    kept = magnitude >> dropped
    rest = magnitude - (kept << dropped)
    half = np.where(dropped > 0, np.int64(1) << np.maximum(dropped - 1, 0), 1)
    kept += (rest > half) | ((rest == half) & (dropped > 0) & (kept & 1 == 1))
    kept <<= np.maximum(8 - length, 0)
    code = ((length - 1 - 48 + 127) << 7) + (kept - 0x80)  # a carry out of the significand raises the exponent
    return np.where(magnitude == 0, 0, code | np.where(sums < 0, 0x8000, 0)).astype(np.uint16)
