"""What tensors do, by the names that models in use give them."""

from __future__ import annotations

import pytest

from paramdelta.insight.roles import role_of


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 0, "attention"),
        ("model.layers.11.self_attn.q_norm.weight", 11, "norm"),
        ("model.layers.7.mlp.down_proj.weight", 7, "mlp"),
        ("model.layers.7.mlp.experts.12.gate_proj.weight", 7, "mlp"),
        ("model.layers.7.mlp.gate.weight", 7, "mlp"),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", 3, "mlp"),
        ("model.layers.60.post_attention_layernorm.weight", 60, "norm"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", 3, "attention"),
        ("model.layers.3.self_attn.kv_a_layernorm.weight", 3, "norm"),
        ("transformer.h.5.attn.c_attn.weight", 5, "attention"),
        ("transformer.h.5.ln_1.bias", 5, "norm"),
        ("h.5.mlp.c_fc.weight", 5, "mlp"),
        ("gpt_neox.layers.2.attention.query_key_value.weight", 2, "attention"),
        ("model.language_model.layers.2.mlp.up_proj.weight", 2, "mlp"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("transformer.wte.weight", None, "embedding"),
        ("transformer.wpe.weight", None, "embedding"),
        ("lm_head.weight", None, "head"),
        ("output.weight", None, "head"),
        ("embed_out.weight", None, "head"),
        ("model.norm.weight", None, "norm"),
        ("transformer.ln_f.weight", None, "norm"),
        ("something.else", None, "other"),
        ("", None, "other"),
    ],
)
def test_names(name: str, layer: int | None, module: str) -> None:
    assert role_of(name) == (layer, module)
