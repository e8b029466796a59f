"""Analyses of models that nobody trained, with numbers as real ones have them."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Row = dict[str, Any]

HIDDEN, MLP, KV, VOCABULARY = 3072, 8192, 1024, 128_256
IN_A_LAYER: dict[str, tuple[str, tuple[int, ...]]] = {
    "self_attn.q_proj.weight": ("attention", (HIDDEN, HIDDEN)),
    "self_attn.k_proj.weight": ("attention", (KV, HIDDEN)),
    "self_attn.v_proj.weight": ("attention", (KV, HIDDEN)),
    "self_attn.o_proj.weight": ("attention", (HIDDEN, HIDDEN)),
    "mlp.gate_proj.weight": ("mlp", (MLP, HIDDEN)),
    "mlp.up_proj.weight": ("mlp", (MLP, HIDDEN)),
    "mlp.down_proj.weight": ("mlp", (HIDDEN, MLP)),
    "input_layernorm.weight": ("norm", (HIDDEN,)),
    "post_attention_layernorm.weight": ("norm", (HIDDEN,)),
}
MEANS = (
    "delta_norm",
    "base_shift_norm",
    "base_norm",
    "relative_delta",
    "relative_shift",
    "cosine",
    "base_cosine",
)


def analysis(layers: int = 28, deltas: int = 2, experts: int = 0, seed: int = 0) -> dict[str, Any]:
    """Return what an analysis of a Llama-shaped model says, in whose layers there may be experts, too."""
    made = [_delta(layers, experts, random.Random(1000 * seed + place), place) for place in range(deltas)]
    pick = random.Random(seed)
    pairs = [
        {
            "first": first,
            "second": second,
            "cosine": pick.gauss(0.12, 0.05),
            "layers": [{"layer": n, "cosine": pick.gauss(0.05 + 0.15 * (n or 0) / layers, 0.02)} for n in range(layers)]
            + [{"layer": None, "cosine": pick.gauss(0.3, 0.05)}],
        }
        for second in range(deltas)
        for first in range(second)
    ]
    warnings = [
        {"code": "tokens", "message": "post and new base have different tokens for 12 ids, like 128011 (<|pad|>)"},
        {"code": "left-out", "message": "3 elements of 'model.norm.weight' are not finite and are left out"},
    ]
    return {"deltas": made, "pairs": pairs, "warnings": warnings}


def still_analysis() -> dict[str, Any]:
    """Return an analysis in which nothing changed, nothing is finite, and there is nothing to say."""
    nothing = dict.fromkeys(MEANS) | {"max_abs_delta": None, "changed_share": None}
    counts = {"changed": 0, "left_out": 4, "infinities": 3, "nans": 1}
    still = dict.fromkeys(MEANS, 0.0) | {"cosine": None, "base_cosine": None, "max_abs_delta": 0.0}
    none = dict.fromkeys(counts, 0) | {"changed_share": 0.0}
    place: Row = {"layer": None, "module": "other", "dtype": "BF16"}
    rows: list[Row] = [
        {"name": "w", **place, "shape": [2, 2], "elements": 4, **nothing, **counts},
        {"name": "v", **place, "layer": 0, "module": "mlp", "shape": [0, 7], "elements": 0, **still, **none},
    ]
    delta = {"post": "p", "base": "b", "new_base": "n", "alpha": 0.5, "tensors": rows}
    groups = [
        {"layer": row["layer"], "module": row["module"], "tensors": 1, "mean": {key: row[key] for key in MEANS}}
        | {key: row[key] for key in (*nothing, *counts, "elements")}
        for row in rows
    ]
    total = {key: value for key, value in groups[0].items() if key not in ("layer", "module")}
    return {"deltas": [delta | {"groups": groups, "total": total}], "pairs": [], "warnings": []}


def _delta(layers: int, experts: int, pick: random.Random, place: int) -> Row:
    rows = [_row(pick, name, layer, module, shape, layers) for name, layer, module, shape in _tensors(layers, experts)]
    keys = dict.fromkeys((row["layer"], row["module"]) for row in rows)
    groups = [
        {"layer": layer, "module": module}
        | _together([row for row in rows if (row["layer"], row["module"]) == (layer, module)])
        for layer, module in keys
    ]
    return {
        "post": f"models/Llama-3.2-3B-{('Instruct', 'Math', 'Code', 'Chat')[place % 4]}",
        "base": "models/Llama-3.2-3B",
        "new_base": "models/Llama-3.3-3B",
        "alpha": (1.0, 0.5)[place % 2],
        "tensors": rows,
        "groups": groups,
        "total": _together(rows),
    }


def _tensors(layers: int, experts: int) -> Iterator[tuple[str, int | None, str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", None, "embedding", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        for name, (module, shape) in IN_A_LAYER.items():
            yield f"model.layers.{layer}.{name}", layer, module, shape
        for expert in range(experts):
            yield f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", layer, "mlp", (256, HIDDEN)
    yield "model.norm.weight", None, "norm", (HIDDEN,)
    yield "lm_head.weight", None, "head", (VOCABULARY, HIDDEN)


def _row(pick: random.Random, name: str, layer: int | None, module: str, shape: tuple[int, ...], layers: int) -> Row:
    elements = math.prod(shape)
    depth = 0.5 if layer is None else layer / layers
    typical = {"norm": 0.6, "embedding": 0.015}.get(module, 0.02)
    base = typical * math.sqrt(elements) * pick.uniform(0.9, 1.1)
    relative = {"attention": 0.03, "mlp": 0.02, "norm": 0.004}.get(module, 0.008) * (0.6 + 0.9 * depth)
    relative *= math.exp(pick.gauss(0, 0.12))
    shift = {"attention": 0.09, "mlp": 0.08, "norm": 0.02}.get(module, 0.05) * math.exp(pick.gauss(0, 0.1))
    cosine = max(-1.0, min(1.0, pick.gauss({"attention": 0.06, "mlp": 0.03}.get(module, -0.02) * depth, 0.01)))
    share = min(1.0, max(0.0, {"norm": 0.35}.get(module, 0.9) + pick.gauss(0, 0.05)))
    return {
        "name": name,
        "layer": layer,
        "module": module,
        "dtype": "BF16",
        "shape": list(shape),
        "elements": elements,
        "delta_norm": relative * base,
        "base_shift_norm": shift * base,
        "base_norm": base,
        "relative_delta": relative,
        "relative_shift": shift,
        "cosine": cosine,
        "base_cosine": 1 - shift**2 / 2,
        "max_abs_delta": relative * typical * 12,
        "changed": round(share * elements),
        "changed_share": round(share * elements) / elements,
        "left_out": 0,
        "infinities": 0,
        "nans": 0,
    }


def _together(rows: Sequence[Row]) -> Row:
    elements = sum(row["elements"] for row in rows)
    delta, shift, base = (
        math.sqrt(sum(row[key] ** 2 for row in rows)) for key in ("delta_norm", "base_shift_norm", "base_norm")
    )
    products = sum(row["cosine"] * row["delta_norm"] * row["base_shift_norm"] for row in rows)
    return {
        "tensors": len(rows),
        "elements": elements,
        "delta_norm": delta,
        "base_shift_norm": shift,
        "base_norm": base,
        "relative_delta": delta / base,
        "relative_shift": shift / base,
        "cosine": products / (delta * shift),
        "base_cosine": 1 - (shift / base) ** 2 / 2,
        "max_abs_delta": max(row["max_abs_delta"] for row in rows),
        "changed": sum(row["changed"] for row in rows),
        "changed_share": sum(row["changed"] for row in rows) / elements,
        "left_out": 0,
        "infinities": 0,
        "nans": 0,
        "mean": {key: sum(row[key] for row in rows) / len(rows) for key in MEANS},
    }
