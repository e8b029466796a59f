"""Which files make a checkpoint: the rules by which a path that the user names leads to weights.

A directory is looked at on its top level only: ``original/`` and other folders never count.

1. An index (``*.safetensors.index.json``) decides. Of several, ``model.safetensors.index.json`` does. A
   ``model.safetensors`` that the index does not name makes the directory ambiguous.
2. Without an index: ``model.safetensors``, or the one ``*.safetensors`` file there is.
3. ``consolidated*`` files are another copy of the same weights: they count where there is nothing else.
   ``adapter_model*`` files are not weights of a model.

A path may also name an index, or one ``.safetensors`` file, itself. Such a file owns the ``config.json``
beside it if opening the directory would have chosen that very file.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paramdelta.checkpoint import unsupported
from paramdelta.checkpoint.files import has_directory, names_in, unreadable
from paramdelta.checkpoint.index import INDEX_SUFFIX, WEIGHTS_SUFFIX
from paramdelta.checkpoint.sidecar_names import SIDECARS
from paramdelta.checkpoint.wording import listed, printable, quoted
from paramdelta.errors import CheckpointError, FetchError
from paramdelta.storage.remote.place import RemotePath

if TYPE_CHECKING:
    from paramdelta.storage.remote.place import Place

MODEL_FILE = "model" + WEIGHTS_SUFFIX
MODEL_INDEX = "model" + INDEX_SUFFIX
MARKS = ("consolidated.safetensors", "adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that tell what a directory is where it has no model in safetensors under the usual names."""

STAGING = ".paramdelta"
"""What a merge keeps in its output until that is published."""

_NUMBERED = re.compile(r"-\d+-of-\d+\.safetensors\Z")


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a checkpoint's weights are: in the shards that an index names, or in one file.

    `entry` is that index (`is_index`) or that file, by its name in the directory `root`. `rival` is a file
    beside an index that the index must name, because loaders disagree about which of the two to read.
    `owns_sidecars` says whether config.json and other files in that directory belong to the weights.
    """

    root: Place
    entry: str
    is_index: bool
    rival: str | None = None
    owns_sidecars: bool = True


def find_weights(path: Place) -> Weights:
    """Return the weights that `path` (a directory, an index or a ``.safetensors`` file) leads to.

    Raises CheckpointError where there are none or it is not clear which, UnsupportedCheckpointError where
    there are weights of a kind that cannot be merged.
    """
    if _is_directory(path):
        return _in_directory(path)
    if path.name.endswith(INDEX_SUFFIX):
        return Weights(path.parent, path.name, is_index=True)
    unsupported.refuse_by_name(path)
    return Weights(path.parent, path.name, is_index=False, owns_sidecars=_is_the_model(path))


def _is_directory(path: Place) -> bool:
    if isinstance(path, RemotePath):
        return not path.name
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise unsupported.missing_path(path) from None
        raise unreadable(printable(str(path)), error) from error


def _in_directory(root: Place) -> Weights:
    names = names_in(root, (MODEL_INDEX, MODEL_FILE, *MARKS, *SIDECARS))
    indexes = _preferred([name for name in names if name.endswith(INDEX_SUFFIX)])
    weights = _preferred([name for name in names if name.endswith(WEIGHTS_SUFFIX)])
    if not indexes and MODEL_FILE not in weights and has_directory(root, STAGING):
        raise unsupported.unfinished(root)
    if not weights and not indexes:
        raise unsupported.no_weights(root, names)
    index = _choose_index(root, indexes, weights)
    if index is not None:
        rival = MODEL_FILE if MODEL_FILE in weights else None
        return Weights(root, index, is_index=True, rival=rival)
    return Weights(root, _choose_single(root, weights), is_index=False)


def _preferred(names: list[str]) -> list[str]:
    names = [name for name in names if not name.startswith("adapter_model")]
    return [name for name in names if not name.startswith("consolidated")] or names


def _choose_index(root: Place, indexes: list[str], weights: list[str]) -> str | None:
    if all(name.startswith("consolidated") for name in indexes) and not all(
        name.startswith("consolidated") for name in weights
    ):
        return None
    if len(indexes) <= 1:
        return indexes[0] if indexes else None
    if MODEL_INDEX in indexes:
        return MODEL_INDEX
    raise CheckpointError(
        f"several indexes: {listed([quoted(name) for name in indexes])}",
        file=printable(str(root)),
        remedy="Pass the path of the index that you mean.",
    )


def _choose_single(root: Place, weights: list[str]) -> str:
    if len(weights) == 1:
        return weights[0]
    if MODEL_FILE in weights and not any(_NUMBERED.search(name) for name in weights):
        return MODEL_FILE
    raise CheckpointError(
        f"{len(weights)} .safetensors files and no index: {listed([quoted(name) for name in weights])}",
        file=printable(str(root)),
        remedy=(
            f"If they are the shards of one model, restore its {MODEL_INDEX} (download it again, or load "
            "the model and save it with save_pretrained); if one of them is the model, pass that file."
        ),
    )


def _is_the_model(path: Place) -> bool:
    try:
        return _in_directory(path.parent).entry == path.name
    except FetchError:  # nobody can tell
        raise
    except CheckpointError:
        return False
