"""Whether rows that are added together stand for the same tokens: to sum rows of different tokens makes garbage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint.tokens import VOCABULARY_FILES, kinds_of, read_tokenizer, tokens_by_id
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


def donor_of_tokens(members: Sequence[Member], policies: Policies, manifest: Manifest, taken: Comparison) -> Donor:
    """Return whose tokenizer fits the rows that the output has: post's wherever it can.

    Args:
        taken: what `taken_tokens` says.

    Raises:
        MismatchError: the output has fewer rows than any tokenizer has ids.
    """
    if policies.vocab == "new-base":
        return Donor(False, "--vocab new-base was chosen")
    new_base, post = members[0], members[1]
    if manifest.rows is None:
        return Donor(True)
    if len(taken.lines) > MOST_RENAMED:
        renamed = f"{len(taken.lines):,} ids mean other tokens in post"
        return Donor(False, f"so are the rows of embeddings and head, and {renamed}")
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
        file=printable(str(post.checkpoint.root)),
        remedy="Choose --vocab pad, new-base or post instead.",
    )


def _rows(member: Member) -> int:
    """Return for how many tokens a checkpoint has rows; 0 where that cannot be told."""
    stored = member.embeddings.embedding or member.embeddings.head
    return 0 if stored is None else member.checkpoint.tensors[stored].shape[0]


def _highest_id(member: Member) -> float:
    """Return the highest id of a checkpoint's tokenizer, -1 without one; infinity where it cannot be understood."""
    kinds = kinds_of(member.checkpoint)
    if not kinds:
        return -1
    tokens = tokens_by_id(read_tokenizer(member.checkpoint, kinds[0]))
    return math.inf if tokens is None else max(tokens, default=-1)


class Comparison(NamedTuple):
    """What tokenizers say of the rows of an output.

    Attributes:
        lines: a line for each id that stands for several tokens.
        flaws: what could not be compared.
        missing: how many ids stand for a token in the last tokenizer alone.
    """

    lines: tuple[str, ...] = ()
    flaws: tuple[str, ...] = ()
    missing: int = 0


def differing_tokens(members: Sequence[Member], policies: Policies, manifest: Manifest) -> Comparison:
    """Return in what the tokenizers that there are differ, as far as rows are added.

    Raises:
        MismatchError: so many differ that the rows would not fit each other, and no policy for vocabularies was chosen.
    """
    if manifest.rows is None or not manifest.adds_rows:
        return Comparison()
    found = _compare(members, manifest.rows)
    if len(found.lines) > MOST_RENAMED and policies.vocab == "error":
        raise MismatchError(
            f"{len(found.lines):,} ids stand for other tokens in other checkpoints: {summed_up(found.lines)}",
            file=printable(str(members[1].checkpoint.root)),
            remedy="Rows of different tokens must not be added. If they are meant to be, choose a --vocab; to keep the"
            " new base's rows, --exclude the embeddings and the head.",
        )
    return found


def taken_tokens(members: Sequence[Member], manifest: Manifest) -> Comparison:
    """Return in what post's tokenizer differs from the new base's, where rows are only taken."""
    if manifest.rows is None or manifest.adds_rows:
        return Comparison()
    return _compare([members[0], members[1]], manifest.rows)


def _compare(members: Sequence[Member], rows: int) -> Comparison:
    having = [(m, kinds) for m in members if (kinds := kinds_of(m.checkpoint))]
    if len(having) < 2:
        return Comparison()
    common = [kind for kind in VOCABULARY_FILES if all(kind in kinds for _, kinds in having)]
    if not common:
        told = ", ".join(f"{member.role} {kinds[0]}" for member, kinds in having)
        return Comparison(flaws=(f"the tokenizers are files of different kinds ({told})",))
    tokenizers = [(member.role, read_tokenizer(member.checkpoint, common[0])) for member, _ in having]
    if len({tokenizer.digest for _, tokenizer in tokenizers}) < 2:
        return Comparison()
    understood = {tokenizer.digest: tokens_by_id(tokenizer) for _, tokenizer in tokenizers}
    opaque = [role for role, tokenizer in tokenizers if understood[tokenizer.digest] is None]
    flaws = (f"{common[0]} differs, and that of {', '.join(opaque)} cannot be understood",) if opaque else ()
    tables = [(role, understood[tokenizer.digest] or {}) for role, tokenizer in tokenizers]
    lines, missing = [], 0
    for number in range(min(rows, max(max(table, default=-1) for _, table in tables) + 1)):
        meanings = {role: table[number] for role, table in tables if number in table}
        missing += set(meanings) == {tables[-1][0]}
        if len(set(meanings.values())) > 1:
            lines.append(f"{number} ({', '.join(f'{role} {quoted(token)}' for role, token in meanings.items())})")
    return Comparison(tuple(lines), flaws, 0 if opaque else missing)


def summed_up(lines: Sequence[str]) -> str:
    """Return the first of the lines, and how many more there are."""
    rest = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {rest:,} more" if rest > 0 else "")
