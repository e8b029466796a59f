"""A path to a `Checkpoint`: every tensor's shard, dtype, shape and place, from headers alone.

Only the headers, the index and config.json are read; tensor data never is, and nothing is mapped into
memory. Which files make a checkpoint is decided in `discovery`; what a header and an index may say, in
`header` and `index`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from paramdelta.checkpoint import hub, unsupported
from paramdelta.checkpoint.discovery import Weights, find_weights
from paramdelta.checkpoint.files import is_named, is_there, open_file, prefetch, read_whole
from paramdelta.checkpoint.header import MAX_HEADER_BYTES, PREFIX_BYTES, Header, parse_header, parse_length
from paramdelta.checkpoint.index import parse_index
from paramdelta.checkpoint.sidecar_names import CONFIG_FILE
from paramdelta.checkpoint.wording import listed, printable, quoted
from paramdelta.errors import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from paramdelta.storage.identity import FileIdentity
    from paramdelta.storage.remote.place import Place

MAX_INDEX_BYTES = 512 << 20
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One ``.safetensors`` file of a checkpoint.

    `header_digest` is the SHA-256, in hex, of its first `data_offset` bytes: the length prefix and the JSON.
    """

    name: str
    path: Place
    identity: FileIdentity
    header_digest: str
    data_offset: int
    metadata: Mapping[str, str]


class TensorRef(NamedTuple):
    """Where a tensor is: `nbytes` bytes from byte `offset` of the file ``Checkpoint.shards[shard]``."""

    shard: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    `path` is what the user named, `root` the directory that holds the shards and the sidecars. `index` is
    the name of the index file, None for a single file. Shards are sorted by name; `tensors` is in shard
    order, then in offset order. `config` is the parsed config.json. Digests are SHA-256 of whole files, in hex.
    `owns_sidecars` says whether what lies in `root` belongs to these weights: not where a path names one file among
    others.
    """

    path: Place
    root: Place
    index: str | None
    index_digest: str | None
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] | None
    config_digest: str | None
    owns_sidecars: bool


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint at `path`: a directory, an index or one ``.safetensors`` file, here or elsewhere.

    ``org/name[@revision]`` is a model of the Hub, an address like ``s3://bucket/prefix`` what it says.

    Raises CheckpointError where files are missing, damaged, or contradict each other (HeaderError where it
    is a header), and UnsupportedCheckpointError where they hold weights in another form than safetensors.
    """
    place = hub.locate(path)
    weights = find_weights(place)
    index = _read_index(weights) if weights.is_index else None
    prefetch([weights.root / name for name in (index.shard_names if index else [weights.entry])])
    shards: list[Shard] = []
    tensors: dict[str, TensorRef] = {}
    strays: list[str] = []
    for name in index.shard_names if index else [weights.entry]:
        shard, header = _read_shard(weights.root / name)
        if index:
            strays += [
                f"{quoted(tensor)} in {name}" for tensor in header.tensors if index.weight_map.get(tensor) != name
            ]
        number, base = len(shards), header.data_offset
        for tensor, (dtype, shape, begin, end) in header.tensors.items():
            tensors[tensor] = TensorRef(number, dtype, shape, base + begin, end - begin)
        shards.append(shard)
    if index:
        _require_agreement(index, tensors, strays)
    config, config_digest = _read_config(weights.root / CONFIG_FILE) if weights.owns_sidecars else (None, None)
    return Checkpoint(
        path=place,
        root=weights.root,
        index=weights.entry if index else None,
        index_digest=index.digest if index else None,
        shards=tuple(shards),
        tensors=tensors,
        config=config,
        config_digest=config_digest,
        owns_sidecars=weights.owns_sidecars,
    )


@dataclass(frozen=True, slots=True)
class _Index:
    file: str
    weight_map: dict[str, str]
    shard_names: list[str]
    digest: str


def _read_index(weights: Weights) -> _Index:
    path = weights.root / weights.entry
    file = printable(str(path))
    raw = read_whole(path, MAX_INDEX_BYTES)
    weight_map = parse_index(raw, file)
    names = sorted(set(weight_map.values()))
    if weights.rival is not None and weights.rival not in names:
        raise CheckpointError(
            f"the directory has both {weights.entry} and {weights.rival}, which that index does not name",
            file=file,
            remedy=f"Remove the one that is out of date: {weights.rival}, or the index and its shards.",
        )
    _require_shards(weights.root, names, file)
    return _Index(file, weight_map, names, hashlib.sha256(raw).hexdigest())


def _require_shards(root: Place, names: Sequence[str], file: str) -> None:
    missing = [name for name in names if not is_there(root / name)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards that the index names are missing: {', '.join(missing)}",
            file=file,
            remedy="Download them into the same directory.",
        )


def _require_agreement(index: _Index, tensors: Mapping[str, TensorRef], strays: Sequence[str]) -> None:
    flaws = []
    absent = [f"{quoted(tensor)} in {shard}" for tensor, shard in index.weight_map.items() if tensor not in tensors]
    if absent:
        flaws.append(f"{len(absent)} tensors that the index names are not there: {listed(absent)}")
    if strays:
        flaws.append(f"{len(strays)} tensors are not where the index says, or unknown to it: {listed(strays)}")
    if flaws:
        raise CheckpointError(
            f"index and shards contradict each other: {'; '.join(flaws)}",
            file=index.file,
            remedy="They are of different versions, or one is damaged: download all of them again.",
        )


def _read_shard(path: Place) -> tuple[Shard, Header]:
    file = printable(str(path))
    with open_file(path) as opened:
        identity = opened.identity
        prefix = opened.read(min(PREFIX_BYTES, identity.size))
        # Looked at only where the file cannot be safetensors anyway: any 8 bytes may open an honest one.
        if int.from_bytes(prefix, "little") > MAX_HEADER_BYTES:
            unsupported.refuse_by_magic(prefix, file)
        raw = opened.read(parse_length(prefix, identity.size, file))
    header = parse_header(raw, identity.size, file)
    digest = hashlib.sha256(prefix)
    digest.update(raw)
    return Shard(path.name, path, identity, digest.hexdigest(), header.data_offset, header.metadata), header


def _read_config(path: Place) -> tuple[Mapping[str, Any] | None, str | None]:
    # Read as loaders read it, that is with Python's json: NaN and Infinity occur in honest configurations.
    if not is_named(path):
        return None, None
    raw = read_whole(path, MAX_CONFIG_BYTES)
    try:
        config = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not valid JSON: {error}", file=printable(str(path)), remedy="Repair it or download it again."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError("not a JSON object", file=printable(str(path)), remedy="Repair it or download it again.")
    return config, hashlib.sha256(raw).hexdigest()
