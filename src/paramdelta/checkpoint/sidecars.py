"""Which checkpoint donates which sidecar: the files beside the weights that make an output load as a model.

The new base gives the architecture (config.json); post gives what post-training brought (tokenizer, chat template,
special tokens, generation settings).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from paramdelta.checkpoint.checkpoint import CONFIG_FILE, FileIdentity
from paramdelta.checkpoint.files import is_there, open_regular

if TYPE_CHECKING:
    from pathlib import Path

    from paramdelta.checkpoint.checkpoint import Checkpoint

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
    post has none. The new base's chat template and generation settings go with its own tokenizer only: post's template
    may be written inside tokenizer_config.json, where loaders would not look any more.

    Raises:
        CheckpointError: a file is there and cannot be looked at.
    """
    chosen = _present(new_base, FROM_NEW_BASE, "new base")
    behaviour = [_present(post, names, "post") for names in (TOKENIZER, CHAT_TEMPLATE, GENERATION)]
    if not behaviour[0]:
        fallback = [_present(new_base, names, "new base") for names in (TOKENIZER, CHAT_TEMPLATE, GENERATION)]
        behaviour = [own or other for own, other in zip(behaviour, fallback, strict=True)]
    return tuple(itertools.chain(chosen, *behaviour))


def _present(checkpoint: Checkpoint, names: tuple[str, ...], donor: str) -> list[Sidecar]:
    if not checkpoint.owns_sidecars:
        return []
    found = []
    for path in (checkpoint.root / name for name in names):
        if is_there(path):
            with open_regular(path) as (_, status):
                found.append(Sidecar(path.name, path, donor, FileIdentity.of(status)))
    return found
