"""Whether rows that are added together stand for the same tokens: to sum rows of different tokens makes garbage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint.tokens import TOKENIZER_FILE, read_tokenizer, tokens_by_id
from paramdelta.checkpoint.wording import printable, quoted
from paramdelta.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paramdelta.planning.manifest import Manifest, Member
    from paramdelta.planning.policies import Policies

MOST_RENAMED: Final = 256
"""Tokens that may differ between related models: families keep some hundred reserved ones and name them later on."""

_SHOWN: Final = 8


class Donor(NamedTuple):
    """Whose tokenizer the output has, and with it chat template, generation settings and ids of special tokens.

    ``reason`` says why it is the new base's; None where it is post's.
    """

    is_post: bool
    reason: str | None = None


def donor_of_tokens(members: Sequence[Member], policies: Policies, manifest: Manifest) -> Donor:
    """Return whose tokenizer fits the rows that the output has: post's wherever it can.

    Raises:
        MismatchError: the output has fewer rows than any tokenizer has ids.
    """
    if policies.vocab == "new-base":
        return Donor(False, "--vocab new-base was chosen")
    new_base, post = members[0], members[1]
    if manifest.rows is None:
        return Donor(True)
    if not manifest.adds_rows and (renamed := _renamed(new_base, post, manifest.rows)) > MOST_RENAMED:
        return Donor(False, f"so are the rows of embeddings and head, and {renamed:,} ids mean other tokens in post")
    fewer = f"post has {_rows(post):,} rows, the output {manifest.rows:,}"
    if _rows(post) <= manifest.rows:
        return Donor(True)
    if _rows(new_base) <= manifest.rows:
        return Donor(False, fewer)
    for donor, member in ((Donor(True), post), (Donor(False, fewer), new_base)):
        if _highest_id(member) < manifest.rows:
            return donor
    raise MismatchError(
        f"the output would have {manifest.rows:,} rows, and the tokenizers of post and new base have more ids",
        file=printable(str(post.checkpoint.root / TOKENIZER_FILE)),
        remedy="Choose --vocab pad, new-base or post instead.",
    )


def _rows(member: Member) -> int:
    """Return for how many tokens a checkpoint has rows; 0 where that cannot be told."""
    stored = member.embeddings.embedding or member.embeddings.head
    return 0 if stored is None else member.checkpoint.tensors[stored].shape[0]


def _highest_id(member: Member) -> float:
    """Return the highest id of a checkpoint's tokenizer, -1 without one; infinity where it cannot be understood."""
    tokenizer = read_tokenizer(member.checkpoint)
    if tokenizer is None:
        return -1
    tokens = tokens_by_id(tokenizer)
    return math.inf if tokens is None else max(tokens, default=-1)


def _renamed(one: Member, other: Member, rows: int) -> int:
    """Return how many ids stand for different tokens in two checkpoints."""
    return len([line for line in _differing([one, other], rows) if line[0].isdigit()])


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
