"""JSON as the standard defines it, where the standard library reads more than that.

Refused although ``json`` lets them through: duplicate keys, NaN and Infinity, lone surrogates, and
documents nested so deeply that they exhaust the stack. ``-0`` is read as the float that it is to other
parsers, not as the integer 0.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, Final, NoReturn

from paramdelta.checkpoint.wording import quoted

_CONTAINERS: Final = frozenset({dict, list})
_SPACED_KEY_ENDS: Final = re.compile(r'"[ \t\n\r]+:')


class InvalidJSONError(ValueError):
    """The document is not JSON; the message says why."""


def parse(raw: bytes) -> Any:
    """Return the value of the UTF-8 document `raw`; raise InvalidJSONError where it is not JSON."""
    try:
        text = raw.decode()
        # Most documents hold neither "-0" nor escapes: then the C scanner reads integers itself, and every
        # string is sound.
        parse_int = _int_or_negative_zero if "-0" in text else None
        tree = json.loads(text, parse_constant=_no_constant, parse_int=parse_int)
        # Doubled keys, or a string that looks like the end of one: look at each.
        if _keys(tree) != text.count('":') + len(_SPACED_KEY_ENDS.findall(text)):
            tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=parse_int)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()
    except InvalidJSONError:
        raise
    except json.JSONDecodeError as error:
        raise InvalidJSONError(f"{error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise InvalidJSONError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise InvalidJSONError("a lone surrogate in a string") from None
    except RecursionError:
        raise InvalidJSONError("nested too deeply") from None
    except ValueError:  # from int(), which refuses thousands of digits
        raise InvalidJSONError("a number is out of range") from None
    return tree


def _keys(tree: Any) -> int:
    """Return how many keys a document has, doubled ones counted once.

    In the text every key ends in a quote, perhaps spaces, and a colon. Doubled keys make there be more such ends, and
    so does whatever else looks like one: where the numbers agree, no key is doubled.
    """
    count, level = 0, [tree] if type(tree) in _CONTAINERS else []
    while level:
        count += sum(len(holder) for holder in level if type(holder) is dict)
        items = itertools.chain.from_iterable(holder.values() if type(holder) is dict else holder for holder in level)
        level = [item for item in items if type(item) in _CONTAINERS]
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidJSONError(f"duplicate key {quoted(key)}")
            seen.add(key)
    return mapping


def _no_constant(literal: str) -> NoReturn:
    raise InvalidJSONError(f"{literal} is not JSON")


def _int_or_negative_zero(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)
