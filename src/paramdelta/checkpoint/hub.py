"""Models of the Hugging Face Hub that are already on this machine: ``org/name`` or ``org/name@revision`` to a snapshot.

The cache is read as its layout is documented: ``models--org--name/refs/<revision>`` holds a commit, whose files are in
``models--org--name/snapshots/<commit>``, most of them links to blobs. Nothing is ever fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from paramdelta.checkpoint.files import is_there, read_whole
from paramdelta.checkpoint.wording import printable, quoted
from paramdelta.errors import CheckpointError

_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_MODEL: Final = re.compile(rf"(?:hf://)?({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_SNAPSHOT: Final = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9A-Za-z]+)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_MOST_REF_BYTES: Final = 4096


class HubModel(NamedTuple):
    """A model of the Hub at one commit."""

    name: str
    commit: str

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"


def locate(path: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint: the path itself if it exists, else the snapshot that it names on the Hub.

    Raises:
        CheckpointError: it names a model of the Hub that is not in the cache, or not at that revision.
    """
    text = os.fspath(path)
    model = _MODEL.fullmatch(text)
    if model is None or (not text.startswith("hf://") and os.path.lexists(text)):
        return Path(text)
    name, revision = model[1], model[2] or "main"
    if ".." in revision.split("/"):
        raise CheckpointError(f"{quoted(revision)} is no revision", file=printable(text))
    folder = cache() / f"models--{name.replace('/', '--')}"
    if not is_there(folder):
        if not text.startswith("hf://") and model[2] is None:
            return Path(text)  # more likely a path that does not exist, which has its own message
        raise _absent(text, name, model[2], f"is not in the cache of the Hugging Face Hub ({cache()})")
    snapshot = folder / "snapshots" / _commit(folder, revision)
    if not is_there(snapshot):
        raise _absent(text, name, model[2], f"is in the cache of the Hub, but not its revision {revision}")
    return snapshot


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


def model_of(path: Path) -> HubModel | None:
    """Return the model and commit that a path shows, where it lies in a snapshot of a cache."""
    found = _SNAPSHOT.search(str(path))
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


def _absent(text: str, name: str, revision: str | None, message: str) -> CheckpointError:
    at = f" --revision {revision}" if revision else ""
    return CheckpointError(message, file=printable(text), remedy=f"Download it first: hf download {name}{at}")
