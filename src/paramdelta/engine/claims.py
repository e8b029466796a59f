"""What a receipt claims of an output's files, and whether the receipt itself is what was written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.discovery import STAGING
from paramdelta.checkpoint.files import is_there, read_whole
from paramdelta.checkpoint.unsupported import unfinished
from paramdelta.checkpoint.wording import printable
from paramdelta.engine.digests import REGION, Digest
from paramdelta.engine.failure import Failure
from paramdelta.engine.receipt import MOST_BYTES, RECEIPT, SEAL, lists_files, parse_receipt, seal_flaw
from paramdelta.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

_DIGITS: Final = re.compile("[0-9a-f]*")
_DIGITS_OF_REGION: Final = 16
_DIGITS_OF_SHARD: Final = 32
_DIGITS_OF_FILE: Final = 64
_LARGEST_FILE: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Claims:
    """What a receipt says of an output's files.

    Attributes:
        small: SHA-256 in hex of each file that is no shard.
        shards: digest of each shard.
        sizes: bytes of each file.
    """

    small: dict[str, str]
    shards: dict[str, Digest]
    sizes: dict[str, int]

    def without(self, names: Container[str]) -> Claims:
        """Return the claims about other files than these."""
        return Claims(
            {name: digest for name, digest in self.small.items() if name not in names},
            {name: digest for name, digest in self.shards.items() if name not in names},
            {name: size for name, size in self.sizes.items() if name not in names},
        )


def read_claims(output: Path) -> tuple[Claims, list[Failure]]:
    """Return what the receipt in an output claims, and what is wrong with the receipt itself.

    One that is damaged so that its claims are none any more makes no claims; that alone is then wrong.

    Raises:
        CheckpointError: there is no receipt, or it is another version's.
    """
    raw, receipt = _read(output)
    flaw = seal_flaw(raw, receipt)
    try:
        claims = _parse(receipt)
    except (KeyError, TypeError, ValueError):
        if flaw is None and SEAL in receipt:
            raise CheckpointError(
                f"{RECEIPT} has no digests that this version understands",
                file=printable(str(output / RECEIPT)),
                remedy="It was written by another version of paramdelta: verify with that one.",
            ) from None
        return Claims({}, {}, {}), [Failure(RECEIPT, "is damaged: what it says of the files makes no sense")]
    return claims, [] if flaw is None else [Failure(RECEIPT, flaw)]


def _read(output: Path) -> tuple[bytes, dict[str, Any]]:
    if not is_there(output) or not output.is_dir():
        raise CheckpointError("no such directory", file=printable(str(output)), remedy="Check the spelling.")
    raw = read_whole(output / RECEIPT, MOST_BYTES) if is_there(output / RECEIPT) else b""
    receipt = parse_receipt(raw)
    if receipt is not None:
        return raw, receipt
    if is_there(output / STAGING):
        raise unfinished(output)
    raise CheckpointError(
        f"no {RECEIPT} that makes sense: not an output of paramdelta, or damaged",
        file=printable(str(output)),
        remedy="Only what paramdelta has written can be verified.",
    )


def _parse(receipt: dict[str, Any]) -> Claims:
    """Return a receipt's claims. Raises KeyError, TypeError or ValueError where they are none."""
    if receipt["region_bytes"] != REGION or not lists_files(receipt):
        raise ValueError
    claims = Claims({}, {}, {})
    for entry in receipt["files"]:
        name = entry["name"]
        claims.sizes[name] = entry["bytes"]
        if "xxh3" in entry:
            claims.shards[name] = _digest_of(entry)
        else:
            claims.small[name] = _hex(entry["sha256"], _DIGITS_OF_FILE)
    if not claims.shards or len(claims.sizes) < len(receipt["files"]) or max(claims.sizes.values()) > _LARGEST_FILE:
        raise ValueError
    return claims


def _digest_of(entry: dict[str, Any]) -> Digest:
    regions = _hex(entry["regions"], _DIGITS_OF_REGION * -(-entry["bytes"] // REGION))
    cut = (regions[at : at + _DIGITS_OF_REGION] for at in range(0, len(regions), _DIGITS_OF_REGION))
    return Digest(_hex(entry["xxh3"], _DIGITS_OF_SHARD), tuple(cut))


def _hex(text: Any, digits: int) -> str:
    if not isinstance(text, str) or len(text) != digits or _DIGITS.fullmatch(text) is None:
        raise ValueError
    return text
