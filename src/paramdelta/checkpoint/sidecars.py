"""Which checkpoint donates which sidecar: the files beside the weights that make an output load as a model.

The new base gives the architecture (config.json); post gives what post-training brought (tokenizer, chat template,
special tokens, generation settings).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paramdelta.checkpoint.checkpoint import FileIdentity

if TYPE_CHECKING:
    from pathlib import Path

    from paramdelta.checkpoint.checkpoint import Checkpoint

FROM_NEW_BASE: Final = ("config.json",)
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
BEHAVIOUR: Final = ("chat_template.jinja", "chat_template.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file to copy: its name in the output, where it comes from, and the role of the checkpoint that gives it."""

    name: str
    source: Path
    donor: str
    identity: FileIdentity


def choose_sidecars(post: Checkpoint, new_base: Checkpoint) -> tuple[Sidecar, ...]:
    """Return the sidecars of a merge of ``post`` onto ``new_base``.

    Tokenizer files come all from one checkpoint, since they make sense only together: post, or the new base where
    post has none.
    """
    chosen = _present(new_base, FROM_NEW_BASE, "new base")
    chosen += _present(post, TOKENIZER, "post") or _present(new_base, TOKENIZER, "new base")
    chosen += _present(post, BEHAVIOUR, "post") or _present(new_base, BEHAVIOUR, "new base")
    return tuple(chosen)


def _present(checkpoint: Checkpoint, names: tuple[str, ...], donor: str) -> list[Sidecar]:
    if checkpoint.config is None:  # a bare file of weights: what lies beside it need not belong to it
        return []
    return [
        Sidecar(name, path, donor, FileIdentity.of(path.stat()))
        for name in names
        if (path := checkpoint.root / name).is_file()
    ]
