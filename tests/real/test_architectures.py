"""Small models of each architecture, built and saved by transformers, merged, loaded again and compared.

Run by `make real`; skipped where torch and transformers are not installed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.real.arithmetic import expected_bits

import paramdelta

if TYPE_CHECKING:
    from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
torch = pytest.importorskip("torch", reason="torch is not installed: `make real` has an environment of its own")
transformers = pytest.importorskip("transformers")
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


def load(path: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
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
