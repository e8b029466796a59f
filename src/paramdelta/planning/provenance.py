"""What an output says of its inputs: names that mean something to others, never the user's paths; and fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from paramdelta.checkpoint.hub import model_of

if TYPE_CHECKING:
    from paramdelta.planning.plan import Input, Plan


def input_name(source: Input) -> str:
    """Return what an input is called: a model of the Hub with its commit, or the last part of its path."""
    model = model_of(Path(source.path))
    return str(model) if model is not None else Path(source.path).absolute().name


def listed_inputs(plan: Plan) -> list[dict[str, str]]:
    """Return role, name and fingerprint of every input, as the receipt has them.

    A fingerprint is the SHA-256 of what tells a checkpoint from others without reading its tensors: index, config.json,
    and header and size of every shard.
    """
    return [
        {"role": source.role, "name": input_name(source), "fingerprint": _fingerprint(plan, source)}
        for source in plan.inputs
    ]


def _fingerprint(plan: Plan, source: Input) -> str:
    shards = [[plan.files[place].header_digest, plan.files[place].identity.size] for place in source.files]
    return hashlib.sha256(json.dumps([source.digests, shards]).encode()).hexdigest()
