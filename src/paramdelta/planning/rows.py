"""Tensors with a row for each token of a vocabulary, where the vocabularies differ in size: which rows are made how."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from paramdelta.checkpoint.dtypes import DTYPES
from paramdelta.planning.parts import Operand, Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paramdelta.planning.parts import Source
    from paramdelta.planning.policies import Vocab


def rows_of_output(policy: Vocab, sources: Sequence[Source]) -> int:
    """Return how many rows the output has; ``sources`` are the new base's, then post's and base's of each delta."""
    rows = [source.shape[0] for source in sources]
    new, post = rows[0], rows[1]
    return {"pad": max(new, post), "truncate": min(rows), "new-base": new, "post": post}[policy]


def parts_by_rows(rows: int, sources: Sequence[Source], alphas: Sequence[float]) -> tuple[Part, ...]:
    """Return the parts of an output of so many rows.

    A row that all have is merged. One that post or base of a delta lacks gets none of that delta; one that the new base
    lacks is post's.
    """
    width = math.prod(sources[0].shape[1:])
    edges = sorted({0, rows, *(source.shape[0] for source in sources if source.shape[0] < rows)})
    return tuple(_part(begin, end, width, sources, alphas) for begin, end in pairwise(edges))


def _part(begin: int, end: int, width: int, sources: Sequence[Source], alphas: Sequence[float]) -> Part:
    def operand(number: int) -> Operand:
        source = sources[number]
        return Operand(source.file, source.offset + begin * width * DTYPES[source.dtype].bits // 8, source.dtype)

    def has(number: int) -> bool:
        return sources[number].shape[0] >= end

    elements = (end - begin) * width
    if not has(0):
        post = next(number for number in range(1, len(sources), 2) if has(number))
        return Part(elements, (operand(post),), ())
    deltas = [number for number in range(1, len(sources), 2) if has(number) and has(number + 1)]
    operands = [operand(0), *(operand(place) for number in deltas for place in (number, number + 1))]
    return Part(elements, tuple(operands), tuple(alphas[number // 2] for number in deltas))
