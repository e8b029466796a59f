"""Inputs that users try and that cannot be merged, each with its own message and remedy.

`missing_path`, `no_weights`, `refuse_by_name` and `refuse_by_magic` speak while a checkpoint is being opened;
`refuse_unmergeable` speaks when an opened one is about to be planned with, so that it can still be inspected.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NoReturn

from paramdelta.checkpoint.dtypes import ADDABLE, DTYPES, WHOLE_FLOATS
from paramdelta.checkpoint.files import has_directory
from paramdelta.checkpoint.scaling import blocks_of, quantization_settings, strange_key
from paramdelta.checkpoint.wording import clipped, printable, quoted
from paramdelta.errors import CheckpointError, UnsupportedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paramdelta.checkpoint.checkpoint import Checkpoint, TensorRef
    from paramdelta.checkpoint.scaling import Scaling
    from paramdelta.storage.remote.place import Place

_MERGE_ADAPTER = (
    "Merge the adapter into its base first: load both with PEFT, call merge_and_unload(), then "
    "save_pretrained() into a new directory, and pass that."
)
_CONVERT = (
    "Convert to safetensors first: load the model with transformers and save it with "
    "save_pretrained(directory, safe_serialization=True)."
)
_SCALED = (
    "Block-scaled FP8 is merged where quantization_config in config.json describes it: quant_method fp8,"
    " weight_block_size of 16 to 512 either way, fmt e4m3, activation_scheme dynamic. "
)
_ORIGINAL_WEIGHTS = "Use the unquantised weights that it was made from, or dequantise it and save it as bf16."
_UNGGUF = "Use the original safetensors weights; a GGUF file would have to be dequantised and converted back first."

_PICKLED = (".bin", ".pth", ".pt", ".ckpt")
_OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx", ".npz", ".ot", ".tflite", ".mlpackage")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt")


# -- while a checkpoint is being opened ----------------------------------------------------------------------


def missing_path(path: Path) -> CheckpointError:
    """Return the error for a `path` that does not exist."""
    name = str(path)
    remedy = "Check the spelling."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists():
        remedy = f"If this is a model on the Hugging Face Hub, download it first (hf download {name})."
    return CheckpointError("no such file or directory", file=printable(name), remedy=remedy)


def no_weights(root: Place, names: Sequence[str]) -> CheckpointError:
    """Return the error for a directory `root` of files `names`, none of them a model in safetensors."""
    file = printable(str(root))
    if any(name == "adapter_config.json" or name.startswith("adapter_model") for name in names):
        return UnsupportedCheckpointError("a LoRA adapter, not a whole model", file=file, remedy=_MERGE_ADAPTER)
    if any(name.lower().endswith(".gguf") for name in names):
        return UnsupportedCheckpointError("GGUF weights only, no safetensors", file=file, remedy=_UNGGUF)
    if any(name.lower().endswith(_PICKLED) and name not in _NOT_WEIGHTS for name in names):
        return UnsupportedCheckpointError(
            f"pickled weights only ({', '.join(_PICKLED[:3])}), no safetensors", file=file, remedy=_CONVERT
        )
    if any(name.lower().endswith(_OTHER_FRAMEWORKS) for name in names):
        return UnsupportedCheckpointError("weights of another framework, no safetensors", file=file, remedy=_CONVERT)
    if has_directory(root, "snapshots"):
        return CheckpointError(
            "a folder of the Hub's cache, not a checkpoint",
            file=file,
            remedy="Pass snapshots/<revision> inside it.",
        )
    return CheckpointError(
        "no weights here: no .safetensors file and no index",
        file=file,
        remedy="Pass the directory that holds them; subdirectories are not searched.",
    )


def unfinished(root: Place) -> CheckpointError:
    """Return the error for a directory in which a merge has begun and published nothing yet."""
    return CheckpointError(
        "holds an unfinished merge",
        file=printable(str(root)),
        remedy="The command that began it goes on from there: wait for what it publishes, or repeat it.",
    )


def refuse_by_name(path: Place) -> None:
    """Raise UnsupportedCheckpointError where the name of `path` says that it is no safetensors model."""
    file = printable(str(path))
    suffix = path.suffix.lower()
    if path.name.startswith("adapter_model"):
        raise UnsupportedCheckpointError("a LoRA adapter, not a whole model", file=file, remedy=_MERGE_ADAPTER)
    if suffix == ".gguf":
        raise UnsupportedCheckpointError("a GGUF file, not safetensors", file=file, remedy=_UNGGUF)
    if suffix in _PICKLED:
        raise UnsupportedCheckpointError("pickled weights, not safetensors", file=file, remedy=_CONVERT)
    if suffix in _OTHER_FRAMEWORKS:
        raise UnsupportedCheckpointError("weights of another framework, not safetensors", file=file, remedy=_CONVERT)


def refuse_by_magic(prefix: bytes, file: str) -> None:
    """Say what a file is that opens with the 8 bytes `prefix` and is not safetensors; return if unknown.

    Raises UnsupportedCheckpointError for other formats of weights, CheckpointError for what is no weights
    at all.
    """
    if prefix.startswith((b"GGUF", b"GGML", b"ggml", b"tjgg", b"lmgg")):
        raise UnsupportedCheckpointError("a GGUF file, not safetensors", file=file, remedy=_UNGGUF)
    if prefix.startswith((b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        raise UnsupportedCheckpointError(
            "a pickle or zip archive, as torch.save writes them, not safetensors", file=file, remedy=_CONVERT
        )
    if prefix.startswith(b"\x89HDF"):
        raise UnsupportedCheckpointError("an HDF5 file, not safetensors", file=file, remedy=_CONVERT)
    if prefix == b"version ":
        raise CheckpointError(
            "a Git LFS pointer, not the weights themselves", file=file, remedy="Fetch them: git lfs pull."
        )
    if prefix.lstrip()[:1] == b"<":
        raise CheckpointError(
            "a web page, not safetensors",
            file=file,
            remedy="The download failed: log in if need be, and repeat it.",
        )
    if prefix.lstrip()[:1] == b"{":
        raise CheckpointError(
            "a JSON file, not safetensors",
            file=file,
            remedy="Pass the directory, the index or a .safetensors file.",
        )


# -- before an opened checkpoint is merged -------------------------------------------------------------------

_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})

# The last part of a name that packed weights have. The second group decides in any dtype, the first one only
# where the dtype is not that of plain weights.
_PACKED_NAMES = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "q_weight": "EXL2",
    "q_scale": "EXL2",
    "W_q": "HQQ",
    "_data": "quanto",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_format": "bitsandbytes",
}
_COMPANION_NAMES = {
    "absmax": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_scale_inv": "FP8",
}
_ADAPTER_LEAVES = ("weight", "lora_embedding_a", "lora_embedding_b", "lora_a", "lora_b")  # PEFT's, and MLX's
_COMPANION_ENDINGS = tuple(f".{name}" for name in _COMPANION_NAMES)


def refuse_unmergeable(checkpoint: Checkpoint, scaling: Scaling) -> None:
    """Return where `checkpoint` holds weights that can be added element by element, scaled by block or not at all.

    Raises UnsupportedCheckpointError for weights quantised in other ways, recognised by config.json, by dtype or by
    name, whose integers and scales mean nothing apart from each other; and for adapters that were not merged in.
    """
    _refuse_quantization_config(checkpoint)
    tensors = checkpoint.tensors
    known = {*scaling.scales, *scaling.scales.values()}
    for name, ref in tensors.items():
        if name in known:
            continue
        if ".lora_" in name.lower() or ref.dtype not in WHOLE_FLOATS or name.endswith(_COMPANION_ENDINGS):
            form = _form(name, ref, tensors)
            if form == "LoRA":
                _refuse_tensor(checkpoint, name, ref, "a LoRA adapter that is not merged in", _MERGE_ADAPTER)
            if form is not None:
                remedy = (_SCALED if "FP8" in form else "") + _ORIGINAL_WEIGHTS
                _refuse_tensor(checkpoint, name, ref, f"quantised weights ({form})", remedy)


def _form(name: str, ref: TensorRef, tensors: Mapping[str, TensorRef]) -> str | None:
    """Return what form of unmergeable weights a suspicious tensor belongs to, None where it is innocent."""
    leaf = name.rpartition(".")[2]
    if ".lora_" in name.lower() and leaf.lower() in _ADAPTER_LEAVES:
        return "LoRA"
    if leaf in _COMPANION_NAMES:
        return _COMPANION_NAMES[leaf]
    if leaf in _PACKED_NAMES:
        return _PACKED_NAMES[leaf]
    if ".quant_state." in name:
        return "bitsandbytes"
    if ref.dtype in ADDABLE - WHOLE_FLOATS:
        return "FP8 with scales" if _has_scales(name, tensors) else None
    if DTYPES[ref.dtype].is_float and DTYPES[ref.dtype].bits <= 8:
        return ref.dtype
    if leaf.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return "MXFP4"
    if leaf == "weight" and len(ref.shape) >= 2 and ref.dtype in _INTEGERS:
        return "bitsandbytes" if f"{name}.absmax" in tensors else ref.dtype
    return None


def _has_scales(name: str, tensors: Mapping[str, TensorRef]) -> bool:
    """Return whether an FP8 tensor has a companion by which its numbers are to be multiplied."""
    module = name.rpartition(".")[0]
    companions = (f"{name}_scale", f"{name}_scale_inv", f"{module}.scale", f"{module}.scale_weight")
    return "scaled_fp8" in tensors or any(companion in tensors for companion in companions)


def _refuse_tensor(checkpoint: Checkpoint, name: str, ref: TensorRef, what: str, remedy: str) -> NoReturn:
    file = printable(str(checkpoint.shards[ref.shard].path))
    raise UnsupportedCheckpointError(
        f"{what} cannot be merged: tensor {quoted(name)} is one of them",
        file=file,
        tensor=clipped(name),
        remedy=remedy,
    )


def _refuse_quantization_config(checkpoint: Checkpoint) -> None:
    for (*_, key), settings in quantization_settings(checkpoint.config):
        if key == "quantization_config" and blocks_of(settings) is not None:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        strange = strange_key(settings) if method == "fp8" else None
        why = f": its {strange} is {clipped(json.dumps(settings.get(strange)))}" if strange is not None else ""
        raise UnsupportedCheckpointError(
            f"quantised weights ({quoted(str(method)) if method is not None else key}) cannot be merged{why}",
            file=printable(str(checkpoint.root / "config.json")),
            remedy=f"{_SCALED if method == 'fp8' else ''}{_ORIGINAL_WEIGHTS}"
            " If the weights are plain already, remove quantization_config.",
        )
