"""An analysis as a flat table: one row for each tensor of each delta, every number in full."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

COLUMNS: Final = (
    "delta",
    "name",
    "layer",
    "module",
    "dtype",
    "shape",
    "elements",
    "delta_norm",
    "base_shift_norm",
    "base_norm",
    "relative_delta",
    "relative_shift",
    "cosine",
    "base_cosine",
    "max_abs_delta",
    "changed",
    "changed_share",
    "left_out",
    "infinities",
    "nans",
)


def csv_rows(analysis: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """Give the header and then the rows; deltas are counted from 1, shapes are like ``4096x1024``, None is nothing."""
    yield COLUMNS
    for place, delta in enumerate(analysis["deltas"], 1):
        for row in delta["tensors"]:
            yield (place, *(_shape(row[key]) if key == "shape" else row[key] for key in COLUMNS[1:]))


def write_csv(analysis: Mapping[str, Any], file: TextIO) -> None:
    """Write the table as RFC 4180 has it, to a file that is opened with ``newline=""``, in UTF-8."""
    csv.writer(file).writerows(csv_rows(analysis))


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))
