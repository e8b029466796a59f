"""Which checkpoint donates which sidecar: the files beside the weights that make an output load as a model.

The new base gives the architecture (config.json); post gives what post-training brought (tokenizer, chat template,
special tokens, generation settings).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paramdelta.checkpoint.files import identity_of, is_there, names_in
from paramdelta.checkpoint.sidecar_names import CHAT_TEMPLATE, FROM_NEW_BASE, GENERATION, PROCESSOR, TOKENIZER
from paramdelta.checkpoint.tokens import kinds_of

if TYPE_CHECKING:
    from paramdelta.checkpoint.checkpoint import Checkpoint
    from paramdelta.storage.identity import FileIdentity
    from paramdelta.storage.remote.place import Place


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file of the output beside the weights.

    Attributes:
        name: in the output.
        source: the file that it comes from.
        donor: role of the checkpoint that gives it.
        text: what is written instead of the source's own bytes, where the output needs a correction.
    """

    name: str
    source: Place
    donor: str
    identity: FileIdentity
    text: str | None = None

    @property
    def size(self) -> int:
        """Bytes in the output."""
        return self.identity.size if self.text is None else len(self.text.encode())


def choose_sidecars(
    post: Checkpoint, new_base: Checkpoint, *, posts_tokens: bool = True, code: bool = False
) -> tuple[Sidecar, ...]:
    """Return the sidecars of a merge of ``post`` onto ``new_base``.

    Tokenizer files come all from one checkpoint, since they make sense only together: post, or the new base where
    post has none. Chat template and generation settings come from the tokenizer's checkpoint, and post's in any case
    where that has none: the new base's template would displace one that is written inside post's tokenizer_config.json.

    Args:
        posts_tokens: whether the output has a row for each of post's tokens; else the tokenizer is the new base's.
        code: whether the checkpoints' own Python files go along.

    Raises:
        CheckpointError: a file is there and cannot be looked at.
    """
    chosen = _present(new_base, FROM_NEW_BASE, "new base")
    groups = (TOKENIZER, CHAT_TEMPLATE, GENERATION, PROCESSOR)
    ours, theirs = (
        [_present(c, names, role) for names in groups] for c, role in ((post, "post"), (new_base, "new base"))
    )
    if not posts_tokens:
        behaviour = theirs
    elif kinds_of(post):
        behaviour = [*ours[:3], ours[3] or theirs[3]]
    else:  # what else post has of a tokenizer is of no use without its tokens
        behaviour = [theirs[0], *(own or other for own, other in zip(ours[1:], theirs[1:], strict=True))]
    files = list(itertools.chain(chosen, *behaviour))
    if code:
        donors = (new_base, "new base"), (post, "post") if posts_tokens else (new_base, "new base")
        scripts = [car for c, role in donors for car in _present(c, remote_code(c), role)]
        files += {car.name: car for car in reversed(scripts)}.values()  # the new base's where both have one
    return tuple(files)


def remote_code(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the Python files beside the weights, which loaders run if their user trusts them."""
    if not checkpoint.owns_sidecars:
        return ()
    return tuple(name for name in names_in(checkpoint.root, _named_modules(checkpoint)) if name.endswith(".py"))


def _named_modules(checkpoint: Checkpoint) -> list[str]:
    """Return the files of the modules that the config names: where a place cannot be listed, others are not found."""
    named = (checkpoint.config or {}).get("auto_map")
    values = named.values() if isinstance(named, dict) else ()
    classes = [each for value in values for each in (value if isinstance(value, list) else [value])]
    modules = (each.rpartition("--")[2].rpartition(".")[0] for each in classes if isinstance(each, str))
    return sorted({f"{module}.py" for module in modules if module.isidentifier()})


def _present(checkpoint: Checkpoint, names: tuple[str, ...], donor: str) -> list[Sidecar]:
    if not checkpoint.owns_sidecars:
        return []
    return [
        Sidecar(place.name, place, donor, identity_of(place))
        for place in (checkpoint.root / name for name in names)
        if is_there(place)
    ]
