"""What makes two merges the same: the request, every input as it was, the arithmetic's version. Paths do not count."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paramdelta.checkpoint.wording import clipped, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paramdelta.planning.plan import InputFile, Plan
    from paramdelta.storage.identity import FileIdentity

ARITHMETIC: Final = 1
"""Version of the arithmetic and the layout: it rises when the same request would give other bytes."""

_REQUEST: Final = ("arithmetic", "alphas", "dtype", "shard_size")


def identity_of(plan: Plan) -> dict[str, Any]:
    """Return everything on which the bytes of an output depend, as plain data."""
    return {
        "arithmetic": ARITHMETIC,
        "alphas": [[delta.alpha, [list(pair) for pair in delta.alphas]] for delta in plan.recipe.deltas],
        "policies": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(plan.recipe.policies).items()
        },
        "dtype": plan.recipe.dtype,
        "shard_size": plan.recipe.shard_size,
        "inputs": [
            [source.role, list(source.digests), [_of_file(plan.files[place]) for place in source.files]]
            for source in plan.inputs
        ],
        "sidecars": [
            [car.name, car.donor, car.identity.size, *_state(car.identity), car.text] for car in plan.sidecars
        ],
    }


def digest_of(data: Any) -> str:
    """Return the SHA-256 of plain data, in hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _of_file(file: InputFile) -> list[Any]:
    return [Path(file.path).name, file.identity.size, *_state(file.identity), file.header_digest]


def _state(identity: FileIdentity) -> list[int | str]:
    """Return what tells a file's states apart: when it was changed, or its version where it is elsewhere."""
    return [identity.version] if identity.version else [identity.mtime_ns]


def differences(old: Any, new: dict[str, Any]) -> list[str]:
    """Return a line for each respect in which two identities differ; ``old`` may be anything, as it was read."""
    try:
        return list(_differences(old, new))
    except (TypeError, KeyError, ValueError, IndexError, AttributeError):
        return ["it cannot be told in what"]


def _differences(old: Any, new: dict[str, Any]) -> Iterator[str]:
    before, now = ({key: each[key] for key in _REQUEST} | each["policies"] for each in (old, new))
    same_request = before == now
    for key in now:
        if before.get(key) != now[key]:
            yield f"{key.replace('_', '-')}: {_brief(before.get(key))} then, {_brief(now[key])} now"
    if [role for role, *_ in old["inputs"]] != [role for role, *_ in new["inputs"]]:
        yield f"{len(old['inputs'])} checkpoints then, {len(new['inputs'])} now"
        return
    for (role, was_digests, was_files), (_, digests, files) in zip(old["inputs"], new["inputs"], strict=True):
        for what, was, now in zip(("index", "config.json"), was_digests, digests, strict=True):
            if was != now:
                yield f"{role}: another {what}"
        yield from _of_files(role, {name: rest for name, *rest in was_files}, {name: rest for name, *rest in files})
    if same_request:  # else what is corrected in them may follow from it
        was_cars, cars = ({name: rest for name, *rest in each["sidecars"]} for each in (old, new))
        yield from _of_files("sidecars", was_cars, cars)


def _of_files(whose: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            how = "was not there" if name not in old else "is not there any more" if name not in new else "has changed"
            yield f"{whose}: {printable(clipped(str(name)))} {how}"


def _brief(value: Any) -> str:
    return printable(clipped(json.dumps(value)))
