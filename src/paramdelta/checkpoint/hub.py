"""Where a checkpoint is: a path, a model of the Hugging Face Hub (``org/name@revision``), an address elsewhere.

A model that lies whole in the Hub's cache is taken from there, any other is read where it is. The cache is read as its
layout is documented: ``models--org--name/refs/<revision>`` holds a commit, whose files are in
``models--org--name/snapshots/<commit>``, most of them links to blobs.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint.files import is_there, read_whole
from paramdelta.checkpoint.index import INDEX_SUFFIX, parse_index
from paramdelta.checkpoint.wording import printable, quoted
from paramdelta.errors import CheckpointError
from paramdelta.storage.remote.place import place_of

if TYPE_CHECKING:
    from paramdelta.storage.remote.place import Place

_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_MODEL: Final = re.compile(rf"(?:hf://)?({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_SNAPSHOT: Final = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9A-Za-z]+)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_MOST_REF_BYTES: Final = 4096
_MOST_INDEX_BYTES: Final = 512 << 20
_PINNED: Final = re.compile(rf"hf://({_PART}/{_PART})@([0-9a-f]{{40}})")


class HubModel(NamedTuple):
    """A model of the Hub at one commit."""

    name: str
    commit: str

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"


def locate(path: str | os.PathLike[str]) -> Place:
    """Return where a checkpoint is: the path itself if it exists, else what it names on the Hub or elsewhere.

    Raises:
        CheckpointError: it names a model of the Hub that is neither in the cache nor can be read where it is.
        RecipeError: an address holds what may be a secret.
    """
    text = os.fspath(path)
    model = _MODEL.fullmatch(text)
    if model is None or (not text.startswith("hf://") and os.path.lexists(text)):
        return place_of(text)
    name, revision = model[1], model[2] or "main"
    if ".." in revision.split("/"):
        raise CheckpointError(f"{quoted(revision)} is no revision", file=printable(text))
    folder = cache() / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / _commit(folder, revision) if is_there(folder) else folder
    if snapshot != folder and is_there(snapshot) and (snapshot.is_file() or _is_whole(snapshot)):
        return snapshot
    if not text.startswith("hf://") and model[2] is None and not is_there(folder) and is_there(Path(text).parent):
        return Path(text)  # more likely a path that does not exist, which has its own message
    if not _client_is_installed():
        raise _absent(text, name, model[2])
    return place_of(f"hf://{name}" if model[2] is None else f"hf://{name}@{revision}")


def _client_is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("huggingface_hub", "fsspec", "aiohttp"))


def _is_whole(snapshot: Path) -> bool:
    """Return whether all shards that the index of a snapshot names are there, or anything where it has no index."""
    index = snapshot / f"model{INDEX_SUFFIX}"
    if not is_there(index):
        return any(snapshot.iterdir())
    names = set(parse_index(read_whole(index, _MOST_INDEX_BYTES), printable(str(index))).values())
    return all(is_there(snapshot / name) for name in names)


def is_name(text: str) -> bool:
    """Return whether a text has the form of a model's name."""
    return _MODEL.fullmatch(text) is not None


def cache() -> Path:
    """Return the directory that holds the Hub's cache, as its client looks for it."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(general, "huggingface")  # noqa: PTH118
    return Path(home).expanduser() / "hub"


def model_of(path: Place | str) -> HubModel | None:
    """Return the model and commit that a path shows, where it lies in a snapshot of a cache or on the Hub."""
    found = _PINNED.match(str(path)) or _SNAPSHOT.search(str(path))
    if found is not None and len(found.groups()) == 2:
        return HubModel(found[1], found[2])
    return None if found is None else HubModel(f"{found[1]}/{found[2]}", found[3])


def _commit(folder: Path, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    ref = folder / "refs" / revision
    if not is_there(ref):
        return revision
    commit = read_whole(ref, _MOST_REF_BYTES).decode("ascii", errors="replace").strip()
    if not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"does not hold a commit but {quoted(commit)}", file=printable(str(ref)))
    return commit


def _absent(text: str, name: str, revision: str | None) -> CheckpointError:
    at = f" --revision {revision}" if revision else ""
    return CheckpointError(
        f"is not in the Hub's cache ({cache()}), or not all of it",
        file=printable(text),
        remedy=f"Download it first: hf download {name}{at}; or let it be read where it is:"
        " pip install 'paramdelta[remote]'",
    )
