"""What the user should know of a merge before it begins."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import INTEGERS
from paramdelta.checkpoint.sidecar_names import CONFIG_FILE, TOKENIZER
from paramdelta.checkpoint.sidecars import remote_code
from paramdelta.checkpoint.wording import listed, printable, quoted
from paramdelta.planning.config import differing_settings
from paramdelta.planning.units import format_size
from paramdelta.planning.vocabulary import summed_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paramdelta.checkpoint.sidecars import Sidecar
    from paramdelta.planning.config import OutputConfig
    from paramdelta.planning.manifest import Manifest, Member
    from paramdelta.planning.parts import Operation
    from paramdelta.planning.vocabulary import Comparison, Donor


class PlanWarning(NamedTuple):
    """Something that the user should know before the merge: a code for scripts, a message for people."""

    code: str
    message: str


class Tokens(NamedTuple):
    """What tokenizers say: of rows that are added, of post's tokens on the new base's rows, and whose the output has.

    The first is empty where rows are only taken, the second where they are added or the tokenizer is the new base's.
    """

    added: Comparison
    strange: Comparison
    donor: Donor


def all_warnings(
    members: Sequence[Member],
    manifest: Manifest,
    config: OutputConfig,
    tokens: Tokens,
    sidecars: Sequence[Sidecar],
    dtype: str | None,
) -> Iterator[PlanWarning]:
    """Yield the warnings of a plan.

    Args:
        dtype: the float dtype that the user asked for, None for the new base's own.
        tokens: what the tokenizers say.
    """
    yield from _of_configs(members)
    yield from _of_ties(members, manifest)
    for decision in manifest.decisions:
        yield PlanWarning(decision.policy, f"--{decision.policy} decided: {'; '.join(decision.lines)}")
    yield from _of_tokens(tokens, sidecars)
    if dtype is None:
        yield from _of_dtypes(members, manifest)
    yield from _of_copies(manifest)
    yield from _of_fp8(members, manifest)
    if config.corrections:
        yield PlanWarning(
            "config-corrected", f"config.json is the new base's but for {'; '.join(map(str, config.corrections))}"
        )
    yield from _of_code(members, sidecars)


def _of_configs(members: Sequence[Member]) -> Iterator[PlanWarning]:
    for member in members:
        if member.checkpoint.config is None:
            message = f"{member.role} has no config.json beside its weights: {_place(member, None)}"
            yield PlanWarning("no-config", message)
    for one, other in itertools.combinations(members, 2):
        several = len(members) > 3  # task arithmetic adds deltas to the very base that they were trained from
        usual = {frozenset({"base"})} | ({frozenset({"new", "base"})} if several else set())
        roles = frozenset({one.role.split()[0], other.role.split()[0]})
        if one.first_file == other.first_file and roles not in usual:
            yield PlanWarning("same-inputs", f"{one.role} and {other.role} are the same checkpoint: is that meant?")
    for key, values in differing_settings(members):
        yield PlanWarning("config-differs", f"{key} differs in {CONFIG_FILE}, the output has the new base's: {values}")


def _of_ties(members: Sequence[Member], manifest: Manifest) -> Iterator[PlanWarning]:
    for member, found in ((member, member.embeddings) for member in members):
        if found.embedding and found.head and found.says_tied and found.explicit:
            message = f"{member.role} stores {quoted(found.head)} though its config.json ties it to"
            message = f"{message} {quoted(found.embedding)}: taken as weights of its own"
            yield PlanWarning("tie-contradiction", f"{message}; {_remedy_of_ties(member)}")
        if found.tied and found.says_tied is False:
            message = f"{member.role} stores only {quoted(found.stored() or '')}, and its model type does not tie by"
            message = f"{message} default: taken as tied"
            yield PlanWarning("tie-contradiction", f"{message}; {_remedy_of_ties(member)}")
    stored = members[0].embeddings.stored()
    if manifest.untied and stored is not None:
        tied = ", ".join(member.role for member in members if member.embeddings.tied)
        other = " and ".join(quoted(name) for name in manifest.with_rows if name != stored)
        message = f"{other} is written beside {quoted(stored)}: {tied} tie the two, the others do not"
        yield PlanWarning("untied", message)


def _remedy_of_ties(member: Member) -> str:
    return f"if that is wrong, set tie_word_embeddings in {_place(member, CONFIG_FILE)}"


def _place(member: Member, file: str | None) -> str:
    """Return where a checkpoint, or a file of it, lies."""
    return printable(str(member.checkpoint.path if file is None else member.checkpoint.root / file))


def _of_tokens(tokens: Tokens, sidecars: Sequence[Sidecar]) -> Iterator[PlanWarning]:
    added, strange, donor = tokens
    if added.lines:
        message = f"tokenizers differ where rows are added, in {len(added.lines):,} ids (and their tokens): "
        yield PlanWarning("tokens-differ", message + summed_up(added.lines))
    if strange.lines or strange.missing:
        message = "post's tokenizer goes with the new base's rows of embeddings and head: "
        told = (
            [f"{len(strange.lines):,} ids mean other tokens there: {summed_up(strange.lines)}"] if strange.lines else []
        )
        told += [f"{strange.missing:,} of its tokens have no meaning there"] if strange.missing else []
        yield PlanWarning("tokens-differ", message + "; ".join(told))
    for flaw in (*added.flaws, *strange.flaws):
        message = f"{flaw}: whether rows stand for the same tokens was not compared"
        yield PlanWarning("tokens-unknown", message)
    if donor.reason is not None:
        message = (
            "tokenizer, chat template, generation settings and ids of special tokens are the new base's, not post's"
        )
        yield PlanWarning("tokenizer", f"{message}: {donor.reason}")
    elif any(car.name in TOKENIZER and car.donor == "new base" for car in sidecars):
        others = [car.name for car in sidecars if car.donor == "post"]
        message = "post has no tokenizer, the output has the new base's; what else it is told by is post's"
        yield PlanWarning("tokenizer", f"{message} ({listed([*others, 'ids of special tokens'])})")


def _of_dtypes(members: Sequence[Member], manifest: Manifest) -> Iterator[PlanWarning]:
    """Say where operands of a sum have another dtype than its result."""
    kinds: Counter[tuple[tuple[str, ...], str]] = Counter()
    for operation in manifest.operations:
        dtypes = tuple(operand.dtype for operand in operation.parts[0].operands)
        plain = not operation.is_scaled and len(dtypes) == len(members)
        if plain and set(dtypes) != {operation.dtype}:
            kinds[dtypes, operation.dtype] += 1
    for (dtypes, dtype), number in kinds.items():
        told = ", ".join(f"{member.role} {each}" for member, each in zip(members, dtypes, strict=True))
        tensors = f"{number:,} tensors are" if number > 1 else "1 tensor is"
        yield PlanWarning("dtypes-differ", f"{tensors} rounded once to {dtype} ({told}); --dtype chooses another one")


def _of_copies(manifest: Manifest) -> Iterator[PlanWarning]:
    copied = [each for each in manifest.operations if each.op == "copy" and each.dtype in INTEGERS]
    if copied:
        kinds = ", ".join(sorted({operation.dtype for operation in copied}))
        number = f"{len(copied):,} tensors" if len(copied) > 1 else "1 tensor"
        message = f"{number} of {kinds} taken from the new base, not added: "
        yield PlanWarning("integers-copied", message + listed([quoted(operation.name) for operation in copied]))


def _of_fp8(members: Sequence[Member], manifest: Manifest) -> Iterator[PlanWarning]:
    """Say what becomes of weights that the new base, or whoever else they are taken from, has in block-scaled FP8."""
    scaled = [each for each in manifest.operations if each.parts[0].operands and each.parts[0].operands[0].scale]
    widened = [operation for operation in scaled if operation.blocks is None]
    if widened:
        old = sum(operand.nbytes(each.elements) for each in widened for operand in each.parts[0].operands[:1])
        new, dtypes = sum(each.nbytes for each in widened), ", ".join(sorted({each.dtype for each in widened}))
        number = _counted(len(widened), "block-scaled FP8 weight", "block-scaled FP8 weights")
        message = f"{number} will be written as {dtypes}: {format_size(old)} become {format_size(new)}"
        hint = "" if manifest.is_quantised else "; --fp8 requantise keeps the new base's form"
        yield PlanWarning("fp8", message + hint)
    if len(scaled) > len(widened):
        number = _counted(len(scaled) - len(widened), "weight is", "weights are")
        message = f"{number} written in block-scaled FP8: what that loses is told at the end, and in the receipt"
        yield PlanWarning("fp8", message)
    yield from _of_noise(manifest)
    stored = members[0].checkpoint.tensors
    taken = [each.name for each in manifest.operations if each.name not in stored and _is_whole_matrix(each)]
    if manifest.is_quantised and taken:
        message = "not in the new base, and taken from post in a whole dtype, while config.json says FP8"
        yield PlanWarning("fp8", f"{message}: loaders may expect that for {listed(list(map(quoted, taken)))}")


def _is_whole_matrix(operation: Operation) -> bool:
    """Return whether a matrix is taken and not in FP8."""
    return operation.op == "copy" and operation.blocks is None and len(operation.shape) == 2


def _of_noise(manifest: Manifest) -> Iterator[PlanWarning]:
    """Say where a delta holds what FP8 has lost, since only one of post and base is FP8."""
    for number in range(1, max((len(each.parts[0].operands) for each in manifest.operations), default=0), 2):
        mixed = [
            each.name
            for each in manifest.operations
            if len(operands := each.parts[0].operands) > number + 1
            and operands[number].dtype.startswith("F8") != operands[number + 1].dtype.startswith("F8")
        ]
        if mixed:
            of = f" of delta {number // 2 + 1}" if number > 1 else ""
            told = _counted(len(mixed), "weight", "weights")
            message = (
                f"only one of post and base{of} has {told} in FP8, like {quoted(mixed[0])}: the delta holds what FP8"
            )
            yield PlanWarning(
                "fp8-noise", f"{message} has lost, often as much as training changed; use both in one form"
            )


def _counted(number: int, one: str, many: str) -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {many}"


def _of_code(members: Sequence[Member], sidecars: Sequence[Sidecar]) -> Iterator[PlanWarning]:
    copied = [car.name for car in sidecars if car.name.endswith(".py")]
    if copied:
        yield PlanWarning("remote-code", f"Python files go along, which loaders may run: {listed(copied)}")
    config = members[0].checkpoint.config
    if config is not None and "auto_map" in config and not copied:
        left = remote_code(members[0].checkpoint)
        message = "the new base's config.json wants Python code of its own (auto_map), which does not go along"
        yield PlanWarning("remote-code", f"{message}: {listed(left) or 'there is none'}; --trust-remote-code takes it")
