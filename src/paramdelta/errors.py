"""Every error that paramdelta raises on purpose, and the exit code that each one stands for.

ParamDeltaError                      exit code
├── RecipeError                      2   the request does not parse
├── CheckpointError                  3   an input is missing, damaged, hostile or not supported
│   ├── FetchError                       a remote file cannot be fetched
│   ├── HeaderError                      a safetensors header breaks the format
│   └── UnsupportedCheckpointError       a form of weights that cannot be merged (GGUF, LoRA, packed integers, …)
├── MismatchError                    4   the checkpoints do not fit each other, or the recipe does not fit them
├── OutputError                      5   the output cannot be written
├── InputChangedError                6   an input changed while it was read
├── VerificationError                7   a finished output is not what it claims to be
├── NonFiniteError                   8   the result holds new infinities or NaNs
├── BudgetError                      9   the memory budget is too small
└── CancelledError                   130 stopped on request
"""

from __future__ import annotations

from typing import Any


def escaped(text: str) -> str:
    """Return text, of one or several lines, with escapes for what could disturb a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def _one_line(path: str) -> str:
    return path.replace("\n", "\\n")


class ParamDeltaError(Exception):
    """Base of all deliberate errors: a message that names the cause and, where known, file, tensor and remedy."""

    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.tensor = tensor
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{_one_line(self.file)}: " if self.file and not self.message.startswith(self.file) else ""
        named = self.tensor is None or repr(self.tensor) in self.message or "\n" in self.message
        which = "" if named else f" (tensor {self.tensor!r})"
        advice = f"\n{self.remedy}" if self.remedy else ""
        return escaped(f"{where}{self.message}{which}{advice}")

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints for this failure."""
        return {
            "error": {
                "code": self.exit_code,
                "type": type(self).__name__,
                "message": str(self),
                "file": self.file,
                "tensor": self.tensor,
            }
        }


class RecipeError(ParamDeltaError):
    """The request itself does not parse."""

    exit_code = 2


class CheckpointError(ParamDeltaError):
    """An input is missing, damaged, hostile, or not a checkpoint."""

    exit_code = 3


class FetchError(CheckpointError):
    """A remote file cannot be fetched; the HTTP status is named where there is one."""


class HeaderError(CheckpointError):
    """A safetensors header breaks the format's rules."""


class UnsupportedCheckpointError(CheckpointError):
    """The input holds weights in a form that cannot be merged."""


class MismatchError(ParamDeltaError):
    """The checkpoints do not fit each other, or the recipe does not fit them."""

    exit_code = 4


class OutputError(ParamDeltaError):
    """The output cannot be written."""

    exit_code = 5


class InputChangedError(ParamDeltaError):
    """An input changed while the run read it."""

    exit_code = 6


class VerificationError(ParamDeltaError):
    """A finished output is not what it claims to be."""

    exit_code = 7


class NonFiniteError(ParamDeltaError):
    """The result holds infinities or NaNs that no input had."""

    exit_code = 8


class BudgetError(ParamDeltaError):
    """The memory budget is below what works."""

    exit_code = 9


class CancelledError(ParamDeltaError):
    """The run was stopped on request."""

    exit_code = 130
