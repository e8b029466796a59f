"""Names of the files beside the weights that belong to a model, in groups that make sense only together."""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "config.json"
FROM_NEW_BASE: Final = (CONFIG_FILE,)
TOKENIZER: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
CHAT_TEMPLATE: Final = ("chat_template.jinja", "chat_template.json")
GENERATION: Final = ("generation_config.json",)
PROCESSOR: Final = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

SIDECARS: Final = (*FROM_NEW_BASE, *TOKENIZER, *CHAT_TEMPLATE, *GENERATION, *PROCESSOR)
