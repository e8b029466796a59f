"""Small models of each architecture, built and saved by transformers, merged, loaded again and compared.

Run by `make real`; skipped where torch and transformers are not installed.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from tests.block_scaled import CONFIG as FP8
from tests.block_scaled import dequantise, quantise
from tests.real.arithmetic import expected_bits, to_bf16

import paramdelta

if TYPE_CHECKING:
    from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
torch = pytest.importorskip("torch", reason="torch is not installed: `make real` has an environment of its own")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.real

WORDS = ["<pad>", "<s>", "</s>", "<|user|>", "<|end|>", *(f"w{number}" for number in range(59))]
TEMPLATE = "{% for message in messages %}<|user|> {{ message['content'] }} <|end|>{% endfor %}"
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2, untied": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 160,
    "hidden_size": 144,
    "intermediate_size": 272,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
EDGE = 16  # of a block: transformers wants all of them whole
SHARDS = {"base": "20KB", "post": "10KB", "new_base": "1GB"}


def config_of(architecture: str, **changes: Any) -> Any:
    name, own = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{**SMALL, **own, **changes})


def tokenizer_of(*, chat: bool) -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
        made.chat_template = TEMPLATE
    return made


def variants(config: Any) -> dict[str, Any]:
    """Return three models in bf16: base, and two that differ from it by a little."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    models = {}
    for role in SHARDS:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        noise = 0.0 if role == "base" else 1e-3
        with torch.no_grad():
            model.load_state_dict({name: t + noise * torch.randn_like(t) for name, t in start.items()})
        model.tie_weights()
        models[role] = model.to(torch.bfloat16)
    return models


def save(models: dict[str, Any], root: Path) -> None:
    for role, model in models.items():
        model.save_pretrained(root / role, max_shard_size=SHARDS[role])
        tokenizer_of(chat=role == "post").save_pretrained(root / role)


def codes(tensor: Any) -> np.ndarray[Any, Any]:
    bits: np.ndarray[Any, Any] = tensor.detach().contiguous().view(torch.uint16).numpy()
    return bits


def merged_in_memory(models: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the merged model: exact sums, rounded once by nothing of paramdelta's or torch's."""
    states = {role: model.state_dict() for role, model in models.items()}
    return {
        name: torch.from_numpy(
            expected_bits(codes(states["post"][name]), codes(states["base"][name]), codes(new))
        ).view(torch.bfloat16)
        for name, new in states["new_base"].items()
        if new.dtype == torch.bfloat16
    }


def load(path: Path, **settings: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True, **settings
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_loads_and_computes_what_one_merged_in_memory_does(architecture: str, tmp_path: Path) -> None:
    models = variants(config_of(architecture))
    save(models, tmp_path)
    paramdelta.merge(tmp_path / "post", tmp_path / "base", tmp_path / "new_base", tmp_path / "out")
    loaded = load(tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16).eval()
    reference.load_state_dict(merged_in_memory(models), strict=False)
    reference.tie_weights()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, reference(ids).logits)
        assert loaded.generate(ids[:, :4], max_new_tokens=8, do_sample=False).shape[1] > 4
    tied = bool(loaded.config.tie_word_embeddings)
    assert tied == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)


def to_block_scaled_fp8(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Write the projections of a checkpoint as DeepSeek-V3 has them; return what they mean, in f64."""
    meant = {}
    for file in path.glob("*.safetensors"):
        tensors = safetensors_torch.load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight") or "_proj_with_mqa" in name]:
            quantised, scales = quantise(tensors[name].double().numpy(), EDGE)
            meant[name] = dequantise(quantised, scales, EDGE)
            tensors[name] = torch.from_numpy(quantised.view(np.uint8)).view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.from_numpy(scales)
        safetensors_torch.save_file(tensors, file, {"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        places = content["weight_map"]
        places.update({f"{name}_scale_inv": places[name] for name in meant})
        index.write_text(json.dumps(content))
    config = json.loads((path / "config.json").read_text())
    settings = {**FP8["quantization_config"], "weight_block_size": [EDGE, EDGE]}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return meant


def fused_experts(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as the model holds it: what files keep by expert in one tensor a layer, gate and up together."""
    fused = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in {name.partition(".experts.")[0] for name in state if ".experts." in name}:
        experts = range(DEEPSEEK["n_routed_experts"])

        def of(expert: int, projection: str, layer: str = layer) -> Any:
            return state[f"{layer}.experts.{expert}.{projection}.weight"]

        gate_up = [torch.cat([of(expert, "gate_proj"), of(expert, "up_proj")]) for expert in experts]
        fused[f"{layer}.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{layer}.experts.down_proj"] = torch.stack([of(expert, "down_proj") for expert in experts])
    return fused


def stored(path: Path) -> dict[str, Any]:
    return {name: tensor for f in path.glob("*.safetensors") for name, tensor in safetensors_torch.load_file(f).items()}


@pytest.mark.parametrize("fp8", ["dequantise", "requantise"])
def test_deepseek_in_block_scaled_fp8(fp8: Literal["dequantise", "requantise"], tmp_path: Path) -> None:
    models = variants(transformers.DeepseekV3Config(**{**SMALL, **DEEPSEEK}))
    save(models, tmp_path)
    meant = {role: to_block_scaled_fp8(tmp_path / role) for role in SHARDS}
    assert len(meant["base"]) > 30
    inputs = {role: stored(tmp_path / role) for role in SHARDS}
    policies = paramdelta.Policies(fp8=fp8)
    paramdelta.merge(tmp_path / "post", tmp_path / "base", tmp_path / "new_base", tmp_path / "out", policies=policies)
    sums = {name: meant["post"][name] - meant["base"][name] + new for name, new in meant["new_base"].items()}
    state = {}
    for name, new in inputs["new_base"].items():
        if name in sums and fp8 == "dequantise":
            state[name] = torch.from_numpy(to_bf16(sums[name])).view(torch.bfloat16)
        elif name in sums:
            state[name] = torch.from_numpy(dequantise(*quantise(sums[name], EDGE), EDGE)).bfloat16()
        elif new.dtype == torch.bfloat16:
            bits = expected_bits(*(codes(inputs[role][name]) for role in ("post", "base", "new_base")))
            state[name] = torch.from_numpy(bits).view(torch.bfloat16)
    settings = (
        {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if fp8 == "requantise" else {}
    )
    loaded = load(tmp_path / "out", **settings)
    reference = transformers.AutoModelForCausalLM.from_config(models["base"].config, dtype=torch.bfloat16).eval()
    reference.load_state_dict(fused_experts(state))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        if fp8 == "dequantise":
            assert torch.equal(loaded(ids).logits, reference(ids).logits)
        for one, other in zip(loaded.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=2**-6, atol=0)  # transformers rounds scales to bf16, too
        assert loaded.generate(ids[:, :4], max_new_tokens=8, do_sample=False).shape[1] > 4


def test_the_tokenizer_and_the_chat_template_are_posts(tmp_path: Path) -> None:
    save(variants(config_of("llama")), tmp_path)
    paramdelta.merge(tmp_path / "post", tmp_path / "base", tmp_path / "new_base", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False)
    assert tokenizer(text)["input_ids"] == [3, 6, 7, 4]


def test_an_untied_post_makes_a_tied_new_base_a_model_with_a_head_of_its_own(tmp_path: Path) -> None:
    """R1-Distill-Qwen-1.5B onto Qwen2.5-1.5B."""
    models = variants(config_of("qwen2, tied"))
    untied = variants(config_of("qwen2, untied"))
    models["post"] = untied["post"]
    save(models, tmp_path)
    paramdelta.merge(tmp_path / "post", tmp_path / "base", tmp_path / "new_base", tmp_path / "out")
    loaded = load(tmp_path / "out")
    head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert head is not embeddings
    states = {role: model.state_dict() for role, model in models.items()}
    wanted = expected_bits(*(codes(states[role]["lm_head.weight"]) for role in ("post", "base", "new_base")))
    assert np.array_equal(codes(head), wanted)
