"""Whether rows that are added together stand for the same tokens: to sum rows of different tokens makes garbage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paramdelta.checkpoint.tokens import TOKENIZER_FILE, read_tokenizer, tokens_by_id
from paramdelta.checkpoint.wording import quoted
from paramdelta.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paramdelta.planning.manifest import Manifest, Member
    from paramdelta.planning.policies import Policies

MOST_RENAMED: Final = 256
"""Tokens that may differ between related models: families keep some hundred reserved ones and name them later on."""

_SHOWN: Final = 8


def has_posts_tokens(members: Sequence[Member], policies: Policies, manifest: Manifest) -> bool:
    """Return whether the output has a row for each of post's tokens, so that it can have post's tokenizer."""
    if policies.vocab == "new-base":
        return False
    post = members[1]
    stored = post.embeddings.embedding or post.embeddings.head
    return manifest.rows is None or stored is None or post.checkpoint.tensors[stored].shape[0] <= manifest.rows


def differing_tokens(members: Sequence[Member], policies: Policies, manifest: Manifest) -> list[str]:
    """Return a line for each id whose row is added and that stands for several tokens, by the tokenizers there are.

    Raises:
        MismatchError: so many differ that the rows would not fit each other, and no policy for vocabularies was chosen.
    """
    lines = _differing(members, manifest.rows) if manifest.rows is not None and manifest.adds_rows else []
    if len(lines) > MOST_RENAMED and policies.vocab == "error":
        raise MismatchError(
            f"{len(lines):,} ids stand for other tokens in other checkpoints: {summed_up(lines)}",
            file=str(members[1].checkpoint.root / TOKENIZER_FILE),
            remedy="Rows of different tokens must not be added. If they are meant to be, choose a --vocab; to keep the"
            " new base's rows, --exclude the embeddings and the head.",
        )
    return lines


def _differing(members: Sequence[Member], rows: int) -> list[str]:
    tokenizers = [(m.role, tokenizer) for m in members if (tokenizer := read_tokenizer(m.checkpoint)) is not None]
    if len({tokenizer.digest for _, tokenizer in tokenizers}) < 2:
        return []
    understood = {tokenizer.digest: tokens_by_id(tokenizer) for _, tokenizer in tokenizers}
    tables = [(role, understood[tokenizer.digest] or {}) for role, tokenizer in tokenizers]
    lines = [f"{role}'s {TOKENIZER_FILE} cannot be understood" for role, table in tables if not table]
    for number in range(min(rows, max(max(table, default=-1) for _, table in tables) + 1)):
        meanings = {role: table[number] for role, table in tables if number in table}
        if len(set(meanings.values())) > 1:
            lines.append(f"{number} ({', '.join(f'{role} {quoted(token)}' for role, token in meanings.items())})")
    return lines


def summed_up(lines: Sequence[str]) -> str:
    """Return the first of the lines, and how many more there are."""
    rest = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {rest:,} more" if rest > 0 else "")
