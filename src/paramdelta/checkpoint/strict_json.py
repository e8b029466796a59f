"""JSON as the standard defines it, where the standard library reads more than that.

Refused although ``json`` lets them through: duplicate keys, NaN and Infinity, lone surrogates, and
documents nested so deeply that they exhaust the stack. ``-0`` is read as the float that it is to other
parsers, not as the integer 0.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


class DuplicateKeyError(ValueError):
    """An object names a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"duplicate key {key!r}")
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return mapping


def _no_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _int_or_negative_zero(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def parse(raw: bytes) -> Any:
    """Return the value of the UTF-8 document `raw`; raise ValueError with the reason if it is not JSON."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    # Most documents hold neither "-0" nor escapes: then the C scanner reads integers itself, and every
    # string is sound.
    parse_int = _int_or_negative_zero if "-0" in text else None
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=parse_int)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from None
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate in a string") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return tree
