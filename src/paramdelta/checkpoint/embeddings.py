"""Input embeddings and output head of a language model: what they are called, and whether they are one tensor.

Loaders tie the two where ``tie_word_embeddings`` says so, or where it is absent and the model's type does by default;
the head is then not stored. Config and weights are read together here, and where they contradict each other the weights
decide: what is stored was trained.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from paramdelta.checkpoint.checkpoint import Checkpoint

EMBEDDINGS: Final = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
HEADS: Final = ("lm_head.weight", "embed_out.weight")

UNTIED_BY_DEFAULT: Final = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "glm4",
        "gpt_neox",
        "granite",
        "llama",
        "llama4_text",
        "ministral",
        "mistral",
        "mistral3",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
    }
)
"""Values of ``model_type`` whose configuration classes in transformers do not tie; all others do."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The two tensors of a checkpoint that have a row for each token.

    Attributes:
        embedding: name of the input embeddings, None where they are not stored or cannot be told.
        head: name of the output head, likewise.
        tied: whether one of them is stored and stands for both.
        says_tied: what config.json says, by itself or by the model type's default; None without a config.
        explicit: whether it says so itself.
    """

    embedding: str | None
    head: str | None
    tied: bool
    says_tied: bool | None
    explicit: bool

    def stored(self) -> str | None:
        """Return the name of the tensor that stands for both where they are tied."""
        return (self.embedding or self.head) if self.tied else None


def embeddings_of(checkpoint: Checkpoint) -> Embeddings:
    """Return the embeddings of a checkpoint."""
    embedding, head = _the_one(checkpoint.tensors, EMBEDDINGS), _the_one(checkpoint.tensors, HEADS)
    says_tied, explicit = _config_ties(checkpoint.config)
    alone = (embedding is None) != (head is None) and not _any(checkpoint.tensors, HEADS if embedding else EMBEDDINGS)
    return Embeddings(embedding, head, alone and not (explicit and says_tied is False), says_tied, explicit)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a configuration: models of several parts keep it one level down."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _config_ties(config: Mapping[str, Any] | None) -> tuple[bool | None, bool]:
    if config is None:
        return None, False
    for part in (config, text_config(config)):
        flag = part.get("tie_word_embeddings")
        if isinstance(flag, bool):
            return flag, True
    model_type = text_config(config).get("model_type")
    return not isinstance(model_type, str) or model_type not in UNTIED_BY_DEFAULT, False


def _the_one(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    """Return the name with one of the endings; of several the one that lies least deep: others are of single layers."""
    found = [name for name in names if name.endswith(endings) and _whole_words(name, endings)]
    depths = Counter(name.count(".") for name in found)
    least = min(depths, default=0)
    return next(name for name in found if name.count(".") == least) if depths[least] == 1 else None


def _any(names: Iterable[str], endings: tuple[str, ...]) -> bool:
    return any(_whole_words(name, endings) for name in names if name.endswith(endings))


def _whole_words(name: str, endings: tuple[str, ...]) -> bool:
    """Return whether an ending begins where a part of the name does: ``xlm_head.weight`` is no head."""
    return any(name == ending or name.endswith("." + ending) for ending in endings)
