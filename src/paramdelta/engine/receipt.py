"""The receipt in an output: what a merge wrote there, and so what a later one may remove."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.discovery import STAGING
from paramdelta.checkpoint.files import read_whole
from paramdelta.engine.digests import REGION
from paramdelta.engine.progress import Requantised
from paramdelta.errors import CheckpointError
from paramdelta.planning.identity import ARITHMETIC
from paramdelta.planning.layout import INDEX_FILE, SINGLE_FILE
from paramdelta.planning.provenance import listed_inputs
from paramdelta.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from paramdelta.engine.digests import Digest
    from paramdelta.engine.progress import Outcome
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.plan import Plan

RECEIPT: Final = "paramdelta.json"
SEAL: Final = "sha256"
"""The last field of a receipt: SHA-256 of all its bytes, with zeros in the place of these 64 digits."""

# 16 digits for each 4 MiB of shards: 5.6 MB for a 671B model in bf16. New infinities in all of its 90,000 tensors would
# take 12 MB more, and statistics 600 bytes a tensor and delta: 55 MB.
MOST_BYTES: Final = 512 << 20
_PIECE: Final = 1 << 20
_EXPANDED: Final = 2  # objects in objects in the outermost one are the last that get a line for each entry
_ZEROS: Final = b"0" * 64
_BEFORE_SEAL: Final = f'"{SEAL}": "'.encode()
_FIELDS_BEFORE_SEALS: Final = frozenset(
    {
        "paramdelta",
        "arithmetic",
        "fingerprint",
        "inputs",
        "alphas",
        "policies",
        "dtype",
        "shard_size",
        "exactly_rounded",
        "tensors",
        "bytes_read",
        "bytes_written",
        "files",
        "region_bytes",
        "nonfinite",
        "requantised",
    }
)


def compose_receipt(
    plan: Plan,
    outcome: Outcome,
    documents: Mapping[str, bytes],
    sidecar_digests: Mapping[str, str],
    statistics: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a finished output says of how it was made; inputs by name, without the user's paths.

    Args:
        documents: content of recipe and model card.
        sidecar_digests: SHA-256 of each sidecar, in hex.
        statistics: of the deltas, in all tensors together (``total``) and in each (``tensors``).
    """
    index = {} if plan.layout.index is None else {INDEX_FILE: plan.layout.index}
    small = {car.name: (car.size, sidecar_digests[car.name]) for car in plan.sidecars}
    small |= {name: (len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in (*documents.items(), *index.items())}
    return {
        "paramdelta": VERSION,
        "arithmetic": ARITHMETIC,
        "fingerprint": plan.fingerprint,
        "inputs": listed_inputs(plan),
        "alphas": [[delta.alpha, dict(delta.alphas)] for delta in plan.recipe.deltas],
        "policies": asdict(plan.recipe.policies),
        "dtype": plan.recipe.dtype,
        "shard_size": plan.recipe.shard_size,
        "exactly_rounded": plan.recipe.is_exact and not outcome.requantised,
        "tensors": len(plan.operations),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "files": [
            *(_of_shard(plan.shards[shard.number], shard.digest) for shard in outcome.shards),
            *({"name": name, "bytes": size, "sha256": digest} for name, (size, digest) in small.items()),
        ],
        "region_bytes": REGION,
        "nonfinite": counts_of(outcome),
        "requantised": losses_of(outcome),
        "statistics": statistics,
    }


def _of_shard(shard: OutputShard, digest: Digest) -> dict[str, Any]:
    return {"name": shard.name, "bytes": shard.size, "xxh3": digest.whole, "regions": "".join(digest.regions)}


def counts_of(outcome: Outcome) -> dict[str, dict[str, int]]:
    """Return the new infinities and NaNs by tensor, as plain data."""
    return {name: {"infinities": n.infinities, "nans": n.nans} for name, n in outcome.nonfinite.items()}


def losses_of(outcome: Outcome) -> dict[str, Any] | None:
    """Return what requantisation lost in blocks that were not copied, relative to the results there."""
    tensors = outcome.requantised
    if not tensors:
        return None
    worst = max(tensors, key=_relative_error)
    whole = Requantised("", *(math.fsum(sums) for sums in zip(*(each[1:] for each in tensors), strict=True)))
    return {
        "tensors": len(tensors),
        "relative_error": _relative_error(whole),
        "worst_tensor": worst.tensor,
        "worst_relative_error": _relative_error(worst),
    }


def _relative_error(lost: Requantised) -> float:
    return math.sqrt(lost.error / lost.size) if lost.size else 0.0


def sealed(receipt: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield a receipt as it is written, piece by piece: with a digest of itself, so that damage anywhere in it shows.

    What it says of each tensor is on a line of its own, and need not be in memory: any mapping will do.
    """
    digest = hashlib.sha256()
    fields = {name: value for name, value in receipt.items() if name != SEAL}
    for piece in _pieces(_expanded(fields, 0)):
        digest.update(piece)
        yield piece
    before, after = b",\n  " + _BEFORE_SEAL, b'"\n}\n'
    digest.update(before + _ZEROS + after)
    yield before + digest.hexdigest().encode() + after


def _pieces(texts: Iterable[str]) -> Iterator[bytes]:
    """Put texts together until they are worth a write."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= _PIECE:
            yield "".join(held).encode()
            held, size = [], 0
    yield "".join(held).encode()


def _expanded(value: Mapping[str, Any] | Sequence[Any], depth: int) -> Iterator[str]:
    """Yield JSON over several lines; the outermost object stays open."""
    is_mapping = isinstance(value, Mapping)
    yield "{" if is_mapping else "["
    indent = "  " * (depth + 1)
    for place, entry in enumerate(value):
        yield f"{',' if place else ''}\n{indent}{f'{json.dumps(entry)}: ' if is_mapping else ''}"
        inner = value[entry] if isinstance(value, Mapping) else entry
        if depth < _EXPANDED and isinstance(inner, Mapping | list | tuple) and inner:
            yield from _expanded(inner, depth + 1)
        else:
            yield json.dumps(dict(inner) if isinstance(inner, Mapping) else inner)
    if depth:
        yield f"\n{'  ' * depth}{'}' if is_mapping else ']'}"


def seal_flaw(raw: bytes, receipt: Mapping[str, Any]) -> str | None:
    """Return what a receipt's digest of itself says against it. Receipts of older versions have none."""
    if SEAL not in receipt:
        return None if receipt.keys() <= _FIELDS_BEFORE_SEALS else "is not what was written: its own SHA-256 is gone"
    head, _, tail = raw.rpartition(_BEFORE_SEAL)
    digest, rest = tail[: len(_ZEROS)], tail[len(_ZEROS) :]
    found = hashlib.sha256(b"".join((head, _BEFORE_SEAL, _ZEROS, rest))).hexdigest().encode()
    return None if found == digest else "is not what was written: its own SHA-256 differs"


def parse_receipt(raw: bytes) -> dict[str, Any] | None:
    """Return the receipt that these bytes are, whatever it says; None where they are no receipt."""
    try:
        receipt = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return receipt if isinstance(receipt, dict) and isinstance(receipt.get("fingerprint"), str) else None


def read_receipt(path: Path) -> dict[str, Any] | None:
    """Return the receipt of the output at ``path``, or None where there is none that makes sense."""
    try:
        receipt = parse_receipt(read_whole(path / RECEIPT, MOST_BYTES))
    except CheckpointError:
        return None
    return receipt if receipt is not None and lists_files(receipt) else None


def lists_files(receipt: Mapping[str, Any]) -> bool:
    """Return whether a receipt has a list of files: plain names, with a size each."""
    files = receipt.get("files")
    return isinstance(files, list) and all(map(_is_entry, files))


def listed_files(receipt: dict[str, Any] | None) -> dict[str, int]:
    """Return name and size of every file that a receipt lists: plain names, of files directly beside it."""
    return {} if receipt is None else {entry["name"]: entry["bytes"] for entry in receipt["files"]}


def nonfinite_of(receipt: dict[str, Any] | None) -> dict[str, dict[str, int]]:
    """Return the new infinities and NaNs that a receipt tells of, by tensor."""
    counts = {} if receipt is None else receipt.get("nonfinite")
    return counts if isinstance(counts, dict) else {}


def deltas_of(receipt: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return what a receipt says of each delta in all tensors together; nothing where it is of an older version."""
    statistics = {} if receipt is None else receipt.get("statistics")
    total = statistics.get("total") if isinstance(statistics, dict) else None
    return total if isinstance(total, list) else []


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
