"""What the user should know of a merge before it begins."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import INTEGERS
from paramdelta.checkpoint.sidecars import remote_code
from paramdelta.checkpoint.wording import listed, quoted
from paramdelta.planning.config import differing_settings
from paramdelta.planning.units import format_size
from paramdelta.planning.vocabulary import summed_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paramdelta.checkpoint.sidecars import Sidecar
    from paramdelta.planning.config import OutputConfig
    from paramdelta.planning.manifest import Manifest, Member


class PlanWarning(NamedTuple):
    """Something that the user should know before the merge: a code for scripts, a message for people."""

    code: str
    message: str


def all_warnings(
    members: Sequence[Member],
    manifest: Manifest,
    config: OutputConfig,
    tokens: Sequence[str],
    sidecars: Sequence[Sidecar],
) -> Iterator[PlanWarning]:
    """Yield the warnings of a plan.

    Args:
        tokens: lines on ids that do not stand for one token in all checkpoints.
    """
    yield from _of_configs(members)
    yield from _of_ties(members, manifest)
    for decision in manifest.decisions:
        yield PlanWarning(decision.policy, f"--{decision.policy} decided: {'; '.join(decision.lines)}")
    if tokens:
        message = f"tokenizers differ where rows are added, in {len(tokens):,} respects (ids and their tokens): "
        yield PlanWarning("tokens-differ", message + summed_up(tokens))
    yield from _of_copies(manifest)
    yield from _of_fp8(manifest)
    if config.corrections:
        yield PlanWarning(
            "config-corrected", f"config.json is the new base's but for {'; '.join(map(str, config.corrections))}"
        )
    yield from _of_code(members, sidecars)


def _of_configs(members: Sequence[Member]) -> Iterator[PlanWarning]:
    for member in members:
        if member.checkpoint.config is None:
            message = f"{member.role} has no config.json beside its weights: {member.checkpoint.path}"
            yield PlanWarning("no-config", message)
    for one, other in itertools.combinations(members, 2):
        if one.first_file == other.first_file and {one.role.split()[0], other.role.split()[0]} != {"base"}:
            yield PlanWarning("same-inputs", f"{one.role} and {other.role} are the same checkpoint: is that meant?")
    for key, values in differing_settings(members):
        yield PlanWarning("config-differs", f"{key} differs, the output has the new base's: {values}")


def _of_ties(members: Sequence[Member], manifest: Manifest) -> Iterator[PlanWarning]:
    for role, found in ((member.role, member.embeddings) for member in members):
        if found.embedding and found.head and found.says_tied and found.explicit:
            message = f"{role} stores {quoted(found.head)} though its config.json ties it to {quoted(found.embedding)}"
            yield PlanWarning("tie-contradiction", f"{message}: taken as weights of its own")
        if found.tied and found.says_tied is False:
            message = f"{role} stores only {quoted(found.stored() or '')}, and its model type does not tie by default"
            yield PlanWarning("tie-contradiction", f"{message}: taken as tied")
    untied = [operation.name for operation in manifest.operations if operation.op == "untie"]
    if untied:
        tied = ", ".join(member.role for member in members if member.embeddings.tied)
        message = f"{quoted(untied[0])} is written: {tied} tie it to the embeddings, the others do not"
        yield PlanWarning("untied", message)


def _of_copies(manifest: Manifest) -> Iterator[PlanWarning]:
    copied = [each for each in manifest.operations if each.op == "copy" and each.dtype in INTEGERS]
    if copied:
        kinds = ", ".join(sorted({operation.dtype for operation in copied}))
        number = f"{len(copied):,} tensors" if len(copied) > 1 else "1 tensor"
        message = f"{number} of {kinds} taken from the new base, not added: "
        yield PlanWarning("integers-copied", message + listed([quoted(operation.name) for operation in copied]))


def _of_fp8(manifest: Manifest) -> Iterator[PlanWarning]:
    """Say what becomes of weights that the new base, or whoever else they are taken from, has in block-scaled FP8."""
    scaled = [each for each in manifest.operations if each.parts[0].operands and each.parts[0].operands[0].scale]
    widened = [operation for operation in scaled if operation.blocks is None]
    if widened:
        old = sum(operand.nbytes(each.elements) for each in widened for operand in each.parts[0].operands[:1])
        new, dtypes = sum(each.nbytes for each in widened), ", ".join(sorted({each.dtype for each in widened}))
        message = f"{len(widened):,} block-scaled FP8 weights of {format_size(old)} are written as {dtypes}: "
        yield PlanWarning("fp8", f"{message}{format_size(new)}; --fp8 requantise keeps the new base's form")
    if len(scaled) > len(widened):
        number = len(scaled) - len(widened)
        yield PlanWarning("fp8", f"{number:,} weights are written in block-scaled FP8: what that loses is reported")


def _of_code(members: Sequence[Member], sidecars: Sequence[Sidecar]) -> Iterator[PlanWarning]:
    copied = [car.name for car in sidecars if car.name.endswith(".py")]
    if copied:
        yield PlanWarning("remote-code", f"Python files go along, which loaders may run: {listed(copied)}")
    config = members[0].checkpoint.config
    if config is not None and "auto_map" in config and not copied:
        left = remote_code(members[0].checkpoint)
        message = "the new base's config.json wants Python code of its own (auto_map), which does not go along"
        yield PlanWarning("remote-code", f"{message}: {listed(left) or 'there is none'}; --trust-remote-code takes it")
