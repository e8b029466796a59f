"""Plans whose vocabulary tensors fall into blocks of rows do the same arithmetic."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.planning.dissection import LEAST_ROWS, MOST_BLOCKS, dissect
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Recipe
from tests.make import sparse_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDINGS = "model.embed_tokens.weight"


def plan_of(tmp_path: Path, rows: tuple[int, int, int], policies: Policies | None = None) -> Plan:
    """Return the plan of a triple whose vocabularies have so many rows: post, base, new base."""
    for role, count in zip(("post", "base", "new_base"), rows, strict=True):
        shapes = {EMBEDDINGS: (count, 8), "model.layers.0.mlp.up_proj.weight": (300, 8), "model.norm.weight": (8,)}
        sparse_checkpoint(tmp_path / role, shapes, 1)
    return make_plan(Recipe.of(tmp_path / "post", tmp_path / "base", tmp_path / "new_base", policies=policies))


def bytes_of(plan: Plan, name: str) -> list[tuple[object, ...]]:
    """Return where every element of a tensor comes from, and with which coefficients."""
    found: list[tuple[object, ...]] = []
    for operation in plan.operations:
        if operation.name == name or operation.name.startswith(f"{name}["):
            for part in operation.parts:
                for element in range(part.elements):
                    places = tuple((o.file, o.offset + element * DTYPES[o.dtype].bits // 8) for o in part.operands)
                    found.append((places, part.alphas))
    return found


@pytest.mark.parametrize("rows", [(700, 700, 700), (700, 650, 600), (513, 700, 600)])
def test_blocks_are_made_of_what_the_whole_is_made_of(tmp_path: Path, rows: tuple[int, int, int]) -> None:
    plan = plan_of(tmp_path, rows, Policies(vocab="pad"))
    dissection = dissect(plan)
    for operation in plan.operations:
        assert bytes_of(dissection.plan, operation.name) == bytes_of(plan, operation.name)
    blocks = [block.rows for block in dissection.blocks.values() if plan.operations[block.operation].name == EMBEDDINGS]
    assert len(blocks) == -(-max(rows[0], rows[2]) // LEAST_ROWS)
    assert all(one.stop == other.start for one, other in pairwise(blocks))
    assert dissection.plan.bytes_read == plan.bytes_read
    assert dissection.plan.bytes_written == plan.bytes_written


def test_only_vocabularies_are_cut(tmp_path: Path) -> None:
    dissection = dissect(plan_of(tmp_path, (256, 256, 256)))
    assert [operation.name for operation in dissection.plan.operations] == [
        EMBEDDINGS,
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ]


def test_large_vocabularies_fall_into_larger_blocks(tmp_path: Path) -> None:
    rows = LEAST_ROWS * MOST_BLOCKS * 2 + 3
    dissection = dissect(plan_of(tmp_path, (rows,) * 3))
    assert len(dissection.blocks) - 2 <= MOST_BLOCKS
    assert sum(len(block.rows) for block in dissection.blocks.values() if block.operation == 0) == rows
