"""What an output says of its inputs: names that mean something to others, never the user's paths; and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from paramdelta.checkpoint.hub import model_of
from paramdelta.storage.remote.address import is_remote

if TYPE_CHECKING:
    from paramdelta.planning.plan import Input, Plan


def input_name(source: Input) -> str:
    """Return what an input is called: a model of the Hub with its commit, or the last part of its path."""
    model = model_of(source.path)
    if model is not None:
        return str(model)
    return source.path.rpartition("/")[2] if is_remote(source.path) else Path(source.path).absolute().name


def listed_inputs(plan: Plan) -> list[dict[str, str]]:
    """Return role, name and fingerprint of every input, as the receipt has them.

    A fingerprint is the SHA-256 of index and config.json, and of each shard's header, size, time of change, and, in the
    Hub's cache, the name of its blob, which is the digest of its content. Nothing else is read of the tensors.
    """
    return [
        {"role": source.role, "name": input_name(source), "fingerprint": _fingerprint(plan, source)}
        for source in plan.inputs
    ]


def _fingerprint(plan: Plan, source: Input) -> str:
    shards = [
        [file.header_digest, file.identity.size, file.identity.mtime_ns, file.identity.version or _blob(file.path)]
        for file in (plan.files[place] for place in source.files)
    ]
    return hashlib.sha256(json.dumps([source.digests, shards]).encode()).hexdigest()


def _blob(path: str) -> str | None:
    """Return the name of the blob that a snapshot in the Hub's cache links to."""
    target = Path(os.path.realpath(path))
    return target.name if target.parent.name == "blobs" else None
