"""The receipt in an output: what a merge wrote there, and so what a later one may remove."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.files import read_whole
from paramdelta.errors import CheckpointError
from paramdelta.planning.layout import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from paramdelta.planning.plan import Plan

STAGING: Final = ".paramdelta"
RECEIPT: Final = "paramdelta.json"
_MOST_BYTES: Final = 1 << 30


def read_receipt(path: Path) -> dict[str, Any] | None:
    """Return the receipt of the output at ``path``, or None where there is none that makes sense."""
    try:
        receipt = json.loads(read_whole(path / RECEIPT, _MOST_BYTES))
    except (CheckpointError, ValueError, RecursionError):
        return None
    if not isinstance(receipt, dict) or not isinstance(receipt.get("fingerprint"), str):
        return None
    files = receipt.get("files")
    return receipt if isinstance(files, list) and all(map(_is_entry, files)) else None


def listed_files(receipt: dict[str, Any] | None) -> dict[str, int]:
    """Return name and size of every file that a receipt lists: plain names, of files directly beside it."""
    return {} if receipt is None else {entry["name"]: entry["bytes"] for entry in receipt["files"]}


def nonfinite_of(receipt: dict[str, Any] | None) -> dict[str, dict[str, int]]:
    """Return the new infinities and NaNs that a receipt tells of, by tensor."""
    counts = {} if receipt is None else receipt.get("nonfinite")
    return counts if isinstance(counts, dict) else {}


def is_complete(path: Path, plan: Plan) -> bool:
    """Return whether ``path`` holds the output of exactly this plan, every file with its size."""
    receipt = read_receipt(path)
    if receipt is None or receipt["fingerprint"] != plan.fingerprint:
        return False
    files = listed_files(receipt)
    wanted = {shard.name: shard.size for shard in plan.shards}
    if plan.layout.index is not None:
        wanted[INDEX_FILE] = len(plan.layout.index)
    try:
        return wanted.items() <= files.items() and all(
            (path / name).is_file() and (path / name).stat().st_size == size for name, size in files.items()
        )
    except OSError:
        return False


def is_abandoned(path: Path, receipt: dict[str, Any], *, died: bool) -> bool:
    """Return whether what a receipt lists is not worth keeping: nothing of it is left, or a run died publishing it.

    Args:
        died: whether a run left its staging directory behind. Without that, an output whose index alone is missing is
            one that its owner moved. True also while another run is at that very point: only the lock tells.
    """
    names = listed_files(receipt)
    last = INDEX_FILE if INDEX_FILE in names else SINGLE_FILE
    if died:
        return last in names and not os.path.lexists(path / last)
    return not any(os.path.lexists(path / name) for name in names)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and _is_plain(entry["name"])
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
    )


def _is_plain(name: str) -> bool:
    """Return whether a name can only mean a file directly in a directory, on any system, and not one of a run's own."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name not in {"", ".", ".."} and name.casefold() not in {STAGING, RECEIPT} and not set(name) & set("/\\:\0")
