"""What keeps checkpoints from fitting each other, as one message that stays readable at hundreds of tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

from paramdelta.checkpoint.wording import clipped, printable
from paramdelta.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VOCABULARIES: Final = "vocabularies differ in size"
_MOST_LINES_PER_KIND: Final = 20
_NUMBER: Final = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,17})(?![0-9])")  # not 007, which would be shown as 7


class Difference(NamedTuple):
    """One tensor that does not fit: the kind of difference, the tensor's name, and the values that differ."""

    kind: str
    tensor: str
    values: str


def refuse(differences: Sequence[Difference], places: Sequence[tuple[str, str]]) -> MismatchError:
    """Return the error that lists all differences at once, grouped by kind and by layer.

    Args:
        places: role and path of every checkpoint.
    """
    count = len(differences)
    lines = [f"the checkpoints do not fit each other: {count:,} tensor{'s differ' if count > 1 else ' differs'}"]
    lines += [f"  {role}: {printable(path)}" for role, path in places]
    by_kind: dict[str, list[Difference]] = defaultdict(list)
    for difference in differences:
        by_kind[difference.kind].append(difference)
    for kind, members in by_kind.items():
        lines.append(f"  {kind} ({len(members):,}):")
        shown = summarise(members)
        lines += [f"    {line}" for line in shown[:_MOST_LINES_PER_KIND]]
        if len(shown) > _MOST_LINES_PER_KIND:
            lines.append(f"    and {len(shown) - _MOST_LINES_PER_KIND:,} more lines like these")
    return MismatchError(
        "\n".join(lines),
        tensor=differences[0].tensor,
        remedy="\n".join(dict.fromkeys(_remedy(kind) for kind in by_kind)),
    )


def _remedy(kind: str) -> str:
    if kind == VOCABULARIES:
        return (
            "Which tokens the output has is a choice to make. --vocab pad: the new base's and the (first) post's;"
            " truncate: those that every checkpoint has; new-base or post: those of that one. The tokenizer follows."
        )
    return (
        "Check that post was trained from base, and that new base has the same architecture as both. If it is meant,"
        " --on-missing, --on-mismatch or --exclude say whose tensors are taken."
    )


def summarise(differences: Iterable[Difference]) -> list[str]:
    """Return a line for each set of names that differ in their numbers alone and in the same way."""
    groups: dict[tuple[tuple[str, ...], str], list[list[int]]] = defaultdict(list)
    for difference in differences:
        parts = _NUMBER.split(difference.tensor)
        groups[tuple(parts[::2]), difference.values].append([int(number) for number in parts[1::2]])
    lines = []
    for (pattern, values), numbers in groups.items():
        columns = [_ranges(column) for column in zip(*numbers, strict=True)]
        name = "".join(part for pair in zip(pattern, [*columns, ""], strict=True) for part in pair)
        times = f" ({len(numbers):,} tensors)" if len(numbers) > 1 else ""
        lines.append(f"{printable(clipped(name))}{times}" + (f": {values}" if values else ""))
    return lines


def _ranges(numbers: Iterable[int]) -> str:
    """Return sorted numbers as ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"[{text}]" if len(runs) > 1 or runs[0][0] != runs[0][1] else text
