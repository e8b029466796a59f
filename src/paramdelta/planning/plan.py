"""The plan: what a merge does, to the byte, made from headers alone, frozen and fingerprinted."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.checkpoint import Checkpoint, FileIdentity, open_checkpoint
from paramdelta.checkpoint.sidecars import Sidecar, choose_sidecars
from paramdelta.checkpoint.unsupported import refuse_unmergeable
from paramdelta.checkpoint.wording import listed, quoted
from paramdelta.errors import RecipeError
from paramdelta.planning.layout import Layout, OutputShard, by_size, lay_out, like_checkpoint
from paramdelta.planning.manifest import Member, Operand, Operation, build_manifest
from paramdelta.planning.recipe import Delta, Recipe
from paramdelta.planning.units import parse_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ARITHMETIC: Final = 1
"""Version of the arithmetic and the layout: it rises when the same request would give other bytes."""


_DIGESTED: Final = ("fingerprint", "recipe", "inputs", "files", "tensors", "shards", "index", "sidecars")
"""What `Plan.from_json` insists on; others may add to or change the rest of a plan's JSON."""


class InputFile(NamedTuple):
    """One shard of an input, as it was when the plan was made."""

    path: str
    identity: FileIdentity
    header_digest: str


class PlanWarning(NamedTuple):
    """Something that the user should know before the merge: a code for scripts, a message for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint in its role, with its place among the plan's input files.

    Attributes:
        digests: of the index and of config.json, None where there is none.
    """

    role: str
    path: str
    files: range
    digests: tuple[str | None, str | None]


@dataclass(frozen=True)
class Plan:
    """What a merge does. Everything here follows from the recipe and the headers of its inputs.

    Attributes:
        inputs: the new base, then post and base of each delta.
        files: every shard of every input; operands point here.
        operations: one per tensor, in output order.
        layout: the output shards and the index.
    """

    recipe: Recipe
    inputs: tuple[Input, ...]
    files: tuple[InputFile, ...]
    operations: tuple[Operation, ...]
    layout: Layout
    sidecars: tuple[Sidecar, ...]
    warnings: tuple[PlanWarning, ...]

    @property
    def shards(self) -> tuple[OutputShard, ...]:
        """The output shards, in order."""
        return self.layout.shards

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of tensor data that the merge reads."""
        return sum(operation.bytes_read for operation in self.operations)

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of tensor data that the merge writes: the index's ``total_size``."""
        return sum(shard.data_bytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the recipe, every input's identity and the arithmetic's version, in hex.

        Paths do not count: an input may be moved or mounted elsewhere between two runs.
        """
        return _digest(self._identity())

    def _identity(self) -> dict[str, Any]:
        return {
            "arithmetic": ARITHMETIC,
            "alphas": [delta.alpha for delta in self.recipe.deltas],
            "dtype": self.recipe.dtype,
            "shard_size": self.recipe.shard_size,
            "inputs": [
                [source.digests, [_file_identity(self.files[place]) for place in source.files]]
                for source in self.inputs
            ],
            "sidecars": [[car.name, car.donor, car.identity.size, car.identity.mtime_ns] for car in self.sidecars],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data: what `from_json` needs, and what scripts read."""
        data = self._as_data()
        return data | {"digest": _digest({field: data[field] for field in _DIGESTED})}

    def _as_data(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "recipe": asdict(self.recipe),
            "inputs": [
                {
                    "role": source.role,
                    "path": source.path,
                    "index_digest": source.digests[0],
                    "config_digest": source.digests[1],
                    "files": [source.files.start, source.files.stop],
                }
                for source in self.inputs
            ],
            "files": [
                {"path": file.path, **asdict(file.identity), "header_digest": file.header_digest} for file in self.files
            ],
            "tensors": [
                {
                    "name": operation.name,
                    "op": operation.op,
                    "dtype": operation.dtype,
                    "shape": list(operation.shape),
                    "alphas": list(operation.alphas),
                    "sources": [
                        {
                            "file": self.files[o.file].path,
                            "place": o.file,
                            "offset": o.offset,
                            "dtype": o.dtype,
                        }
                        for o in operation.operands
                    ],
                }
                for operation in self.operations
            ],
            "shards": [
                {"name": shard.name, "bytes": shard.data_bytes, "tensors": len(shard.begins)} for shard in self.shards
            ],
            "index": self.layout.index is not None,
            "sidecars": [
                {"name": car.name, "source": str(car.source), "donor": car.donor, **asdict(car.identity)}
                for car in self.sidecars
            ],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "warnings": [warned._asdict() for warned in self.warnings],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Return the plan that `to_json` described.

        Raises:
            ValueError: the data was changed since: it does not have its own digest.
        """
        if data.get("digest") != _digest({field: data.get(field) for field in _DIGESTED}):
            raise ValueError("the plan was changed after it was made: its digest does not match")
        recipe = dict(data["recipe"])
        recipe["deltas"] = tuple(Delta(**delta) for delta in recipe["deltas"])
        operations = tuple(
            Operation(
                entry["name"],
                entry["op"],
                entry["dtype"],
                tuple(entry["shape"]),
                tuple(Operand(o["place"], o["offset"], o["dtype"]) for o in entry["sources"]),
                tuple(entry["alphas"]),
            )
            for entry in data["tensors"]
        )
        plan = cls(
            recipe=Recipe(**recipe),
            inputs=tuple(
                Input(i["role"], i["path"], range(*i["files"]), (i["index_digest"], i["config_digest"]))
                for i in data["inputs"]
            ),
            files=tuple(InputFile(f["path"], _identity_of(f), f["header_digest"]) for f in data["files"]),
            operations=operations,
            layout=lay_out(operations, [(s["name"], s["tensors"]) for s in data["shards"]], with_index=data["index"]),
            sidecars=tuple(
                Sidecar(s["name"], Path(s["source"]), s["donor"], _identity_of(s)) for s in data["sidecars"]
            ),
            warnings=tuple(PlanWarning(**warned) for warned in data["warnings"]),
        )
        if plan.fingerprint != data["fingerprint"]:
            raise ValueError("the plan was changed after it was made: its fingerprint does not match")
        return plan


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _identity_of(entry: dict[str, Any]) -> FileIdentity:
    return FileIdentity(entry["dev"], entry["ino"], entry["size"], entry["mtime_ns"])


def _file_identity(file: InputFile) -> list[Any]:
    return [Path(file.path).name, file.identity.size, file.identity.mtime_ns, file.header_digest]


def make_plan(recipe: Recipe) -> Plan:
    """Return the plan of a merge, from the headers of its inputs alone.

    Raises:
        CheckpointError: an input is missing, damaged or not supported.
        MismatchError: the checkpoints do not fit each other.
    """
    members, files = _open_members(recipe)
    for checkpoint in {id(member.checkpoint): member.checkpoint for member in members}.values():
        refuse_unmergeable(checkpoint)
    operations = build_manifest(members, [delta.alpha for delta in recipe.deltas], recipe.dtype)
    new_base, post = members[0].checkpoint, members[1].checkpoint
    if recipe.shard_size is None:
        sizes, with_index = like_checkpoint(new_base), new_base.index is not None
    else:
        sizes = by_size(operations, recipe.shard_size)
        with_index = len(sizes) > 1
    return Plan(
        recipe=recipe,
        inputs=tuple(_as_input(member) for member in members),
        files=files,
        operations=operations,
        layout=lay_out(operations, sizes, with_index=with_index),
        sidecars=choose_sidecars(post, new_base),
        warnings=tuple(_warnings(members, operations, recipe.dtype)),
    )


def _open_members(recipe: Recipe) -> tuple[list[Member], tuple[InputFile, ...]]:
    """Open every checkpoint once, however many roles it plays."""
    several = len(recipe.deltas) > 1
    wanted = [("new base", recipe.new_base)]
    for number, delta in enumerate(recipe.deltas, start=1):
        suffix = f" {number}" if several else ""
        wanted += [(f"post{suffix}", delta.post), (f"base{suffix}", delta.base)]
    opened: dict[str, tuple[Checkpoint, int]] = {}
    files: list[InputFile] = []
    members = []
    for role, path in wanted:
        if path not in opened:
            checkpoint = open_checkpoint(path)
            opened[path] = checkpoint, len(files)
            files += [InputFile(str(s.path), s.identity, s.header_digest) for s in checkpoint.shards]
        members.append(Member(role, *opened[path]))
    return members, tuple(files)


def _as_input(member: Member) -> Input:
    checkpoint = member.checkpoint
    files = range(member.first_file, member.first_file + len(checkpoint.shards))
    return Input(member.role, str(checkpoint.path), files, (checkpoint.index_digest, checkpoint.config_digest))


def _warnings(members: Sequence[Member], operations: Sequence[Operation], dtype: str | None) -> Iterator[PlanWarning]:
    for member in members:
        if member.checkpoint.config is None:
            message = f"{member.role} has no config.json beside its weights: {member.checkpoint.path}"
            yield PlanWarning("no-config", message)
    for one, other in itertools.combinations(members, 2):
        if one.first_file == other.first_file and {one.role.split()[0], other.role.split()[0]} != {"base"}:
            yield PlanWarning("same-inputs", f"{one.role} and {other.role} are the same checkpoint: is that meant?")
    copied = [operation for operation in operations if operation.op == "copy"]
    if copied:
        kinds = ", ".join(sorted({operation.dtype for operation in copied}))
        number = f"{len(copied):,} tensors" if len(copied) > 1 else "1 tensor"
        message = f"{number} of {kinds} taken from the new base, not added: "
        yield PlanWarning("integers-copied", message + listed([quoted(operation.name) for operation in copied]))
    said = _dtype_of_config(members[0].checkpoint)
    if dtype is not None and said not in {None, dtype}:
        message = f"the output is {dtype}, its config.json says {said}: loaders that go by it will convert"
        yield PlanWarning("config-dtype", message)


def _dtype_of_config(checkpoint: Checkpoint) -> str | None:
    """Return the safetensors name of the dtype that config.json tells loaders to use, None where it tells none."""
    config = checkpoint.config or {}
    said = config.get("dtype", config.get("torch_dtype"))
    try:
        return parse_dtype(said, "dtype") if isinstance(said, str) else None
    except RecipeError:
        return None
