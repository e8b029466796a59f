"""Which token each id of a checkpoint's tokenizer stands for."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.files import is_there, read_whole
from paramdelta.checkpoint.wording import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paramdelta.checkpoint.checkpoint import Checkpoint

TOKENIZER_FILE: Final = "tokenizer.json"
_VOCABULARY: Final = "vocab.json"
_ADDED: Final = "added_tokens.json"

VOCABULARY_FILES: Final = (
    TOKENIZER_FILE,
    _VOCABULARY,
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.txt",
)
"""The files that say which tokens there are; one of them is enough. The first two can be read here."""

_MOST_BYTES: Final = 256 << 20


class RawTokenizer(NamedTuple):
    """A tokenizer as its files have it, read and not yet understood: most are the same in all three checkpoints.

    Attributes:
        kind: name of the file that says which tokens there are.
        added: content of added_tokens.json beside a vocab.json.
        digest: of both.
    """

    file: str
    kind: str
    raw: bytes
    added: bytes
    digest: str


def kinds_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return which files of a checkpoint say which tokens there are. Raises CheckpointError as `is_there` does."""
    if not checkpoint.owns_sidecars:
        return ()
    return tuple(name for name in VOCABULARY_FILES if is_there(checkpoint.root / name))


def read_tokenizer(checkpoint: Checkpoint, kind: str) -> RawTokenizer:
    """Return a checkpoint's tokenizer from one of its files. Raises CheckpointError where it cannot be read."""
    path = checkpoint.root / kind
    raw, added = read_whole(path, _MOST_BYTES), b""
    if kind == _VOCABULARY and is_there(checkpoint.root / _ADDED):
        added = read_whole(checkpoint.root / _ADDED, _MOST_BYTES)
    digest = hashlib.sha256(raw + b"\0" + added).hexdigest()
    return RawTokenizer(printable(str(path)), kind, raw, added, digest)


def tokens_by_id(tokenizer: RawTokenizer) -> dict[int, str] | None:
    """Return the token that each id stands for, added tokens included; None where the file cannot be understood."""
    try:
        if tokenizer.kind == _VOCABULARY:
            return _of_model(json.loads(tokenizer.raw)) | _of_model(json.loads(tokenizer.added or b"{}"))
        if tokenizer.kind != TOKENIZER_FILE:
            return None
        tree = json.loads(tokenizer.raw)
        tokens = _of_model(tree["model"]["vocab"])
        tokens |= {_whole(added["id"]): str(added["content"]) for added in tree.get("added_tokens") or ()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    return tokens


def _of_model(vocabulary: Mapping[str, Any] | list[Any]) -> dict[int, str]:
    if isinstance(vocabulary, list):  # a unigram model: pairs of token and score
        return {number: str(pair[0]) for number, pair in enumerate(vocabulary)}
    return {_whole(number): token for token, number in vocabulary.items()}


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("an id is a whole number")
    return number
