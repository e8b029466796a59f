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
_MOST_BYTES: Final = 256 << 20


class RawTokenizer(NamedTuple):
    """The bytes of a tokenizer.json, read and not yet understood: most are the same in all three checkpoints."""

    file: str
    raw: bytes
    digest: str


def read_tokenizer(checkpoint: Checkpoint) -> RawTokenizer | None:
    """Return a checkpoint's tokenizer.json, None where it has none. Raises CheckpointError where it cannot be read."""
    path = checkpoint.root / TOKENIZER_FILE
    if not checkpoint.owns_sidecars or not is_there(path):
        return None
    raw = read_whole(path, _MOST_BYTES)
    return RawTokenizer(printable(str(path)), raw, hashlib.sha256(raw).hexdigest())


def tokens_by_id(tokenizer: RawTokenizer) -> dict[int, str] | None:
    """Return the token that each id stands for, added tokens included; None where the file cannot be understood."""
    try:
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
