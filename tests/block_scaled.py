"""Block-scaled FP8 for tests, with ml_dtypes and no code of the package: quantised, dequantised, written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tests.make import normal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from tests.make import Tensor

EDGE = 128
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [EDGE, EDGE],
    },
}


def by_block(values: NDArray[Any], edge: int = EDGE) -> NDArray[Any]:
    """The greatest magnitude of each block."""
    rows, columns = (-(-size // edge) for size in values.shape)
    padded: NDArray[Any] = np.zeros((rows * edge, columns * edge))
    padded[: values.shape[0], : values.shape[1]] = np.absolute(values)
    greatest: NDArray[Any] = padded.reshape(rows, edge, columns, edge).max(axis=(1, 3))
    return greatest


def spread(scales: NDArray[Any], shape: Sequence[int], edge: int = EDGE) -> NDArray[np.float64]:
    """A scale for each element."""
    whole = np.repeat(np.repeat(scales.astype(np.float64), edge, axis=0), edge, axis=1)
    return whole[: shape[0], : shape[1]]


def quantise(values: NDArray[np.float64], edge: int = EDGE) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Codes and scales: a block's greatest magnitude becomes 448; a block of zeros has the scale 1."""
    greatest = by_block(values, edge)
    scales = np.where(greatest == 0, 1.0, greatest / 448).astype(np.float32)
    return in_e4m3(values / spread(scales, values.shape, edge)), scales


def in_e4m3(values: NDArray[np.float64]) -> NDArray[Any]:
    """The nearest E4M3. ml_dtypes comes to it through f32, which would round twice: hence to odd the first time."""
    narrow = values.astype(np.float32)
    codes = narrow.view(np.uint32) - (np.abs(narrow) > np.abs(values)).astype(np.uint32)
    codes |= narrow != values
    return codes.view(np.float32).astype(ml_dtypes.float8_e4m3fn)


def dequantise(codes: NDArray[Any], scales: NDArray[np.float32], edge: int = EDGE) -> NDArray[np.float64]:
    """What codes and scales mean; exact in f64."""
    return codes.astype(np.float64) * spread(scales, codes.shape, edge)


def tensors_of(matrices: Mapping[str, NDArray[np.float64]], *, seed: int) -> dict[str, Tensor]:
    """Matrices in block-scaled FP8, scales first as safetensors sorts them, and a norm in BF16 for each."""
    made: dict[str, Tensor] = {}
    quantised = {name: quantise(values) for name, values in matrices.items()}
    for name, (_, scales) in quantised.items():
        made[f"{name}.weight_scale_inv"] = ("F32", scales.shape, scales.tobytes())
    for name, (codes, _) in quantised.items():
        made[f"{name}.norm"] = normal((7,), seed=seed)
        made[f"{name}.weight"] = ("F8_E4M3", codes.shape, codes.tobytes())
    return made
