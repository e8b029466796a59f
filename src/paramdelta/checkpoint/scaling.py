"""Block-scaled FP8, as DeepSeek-V3 and its relatives store weights: a matrix of E4M3 and a scale for each block of it.

Beside ``<name>`` of shape [rows, columns] lies ``<name>_scale_inv`` of shape [⌈rows / block rows⌉, ⌈columns / block
columns⌉]; the number meant is code * scale. config.json says how large blocks are (``weight_block_size``) and whether
scales are powers of two (``scale_fmt``). Nothing of that is guessed: without it such weights are not merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.wording import clipped, printable, quoted
from paramdelta.errors import CheckpointError, UnsupportedCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from paramdelta.checkpoint.checkpoint import Checkpoint, TensorRef

SCALE_SUFFIX: Final = "_scale_inv"
SCALE_DTYPES: Final = frozenset({"F32", "BF16"})
EDGES: Final = range(16, 513)
"""How many rows or columns a block may have. All released models have 128; a run holds a few blocks of f64."""


class Blocks(NamedTuple):
    """The form of block-scaled weights: a block's rows and columns, and whether scales are powers of two."""

    rows: int
    columns: int
    powers_of_two: bool


@dataclass(frozen=True, slots=True)
class Scaling:
    """Which weights of a checkpoint are block-scaled.

    Attributes:
        blocks: their form, None where none are.
        scales: name of the scale tensor of each such weight.
    """

    blocks: Blocks | None
    scales: Mapping[str, str]


def quantization_settings(config: Mapping[str, Any] | None) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what a config.json says of quantisation: the keys that lead to it, and what it says."""
    if config is None:
        return
    # Models of several parts keep the language model's configuration one level down.
    inner = [((key,), value) for key, value in config.items() if isinstance(value, dict)]
    for path, part in [((), config), *inner]:
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                yield (*path, key), part[key]


def scaling_of(checkpoint: Checkpoint) -> Scaling:
    """Return which weights of a checkpoint are block-scaled, as its config.json says.

    Raises:
        CheckpointError: a weight lacks its scales, or they do not fit it; UnsupportedCheckpointError where they have a
            form that cannot be merged.
    """
    found = {blocks_of(settings) for _, settings in quantization_settings(checkpoint.config)} - {None}
    if len(found) > 1:
        raise UnsupportedCheckpointError(
            "describes block-scaled FP8 of several forms", file=printable(str(checkpoint.root / "config.json"))
        )
    blocks = next(iter(found), None)
    return Scaling(None, {}) if blocks is None else Scaling(blocks, _scales(checkpoint, blocks))


def blocks_of(settings: Any) -> Blocks | None:
    """Return the blocks that a ``quantization_config`` describes; None where it means any other form of weights."""
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return None
    if strange_key(settings) is not None:
        return None
    rows, columns = settings["weight_block_size"]
    return Blocks(rows, columns, settings.get("scale_fmt") == "ue8m0")


def strange_key(settings: dict[str, Any]) -> str | None:
    """Return which setting of ``quant_method`` fp8 has a value that cannot be merged, None where all can."""
    size = settings.get("weight_block_size")
    whole = isinstance(size, list) and len(size) == 2 and all(type(edge) is int and edge in EDGES for edge in size)
    fine = {  # compared, not looked up in sets: JSON has values that have no hash
        "weight_block_size": whole,
        "fmt": settings.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"),
        "activation_scheme": settings.get("activation_scheme", "dynamic") == "dynamic",
        "scale_fmt": settings.get("scale_fmt") in (None, "float", "ue8m0"),
    }
    return next((key for key, is_fine in fine.items() if not is_fine), None)


def scale_shape(shape: tuple[int, ...], blocks: Blocks) -> tuple[int, int]:
    """Return the shape of the scales of a matrix."""
    return -(-shape[0] // blocks.rows), -(-shape[1] // blocks.columns)


def _scales(checkpoint: Checkpoint, blocks: Blocks) -> dict[str, str]:
    found = {}
    for name, ref in checkpoint.tensors.items():
        if ref.dtype == "F8_E4M3":
            scale = name + SCALE_SUFFIX
            if scale not in checkpoint.tensors:
                raise _flaw(checkpoint, name, ref, f"has no scales: there is no {quoted(scale)}")
            _check(checkpoint, name, ref, checkpoint.tensors[scale], blocks)
            found[name] = scale
    weights = {scale: name for name, scale in found.items()}
    for name, ref in checkpoint.tensors.items():
        if name.endswith(f".weight{SCALE_SUFFIX}") and name not in weights:
            raise _flaw(checkpoint, name, ref, "holds scales, and there is no FP8 weight that they belong to")
    return found


def _check(checkpoint: Checkpoint, name: str, ref: TensorRef, scale: TensorRef, blocks: Blocks) -> None:
    if len(ref.shape) != 2:
        raise UnsupportedCheckpointError(
            f"block-scaled FP8 of shape {list(ref.shape)}, tensor {quoted(name)}: only matrices can be merged",
            file=printable(str(checkpoint.shards[ref.shard].path)),
            tensor=clipped(name),
            remedy="Use the unquantised weights, or those with a tensor for each expert.",
        )
    wanted = scale_shape(ref.shape, blocks)
    if scale.shape != wanted or scale.dtype not in SCALE_DTYPES:
        raise _flaw(
            checkpoint,
            name,
            ref,
            f"needs scales of shape {list(wanted)} in F32 or BF16, and has {list(scale.shape)} in {scale.dtype}",
        )


def _flaw(checkpoint: Checkpoint, name: str, ref: TensorRef, what: str) -> CheckpointError:
    return CheckpointError(
        f"block-scaled FP8, as config.json says, and tensor {quoted(name)} {what}",
        file=printable(str(checkpoint.shards[ref.shard].path)),
        tensor=clipped(name),
        remedy="config.json and weights are of different versions, or one is damaged: download them again.",
    )
