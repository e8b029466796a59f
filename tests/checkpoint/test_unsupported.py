from __future__ import annotations

import io
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.checkpoint.scaling import scaling_of
from paramdelta.checkpoint.unsupported import refuse_unmergeable
from paramdelta.errors import CheckpointError, UnsupportedCheckpointError
from tests.make import Tensor, byte_count, normal, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return buffer.getvalue()


GGUF = b"GGUF\3\0\0\0" + bytes(16)
PICKLES = [pickle.dumps({"w": [1.0]}, protocol) for protocol in (2, 3, 4, 5)]

# -- at open -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "what", "remedy"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter", "merge_and_unload"),
        (["adapter_config.json", "adapter_model.bin"], "LoRA adapter", "merge_and_unload"),
        (["config.json", "pytorch_model.bin"], "pickled", "safe_serialization"),
        (["consolidated.00.pth", "params.json"], "pickled", "safe_serialization"),
        (["model.pt"], "pickled", "safe_serialization"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pickled", "safe_serialization"),
        (["config.json", "model-Q4_K_M.gguf"], "GGUF", "original"),
        (["tf_model.h5"], "another framework", "safe_serialization"),
    ],
)
def test_directories_of_other_weights(tmp_path: Path, names: list[str], what: str, remedy: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UnsupportedCheckpointError, match=what) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(tmp_path)
    assert caught.value.exit_code == 3
    assert remedy in str(caught.value)


@pytest.mark.parametrize("names", [[], ["config.json", "training_args.bin", "optimizer.pt"]])
def test_directories_without_weights(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no weights here") as caught:
        open_checkpoint(tmp_path)
    assert not isinstance(caught.value, UnsupportedCheckpointError)


@pytest.mark.parametrize(
    ("name", "raw", "what"),
    [
        ("adapter_model.safetensors", b"", "LoRA adapter"),
        ("model.gguf", GGUF, "GGUF"),
        ("model.safetensors", GGUF, "GGUF"),
        ("pytorch_model.bin", b"", "pickled"),
        ("consolidated.00.pth", b"", "pickled"),
        ("model.PT", b"", "pickled"),
        ("model.safetensors", zip_archive(), "pickle or zip"),
        *(("model.safetensors", raw, "pickle or zip") for raw in PICKLES),
        ("model.safetensors", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("model.safetensors", b"<!DOCTYPE html>", "web page"),
        ("config.json", b'{"model_type": "llama"}', "JSON file"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, raw: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=what) as caught:
        open_checkpoint(tmp_path / name)
    assert caught.value.file == str(tmp_path / name)
    assert caught.value.remedy


# -- before a merge ------------------------------------------------------------------------------------------


def tensor(dtype: str, *shape: int) -> Tensor:
    return dtype, shape, bytes(byte_count(dtype, shape))


def refusal(
    root: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None
) -> UnsupportedCheckpointError | None:
    checkpoint = open_checkpoint(write_checkpoint(root, {"norm.weight": normal((4,)), **tensors}, config=config))
    try:
        refuse_unmergeable(checkpoint, scaling_of(checkpoint))
    except UnsupportedCheckpointError as error:
        return error
    return None


PACKED: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "gptq": (
        {
            "q.qweight": tensor("I32", 1, 8),
            "q.qzeros": tensor("I32", 1, 1),
            "q.scales": tensor("F16", 1, 8),
            "q.g_idx": tensor("I32", 8),
        },
        "q.qweight",
        "GPTQ",
    ),
    "awq": ({"q.qweight": tensor("I32", 8, 1), "q.scales": tensor("F16", 1, 8)}, "q.qweight", "AWQ"),
    "bitsandbytes 4-bit": (
        {
            "q.weight": tensor("U8", 8, 1),
            "q.weight.absmax": tensor("F32", 1),
            "q.weight.quant_map": tensor("F32", 16),
            "q.weight.quant_state.bitsandbytes__nf4": tensor("U8", 9),
        },
        "q.weight",
        "bitsandbytes",
    ),
    "bitsandbytes state": (
        {"q.weight.quant_state.bitsandbytes__nf4": tensor("U8", 9)},
        "q.weight.quant_state.bitsandbytes__nf4",
        "bitsandbytes",
    ),
    "bitsandbytes 8-bit": ({"q.SCB": tensor("F32", 8), "q.weight": tensor("I8", 8, 8)}, "q.SCB", "bitsandbytes"),
    "mxfp4": (
        {"mlp.gate_blocks": tensor("U8", 2, 4, 16), "mlp.gate_scales": tensor("U8", 2, 4)},
        "mlp.gate_blocks",
        "MXFP4",
    ),
    "compressed-tensors": (
        {"q.weight_packed": tensor("I32", 8, 1), "q.weight_scale": tensor("BF16", 8, 1)},
        "q.weight_packed",
        "compressed-tensors",
    ),
    "fp8": ({"q.weight": tensor("F8_E4M3", 8, 8), "q.weight_scale_inv": tensor("F32", 1, 1)}, "q.weight", "FP8"),
    "fp8 scales first": ({"q.weight_scale_inv": tensor("F32", 1, 1)}, "q.weight_scale_inv", "FP8"),
    "fp4": ({"q.weight": tensor("F4", 8, 8)}, "q.weight", "F4"),
    "int8": ({"q.weight": tensor("I8", 8, 8)}, "q.weight", "I8"),
    "lora of MLX": ({"q_proj.lora_a": tensor("F32", 2, 8)}, "q_proj.lora_a", "merge_and_unload"),
    "lora": ({"q.lora_A.default.weight": tensor("F32", 2, 8)}, "q.lora_A.default.weight", "merge_and_unload"),
}


@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_are_refused_by_name_or_dtype(tmp_path: Path, form: str) -> None:
    tensors, first, what = PACKED[form]
    error = refusal(tmp_path, tensors)
    assert error is not None
    assert (error.tensor, error.file) == (first, str(tmp_path / "model.safetensors"))
    assert what in str(error)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "fp8"}, "model_type": "x"},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_a_quantization_config_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    error = refusal(tmp_path, {}, config)
    assert error is not None
    assert (error.tensor, error.file) == (None, str(tmp_path / "config.json"))
    assert "'fp8'" in error.message
    assert "remove quantization_config" in str(error)


def test_a_quantization_config_that_says_nothing_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, {}, {"quantization_config": {}}) is not None


def test_honest_integers_masks_and_scales_pass(tmp_path: Path) -> None:
    tensors = {
        "position_ids": tensor("I64", 1, 8),
        "attn.bias": tensor("BOOL", 1, 1, 8, 8),
        "attn.mask": tensor("U8", 8, 8),
        "bn.num_batches_tracked": tensor("I64"),
        "layer.scales": tensor("BF16", 8),
        "conv.weight_scale": tensor("F32", 8),
        "moe.res_blocks": tensor("BF16", 8),
        "fft.weight": tensor("C64", 2, 2),
        "W_q": tensor("BF16", 8, 8),
    }
    assert refusal(tmp_path, tensors, {"quantization_config": None, "rope_scaling": {"factor": 8}}) is None


def test_a_compression_config_counts_beside_an_empty_quantization_config(tmp_path: Path) -> None:
    config = {"quantization_config": None, "compression_config": {"quant_method": "compressed-tensors"}}
    error = refusal(tmp_path, {}, config)
    assert error is not None
    assert "compressed-tensors" in error.message
