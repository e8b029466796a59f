"""Every tensor name across the checkpoints, each with the one operation that makes its output; nothing left over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES, INTEGERS, WHOLE_FLOATS
from paramdelta.planning.differences import Difference, refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paramdelta.checkpoint.checkpoint import Checkpoint, TensorRef


class Operand(NamedTuple):
    """Where one source tensor's bytes lie: an input file (its place in the plan), a byte offset, and a dtype."""

    file: int
    offset: int
    dtype: str


class Operation(NamedTuple):
    """How one output tensor is made.

    Attributes:
        op: ``delta`` (new base + Σ alphaᵢ · (postᵢ - baseᵢ)) or ``copy`` (the new base's bytes).
        dtype: safetensors dtype of the output.
        operands: for ``delta`` the new base's tensor, then post and base of each delta; for ``copy`` one tensor.
        alphas: one coefficient per delta.
    """

    name: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    operands: tuple[Operand, ...]
    alphas: tuple[float, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one output element, which no window may cut: the operation's grain."""
        return DTYPES[self.dtype].bits // 8

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.elements * self.itemsize

    @property
    def bytes_read(self) -> int:
        """Bytes of all operands together."""
        return self.elements * sum(DTYPES[operand.dtype].bits for operand in self.operands) // 8


class Member(NamedTuple):
    """One checkpoint in its role: ``post``, ``base`` or ``new base`` (numbered where there are several deltas)."""

    role: str
    checkpoint: Checkpoint
    first_file: int  # place of its first shard among the plan's input files


def build_manifest(
    members: Sequence[Member], alphas: Sequence[float], dtype: str | None = None
) -> tuple[Operation, ...]:
    """Return one operation for every tensor, in the new base's order.

    Args:
        members: the new base, then post and base of each delta.
        alphas: one coefficient per delta.
        dtype: safetensors dtype of float outputs, or None for the new base's own.

    Raises:
        MismatchError: the checkpoints differ in names, shapes or kinds of dtype; lists all differences at once.
    """
    differences = list(_missing(members))
    coefficients = tuple(alphas)
    operations = []
    for name in members[0].checkpoint.tensors:
        refs = [member.checkpoint.tensors.get(name) for member in members]
        present = [ref for ref in refs if ref is not None]
        if len(present) < len(refs):
            continue
        difference = _difference(name, members, present)
        if difference is not None:
            differences.append(difference)
        else:
            operations.append(_operation(name, members, present, coefficients, dtype))
    if differences:
        raise refuse(differences)
    return tuple(operations)


def _missing(members: Sequence[Member]) -> list[Difference]:
    tables = {member.role: member.checkpoint.tensors for member in members}
    if len({frozenset(table) for table in tables.values()}) == 1:
        return []
    everything = dict.fromkeys(name for table in tables.values() for name in table)
    return [
        Difference("missing from " + ", ".join(absent), name, "")
        for name in everything
        if (absent := [role for role, table in tables.items() if name not in table])
    ]


def _difference(name: str, members: Sequence[Member], refs: Sequence[TensorRef]) -> Difference | None:
    if any(ref.shape != refs[0].shape for ref in refs):
        return Difference("shapes differ", name, _by_role(members, [list(ref.shape) for ref in refs]))
    if all(ref.dtype in WHOLE_FLOATS for ref in refs):
        return None
    if any(ref.dtype != refs[0].dtype for ref in refs):
        return Difference("dtypes that cannot be added", name, _by_role(members, [ref.dtype for ref in refs]))
    if refs[0].dtype not in INTEGERS:
        return Difference("dtypes that cannot be added", name, f"{refs[0].dtype} in all")
    return None


def _by_role(members: Sequence[Member], values: Sequence[object]) -> str:
    return ", ".join(f"{member.role} {value}" for member, value in zip(members, values, strict=True))


def _operation(
    name: str,
    members: Sequence[Member],
    refs: Sequence[TensorRef],
    alphas: tuple[float, ...],
    dtype: str | None,
) -> Operation:
    new = refs[0]
    operands = [
        Operand(member.first_file + ref.shard, ref.offset, ref.dtype) for member, ref in zip(members, refs, strict=True)
    ]
    if new.dtype not in WHOLE_FLOATS:  # integers and bools are never added
        return Operation(name, "copy", new.dtype, new.shape, (operands[0],), ())
    return Operation(name, "delta", dtype or new.dtype, new.shape, tuple(operands), alphas)
