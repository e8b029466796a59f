"""What an output tensor is made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import DTYPES

if TYPE_CHECKING:
    from typing import Self

    from paramdelta.checkpoint.scaling import Blocks


class Scale(NamedTuple):
    """The scales of a block-scaled matrix: where they begin, their dtype, and the form of both.

    Attributes:
        rows: of the scale matrix, and its ``columns``.
        block_rows: rows of the weight that share a scale, and ``block_columns`` likewise.
    """

    file: int
    offset: int
    dtype: str
    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of scales."""
        return self.columns * DTYPES[self.dtype].bits // 8


class Source(NamedTuple):
    """A tensor of an input: a file (its place in the plan), the byte of it at which the tensor begins, and its form."""

    file: int
    offset: int
    dtype: str
    shape: tuple[int, ...]
    scale: Scale | None = None


class Operand(NamedTuple):
    """Where one source's bytes begin: an input file (its place in the plan), a byte offset, a dtype, and its scales.

    An operand with scales is a whole matrix: no part of one begins in its middle.
    """

    file: int
    offset: int
    dtype: str
    scale: Scale | None = None

    @classmethod
    def of(cls, source: Source) -> Self:
        """Return the operand that is all of a source."""
        return cls(source.file, source.offset, source.dtype, source.scale)

    @property
    def files(self) -> tuple[int, ...]:
        """The input files that it is read from."""
        return (self.file,) if self.scale is None else (self.file, self.scale.file)

    def nbytes(self, elements: int) -> int:
        """Return the bytes of so many elements, and of all its scales."""
        scales = 0 if self.scale is None else self.scale.rows * self.scale.row_bytes
        return elements * DTYPES[self.dtype].bits // 8 + scales


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
            ``pad`` and ``truncate`` (a ``delta`` with more, or fewer, rows than the new base has); ``scales`` (of the
            operation just before it, which finds them; it reads nothing).
        dtype: safetensors dtype of the output.
        parts: in order, all of its elements; mostly one part.
        blocks: the form of block-scaled FP8 that is written; None where the output is of a whole dtype.
    """

    name: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    blocks: Blocks | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one output element."""
        return DTYPES[self.dtype].bits // 8

    @property
    def grain(self) -> int:
        """Elements that are made together, or not at all: one, or all rows of a row of blocks."""
        return 1 if self.blocks is None else self.blocks.rows * self.shape[1]

    @property
    def is_scaled(self) -> bool:
        """Whether scales play a part: of an operand, or of what is written."""
        scaled_operands = any(operand.scale is not None for part in self.parts for operand in part.operands)
        return self.blocks is not None or self.op == "scales" or scaled_operands

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.elements * self.itemsize

    @property
    def bytes_read(self) -> int:
        """Bytes of all operands together."""
        return sum(operand.nbytes(part.elements) for part in self.parts for operand in part.operands)
