"""What a tensor does in a transformer, told by its name: its layer, and the kind of module that it belongs to."""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from paramdelta.checkpoint.embeddings import EMBEDDINGS, HEADS

Module = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
MODULES: Final[tuple[Module, ...]] = ("attention", "mlp", "norm", "embedding", "head", "other")

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_WORDS: Final[tuple[tuple[Module, re.Pattern[str]], ...]] = (
    ("norm", re.compile(r"norm|(?:^|[._])ln(?:[._]|\d|$)")),
    ("attention", re.compile(r"attn|attention|(?:^|[._])(?:q|k|v|o|qkv|kv_[ab]|q_[ab])_proj")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|experts?|(?:^|\.)(?:gate|up|down|gate_up)_proj|(?:^|\.)fc\d?\.|router")),
    ("embedding", re.compile(r"(?:^|[._])(?:wpe|wte|embed\w*|position_embeddings)(?:[._]|$)")),
)


class Role(NamedTuple):
    """Where a tensor is: the number of its layer, None outside of any, and what it belongs to."""

    layer: int | None
    module: Module


def role_of(name: str) -> Role:
    """Return what a tensor does, as names in Llama, Qwen, Mistral, GPT, DeepSeek and their like say it."""
    layer = _LAYER.search(name)
    return Role(int(layer[1]) if layer else None, _module_of(name))


def _module_of(name: str) -> Module:
    if name.endswith(EMBEDDINGS):
        return "embedding"
    if name.endswith(HEADS) or name in {"output.weight", "head.weight"}:
        return "head"
    return next((module for module, pattern in _WORDS if pattern.search(name)), "other")
