"""The index of a sharded checkpoint: bytes to a validated map from tensor names to shard names. Pure."""

from __future__ import annotations

import sys
import unicodedata

from paramdelta.checkpoint import strict_json
from paramdelta.checkpoint.wording import clipped, quoted
from paramdelta.errors import CheckpointError

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

_REMEDY = "Repair the index or download it again."
_LONGEST_FILE_NAME = 255
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³"}
)
_NOT_ON_WINDOWS = ':*?<>|"'
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def parse_index(raw: bytes, file: str) -> dict[str, str]:
    """Return the ``weight_map`` of the index `raw`: tensor name to shard name, in the index's order.

    Raises CheckpointError, naming `file`, where it is not a JSON object with such a map, names a key twice,
    or names a shard by anything but a plain file name.
    """
    try:
        tree = strict_json.parse(raw)
    except strict_json.InvalidJSONError as error:
        raise CheckpointError(f"invalid index: {error}", file=file, remedy=_REMEDY) from None
    weight_map = tree.get("weight_map") if type(tree) is dict else None
    if type(weight_map) is not dict:
        raise CheckpointError("invalid index: no weight_map", file=file, remedy=_REMEDY)
    if not weight_map:
        raise CheckpointError("invalid index: the weight_map is empty", file=file, remedy=_REMEDY)
    for tensor, shard in weight_map.items():
        if type(shard) is not str:
            raise CheckpointError(
                "invalid index: the shard's name is not a string",
                file=file,
                tensor=clipped(tensor),
                remedy=_REMEDY,
            )
    _check_shard_names(set(weight_map.values()), file)
    return {sys.intern(tensor): sys.intern(shard) for tensor, shard in weight_map.items()}


def _check_shard_names(names: set[str], file: str) -> None:
    folded: dict[str, str] = {}
    for name in sorted(names):
        flaw = name_flaw(name)
        if flaw:
            raise CheckpointError(
                f"invalid index: shard name {quoted(name)} {flaw}",
                file=file,
                remedy="Shards are plain file names ending in .safetensors, in the index's own directory.",
            )
        twin = folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            raise CheckpointError(
                f"invalid index: shard names {quoted(twin)} and {quoted(name)} differ in case only,"
                " or in how accents are encoded",
                file=file,
                remedy="Some filesystems hold them to be one file: rename one.",
            )


def name_flaw(name: str) -> str | None:
    """Return what keeps `name` from being a plain, portable file name of a shard, or None."""
    if "/" in name or "\\" in name:
        return "contains a path separator"
    if set(name) & set(_NOT_ON_WINDOWS):
        return f"contains one of {_NOT_ON_WINDOWS}"
    if any(unicodedata.category(character) in _INVISIBLE for character in name):
        return "contains invisible characters"
    if not name.endswith(WEIGHTS_SUFFIX):
        return f"does not end in {WEIGHTS_SUFFIX}"
    if name.split(".")[0].rstrip(" ").casefold() in _WINDOWS_DEVICES:
        return "is the name of a device on Windows"
    if len(name.encode(errors="surrogatepass")) > _LONGEST_FILE_NAME:
        return "is longer than file names can be"
    return None
