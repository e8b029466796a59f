"""The plan: what a merge does, to the byte, made from headers alone, frozen and fingerprinted."""

from __future__ import annotations

import contextlib
import gc
import itertools
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paramdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from paramdelta.checkpoint.embeddings import Embeddings, embeddings_of
from paramdelta.checkpoint.scaling import Blocks, Scaling, scaling_of
from paramdelta.checkpoint.sidecar_names import CONFIG_FILE
from paramdelta.checkpoint.sidecars import Sidecar, choose_sidecars
from paramdelta.checkpoint.unsupported import refuse_unmergeable
from paramdelta.planning.config import output_config
from paramdelta.planning.identity import digest_of, identity_of
from paramdelta.planning.layout import Layout, OutputShard, by_size, lay_out, like_checkpoint
from paramdelta.planning.manifest import Member, build_manifest
from paramdelta.planning.parts import Operand, Operation, Part, Scale
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Delta, Recipe
from paramdelta.planning.vocabulary import Comparison, differing_tokens, donor_of_tokens, taken_tokens
from paramdelta.planning.warnings import PlanWarning, Tokens, all_warnings
from paramdelta.storage.identity import FileIdentity
from paramdelta.storage.remote.address import is_remote
from paramdelta.storage.remote.place import file_at

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIGESTED: Final = ("fingerprint", "recipe", "inputs", "files", "tensors", "shards", "index", "sidecars")
"""What `Plan.from_json` insists on; others may add to or change the rest of a plan's JSON."""


class InputFile(NamedTuple):
    """One shard of an input, as it was when the plan was made."""

    path: str
    identity: FileIdentity
    header_digest: str


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
    def bytes_fetched(self) -> int:
        """Bytes of tensor data that come over the network: those of `bytes_read` that are not on this machine."""
        elsewhere = {place for place, file in enumerate(self.files) if is_remote(file.path)}
        parts = (part for operation in self.operations for part in operation.parts) if elsewhere else ()
        return sum(o.nbytes(part.elements) for part in parts for o in part.operands if o.file in elsewhere)

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of tensor data that the merge writes: the index's ``total_size``."""
        return sum(shard.data_bytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the recipe, every input's identity and the arithmetic's version, in hex.

        Paths do not count: an input may be moved or mounted elsewhere between two runs.
        """
        return digest_of(identity_of(self))

    @property
    def pinned_recipe(self) -> Recipe:
        """The recipe with the revision that was read of each input elsewhere that has revisions."""
        return self.recipe.moved(
            {
                path: source.path
                for path, source in zip(self.recipe.paths, self.inputs, strict=True)
                if is_remote(source.path)
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data: what `from_json` needs, and what scripts read."""
        with _collector_paused():
            data = self.described()
            return data | {"digest": digest_of({field: data[field] for field in _DIGESTED})}

    def described(self) -> dict[str, Any]:
        """Return what scripts read of a plan, as plain data."""
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
                    "blocks": None if operation.blocks is None else list(operation.blocks),
                    "parts": [
                        {"elements": part.elements, "alphas": list(part.alphas), "sources": len(part.operands)}
                        for part in operation.parts
                    ],
                    "sources": [
                        {
                            "file": self.files[o.file].path,
                            "place": o.file,
                            "offset": o.offset,
                            "dtype": o.dtype,
                            "scale": None if o.scale is None else list(o.scale),
                        }
                        for part in operation.parts
                        for o in part.operands
                    ],
                }
                for operation in self.operations
            ],
            "shards": [
                {"name": shard.name, "bytes": shard.data_bytes, "tensors": len(shard.begins)} for shard in self.shards
            ],
            "index": self.layout.index is not None,
            "sidecars": [
                {
                    "name": car.name,
                    "source": str(car.source),
                    "donor": car.donor,
                    "text": car.text,
                    **asdict(car.identity),
                }
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
        if data.get("digest") != digest_of({field: data.get(field) for field in _DIGESTED}):
            raise ValueError("the plan was changed after it was made: its digest does not match")
        operations = tuple(
            Operation(
                entry["name"],
                entry["op"],
                entry["dtype"],
                tuple(entry["shape"]),
                _parts_of(entry),
                None if entry["blocks"] is None else Blocks(*entry["blocks"]),
            )
            for entry in data["tensors"]
        )
        plan = cls(
            recipe=_recipe_of(data["recipe"]),
            inputs=tuple(
                Input(i["role"], i["path"], range(*i["files"]), (i["index_digest"], i["config_digest"]))
                for i in data["inputs"]
            ),
            files=tuple(InputFile(f["path"], _identity_of(f), f["header_digest"]) for f in data["files"]),
            operations=operations,
            layout=lay_out(operations, [(s["name"], s["tensors"]) for s in data["shards"]], with_index=data["index"]),
            sidecars=tuple(
                Sidecar(s["name"], file_at(s["source"]), s["donor"], _identity_of(s), s["text"])
                for s in data["sidecars"]
            ),
            warnings=tuple(PlanWarning(**warned) for warned in data["warnings"]),
        )
        if plan.fingerprint != data["fingerprint"]:
            raise ValueError("the plan was changed after it was made: its fingerprint does not match")
        return plan


def _recipe_of(data: dict[str, Any]) -> Recipe:
    deltas = tuple(Delta(**{**delta, "alphas": tuple(map(tuple, delta["alphas"]))}) for delta in data["deltas"])
    policies: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in data["policies"].items()
    }
    return Recipe(**{**data, "deltas": deltas, "policies": Policies(**policies)})


def _parts_of(entry: dict[str, Any]) -> tuple[Part, ...]:
    sources = iter(entry["sources"])
    return tuple(
        Part(
            part["elements"],
            tuple(
                Operand(o["place"], o["offset"], o["dtype"], None if o["scale"] is None else Scale(*o["scale"]))
                for o in itertools.islice(sources, part["sources"])
            ),
            tuple(part["alphas"]),
        )
        for part in entry["parts"]
    )


def _identity_of(entry: dict[str, Any]) -> FileIdentity:
    return FileIdentity(entry["dev"], entry["ino"], entry["size"], entry["mtime_ns"], entry.get("version", ""))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Let no garbage be collected: of a plan's million objects all stay, and all would be looked at time and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def make_plan(recipe: Recipe) -> Plan:
    """Return the plan of a merge, from headers and sidecars alone.

    Raises:
        CheckpointError: an input is missing, damaged or not supported.
        MismatchError: the checkpoints do not fit each other, and no policy of the recipe says what to do.
    """
    members, files = _open_members(recipe)
    manifest = build_manifest(members, recipe.deltas, recipe.policies, recipe.dtype)
    new_base, post = members[0].checkpoint, members[1].checkpoint
    if recipe.shard_size is None:
        sizes, with_index = like_checkpoint(new_base, manifest.shards), new_base.index is not None
    else:
        sizes = by_size(manifest.operations, recipe.shard_size)
        with_index = len(sizes) > 1
    tokens = differing_tokens(members, recipe.policies, manifest)
    taken = taken_tokens(members, manifest)
    donor = donor_of_tokens(members, recipe.policies, manifest, taken)
    strange = taken if donor.is_post else Comparison()
    sidecars = choose_sidecars(post, new_base, posts_tokens=donor.is_post, code=recipe.trust_remote_code)
    config = output_config(members, manifest, recipe.dtype, post_ids=donor.is_post)
    return Plan(
        recipe=recipe,
        inputs=tuple(_as_input(member) for member in members),
        files=files,
        operations=manifest.operations,
        layout=lay_out(manifest.operations, sizes, with_index=with_index),
        sidecars=tuple(replace(car, text=config.text) if car.name == CONFIG_FILE else car for car in sidecars),
        warnings=tuple(all_warnings(members, manifest, config, Tokens(tokens, strange, donor), sidecars, recipe.dtype)),
    )


def _open_members(recipe: Recipe) -> tuple[list[Member], tuple[InputFile, ...]]:
    """Open every checkpoint once, however many roles it plays."""
    several = len(recipe.deltas) > 1
    wanted = [("new base", recipe.new_base)]
    for number, delta in enumerate(recipe.deltas, start=1):
        suffix = f" {number}" if several else ""
        wanted += [(f"post{suffix}", delta.post), (f"base{suffix}", delta.base)]
    opened: dict[str, tuple[Checkpoint, int, Embeddings, Scaling]] = {}
    files: list[InputFile] = []
    members = []
    for role, path in wanted:
        if path not in opened:
            checkpoint = open_checkpoint(path)
            scaling = scaling_of(checkpoint)
            refuse_unmergeable(checkpoint, scaling)
            opened[path] = checkpoint, len(files), embeddings_of(checkpoint), scaling
            files += [InputFile(str(s.path), s.identity, s.header_digest) for s in checkpoint.shards]
        members.append(Member(role, *opened[path]))
    return members, tuple(files)


def _as_input(member: Member) -> Input:
    checkpoint = member.checkpoint
    files = range(member.first_file, member.first_file + len(checkpoint.shards))
    return Input(member.role, str(checkpoint.path), files, (checkpoint.index_digest, checkpoint.config_digest))
