"""What verification finds wrong, and how that is told."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint.wording import clipped, listed, printable, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paramdelta.errors import ParamDeltaError

_MOST_LINES: Final = 20


class Failure(NamedTuple):
    """Something that is not as it should be: in which file, and where that is known.

    Attributes:
        file: its name in the output, or the path of one that lies elsewhere.
        tensors: names of those of which a part lies there.
        offset: byte of the file at which it begins, and ``size`` bytes within which it lies.
    """

    file: str
    message: str
    tensors: tuple[str, ...] = ()
    offset: int | None = None
    size: int | None = None

    @classmethod
    def of(cls, error: ParamDeltaError, output: Path, introduction: str = "") -> Failure:
        """Return an error that came up with an output as a failure of it."""
        directory, name = os.path.split(error.file or str(output))
        file = name if directory == str(output) else error.file or str(output)
        tensors = () if error.tensor is None else (error.tensor,)
        return cls(file, f"{introduction}{error.message}", tensors)

    def __str__(self) -> str:
        where = "" if self.offset is None else f", byte {self.offset:,}"
        where += "" if self.offset is None or self.size in {None, 1} else f" to {self.offset + (self.size or 0) - 1:,}"
        which = f" ({listed([quoted(name) for name in self.tensors])})" if self.tensors else ""
        message = printable(" ".join(self.message.split()))
        return f"{printable(clipped(self.file))}{where}{which}: {message}"


def summed_up(failures: Sequence[Failure]) -> str:
    """Return the first failures, a line each, and how many more there are."""
    lines = [f"  {failure}" for failure in failures[:_MOST_LINES]]
    more = len(failures) - _MOST_LINES
    return "\n".join([*lines, *([f"  and {more:,} more"] if more > 0 else [])])
