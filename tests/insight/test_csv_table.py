from __future__ import annotations

import csv
import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from paramdelta.insight.csv_table import COLUMNS, csv_rows, write_csv
from tests.insight.analyses import analysis, still_analysis


def written(made: dict[str, Any]) -> str:
    file = io.StringIO(newline="")
    write_csv(made, file)
    return file.getvalue()


def test_there_is_a_row_for_each_tensor_of_each_delta_and_a_number_is_what_it_was() -> None:
    made = analysis(3, deltas=2)
    rows = list(csv.DictReader(io.StringIO(written(made), newline="")))
    given_rows = [(place, row) for place, delta in enumerate(made["deltas"], 1) for row in delta["tensors"]]
    assert len(rows) == len(given_rows)
    for found, (place, row) in zip(rows, given_rows, strict=True):
        assert found["delta"] == str(place)
        assert found["shape"] == "x".join(map(str, row["shape"]))
        for key in set(COLUMNS) - {"delta", "shape", "name", "module", "dtype", "layer"}:
            assert float(found[key]) == row[key]


def test_every_field_of_a_tensor_is_a_column() -> None:
    assert set(analysis(1)["deltas"][0]["tensors"][0]) == set(COLUMNS) - {"delta"}


def test_lines_end_as_rfc_4180_says_and_nothing_is_nothing() -> None:
    text = written(still_analysis())
    assert text.count("\r\n") == text.count("\n") == 3
    assert "None" not in text
    assert text.splitlines()[1].startswith("1,w,,other,BF16,2x2,4,,,,,")


@given(st.text())
def test_any_name_is_read_as_it_was(name: str) -> None:
    made = analysis(1, deltas=1)
    made["deltas"][0]["tensors"][0]["name"] = name
    rows = list(csv.reader(io.StringIO(written(made), newline="")))
    assert rows[1][1] == name
    assert len(rows) == len(list(csv_rows(made)))
