"""A plan whose vocabulary tensors fall into blocks of rows, so that each block is counted by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.checkpoint.embeddings import EMBEDDINGS, HEADS
from paramdelta.planning.layout import Layout, OutputShard
from paramdelta.planning.parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paramdelta.planning.parts import Operation
    from paramdelta.planning.plan import Plan

LEAST_ROWS: Final = 256
MOST_BLOCKS: Final = 1024


class Block(NamedTuple):
    """Rows of a tensor: its place in the plan that was dissected, and which rows; all of a tensor that was not cut."""

    operation: int
    rows: range


class Dissection(NamedTuple):
    """A plan to count by, and what each of its operations is a block of, by name.

    The plan's shards have no headers: nothing that it makes is meant to be kept.
    """

    plan: Plan
    blocks: dict[str, Block]


def dissect(plan: Plan) -> Dissection:
    """Return a plan that does the same arithmetic, with embeddings and heads in blocks of rows.

    Blocks have 256 rows, or more where there would be more than 1,024 of them. Tensors with scales stay whole.
    """
    names = {operation.name for operation in plan.operations}
    operations: list[Operation] = []
    blocks: dict[str, Block] = {}
    shards = []
    for shard in plan.shards:
        first, begins, filled = len(operations), list[int](), 0
        for place in shard.operations:
            for block, operation in _pieces(place, plan.operations[place], names):
                blocks[operation.name] = block
                operations.append(operation)
                begins.append(filled)
                filled += operation.nbytes
        shards.append(OutputShard(shard.name, b"", first, tuple(begins), filled))
    made = replace(plan, operations=tuple(operations), layout=Layout(tuple(shards), None))
    return Dissection(made, blocks)


def _pieces(place: int, operation: Operation, names: set[str]) -> Iterator[tuple[Block, Operation]]:
    rows = operation.shape[0] if operation.shape else 1
    step = max(LEAST_ROWS, -(-rows // MOST_BLOCKS))
    cuts = [range(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    named = [f"{operation.name}[{cut.start}:{cut.stop}]" for cut in cuts]
    if len(cuts) < 2 or not _has_tokens_as_rows(operation) or names & set(named):
        yield Block(place, range(rows)), operation
        return
    width = math.prod(operation.shape[1:])
    for cut, name in zip(cuts, named, strict=True):
        parts = _cut_parts(operation.parts, cut.start * width, cut.stop * width)
        yield Block(place, cut), operation._replace(name=name, shape=(len(cut), *operation.shape[1:]), parts=parts)


def _has_tokens_as_rows(operation: Operation) -> bool:
    is_named_so = operation.name.endswith((*EMBEDDINGS, *HEADS))
    return is_named_so and len(operation.shape) == 2 and not operation.is_scaled


def _cut_parts(parts: Sequence[Part], begin: int, end: int) -> tuple[Part, ...]:
    """Return what parts have of the elements ``begin`` to ``end``."""
    found = []
    first = 0
    for part in parts:
        low, high = max(begin, first), min(end, first + part.elements)
        if low < high:
            operands = tuple(
                operand._replace(offset=operand.offset + (low - first) * DTYPES[operand.dtype].bits // 8)
                for operand in part.operands
            )
            found.append(Part(high - low, operands, part.alphas))
        first += part.elements
    return tuple(found)
