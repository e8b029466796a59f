"""What an output tensor is made of."""

from __future__ import annotations

import math
from typing import NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES


class Source(NamedTuple):
    """A tensor of an input: a file (its place in the plan), the byte of it at which the tensor begins, and its form."""

    file: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Operand(NamedTuple):
    """Where one source's bytes begin: an input file (its place in the plan), a byte offset, and a dtype."""

    file: int
    offset: int
    dtype: str


class Part(NamedTuple):
    """Consecutive elements of an output tensor that are made alike.

    Attributes:
        elements: how many.
        operands: what new base, then post and base of each delta, have for the first of them; where there are no
            coefficients the one tensor that they are taken from, converted if need be.
        alphas: one coefficient per delta.
    """

    elements: int
    operands: tuple[Operand, ...]
    alphas: tuple[float, ...]


class Operation(NamedTuple):
    """How one output tensor is made.

    Attributes:
        op: ``delta`` (new base + Σ alphaᵢ · (postᵢ - baseᵢ)); ``copy`` (one checkpoint's own); ``untie`` (a head that
            the new base does not store, since it is tied to its embeddings there, merged from what it stands for);
            ``pad`` and ``truncate`` (a ``delta`` with more, or fewer, rows than the new base has).
        dtype: safetensors dtype of the output.
        parts: in order, all of its elements; mostly one part.
    """

    name: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

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
        return sum(part.elements * DTYPES[o.dtype].bits // 8 for part in self.parts for o in part.operands)
