from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.errors import CheckpointError, RecipeError
from paramdelta.insight.score_table import Score, Table, parse_table, read_table

if TYPE_CHECKING:
    from pathlib import Path

HEADER = "benchmark,new_base,merged,reference"


def parsed(text: str) -> Table:
    return parse_table(text.encode(), "s.csv")


def rows(*lines: str, header: str = HEADER) -> tuple[Score, ...]:
    return parsed("\n".join((header, *lines)) + "\n").scores


def test_a_line_is_a_score() -> None:
    assert rows("MMLU,66.7,68.1,69.4") == (Score("MMLU", "", 66.7, 68.1, 69.4),)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("merged,Reference, BENCHMARK ,New base\n3,4,b,2\n", Score("b", "", 2.0, 3.0, 4.0)),
        ("benchmark,new-base,merged,reference\r\n\r\nb,2,3,4\r\n", Score("b", "", 2.0, 3.0, 4.0)),
        ("\ufeffbenchmark;new_base;merged;reference\nb;2,5;3.5;4\n;;;\n", Score("b", "", 2.5, 3.5, 4.0)),
        ("benchmark\tnew_base\tmerged\treference\nb, or c\t2\t3\t4", Score("b, or c", "", 2.0, 3.0, 4.0)),
        ('"benchmark";"new_base";"merged";"reference"\n"b;c";"2";"3";"4"\n', Score("b;c", "", 2.0, 3.0, 4.0)),
        (f"{HEADER}\nb,62.5%,63 %,+.64e2%\n", Score("b", "", 62.5, 63.0, 64.0)),
        (f"{HEADER},\nb,2,3,4,\n", Score("b", "", 2.0, 3.0, 4.0)),
        (f"{HEADER}\nb,2,3,4,,\n", Score("b", "", 2.0, 3.0, 4.0)),
        (f'{HEADER}\n"two\nlines",2,3,4\n', Score("two\nlines", "", 2.0, 3.0, 4.0)),
    ],
)
def test_tables_as_programs_write_them(text: str, score: Score) -> None:
    assert parsed(text).scores == (score,)


def test_seeds_of_one_benchmark_and_group_are_averaged() -> None:
    scores = rows(
        "b,8B,1,10,20,30",
        "b,70B,1,40,50,60",
        "b,8B,2,20,40,60",
        "c,8B,2,0,0,1",
        header="benchmark,group,seed,new_base,merged,reference",
    )
    assert scores == (
        Score("b", "8B", 15.0, 30.0, 45.0, seeds=2),
        Score("b", "70B", 40.0, 50.0, 60.0),
        Score("c", "8B", 0.0, 0.0, 1.0),
    )


def test_columns_that_are_not_known_are_kept_apart() -> None:
    table = parsed("shots,benchmark,new_base,merged,reference,Groups\n5,b,2,3,4,x\n")
    assert table.unused == ("shots", "Groups")
    assert table.scores == (Score("b", "", 2.0, 3.0, 4.0),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("\n , ,\n", "is empty"),
        (f"{HEADER}\n", "has no scores"),
        ("benchmark,new_base,merged\nb,2,3\n", "line 1: lacks the column reference; has 'benchmark', 'new_base', 'me"),
        ("\nbenchmark,base,merged,reference\nb,2,3,4\n", "line 2: lacks the column new_base"),
        ("b,2,3,4\n", "line 1: lacks the columns benchmark, new_base, merged, reference"),
        ("benchmark new_base merged reference\nb 2 3 4\n", "line 1: lacks the columns"),
        (f"{HEADER},Merged\nb,2,3,4,5\n", "line 1: has two columns merged"),
        (f"{HEADER}\nb,2,3\n", "line 2: has 3 cells, the first line 4"),
        (f"{HEADER}\nb,2,3,4\nc,2,5,3,4\n", "line 3: has 5 cells, the first line 4"),
        (f"{HEADER}\n,2,3,4\n", "line 2: benchmark is empty"),
        (f"{HEADER},group\nb,2,3,4,\n", "line 2: group is empty"),
        (f"{HEADER}\n\nb,2,,4\n", "line 3: merged of 'b' is empty"),
        (f"{HEADER}\nb,2,3,-\n", "line 2: reference of 'b' is not a number: '-'"),
        (f"{HEADER}\nb,2,%,4%\n", "line 2: merged of 'b' is not a number: '%'"),
        (f"{HEADER}\nb,1e300,3,4\n", "line 2: new_base of 'b' is more than scores are: '1e300'"),
        (f"{HEADER}\nb,-1e10,3,4\n", "line 2: new_base of 'b' is more than scores are"),
        (f"{HEADER}\nb,0.5,62%,70%\n", "line 2: some scores of 'b' have a percent sign, others none"),
        (f"{HEADER}\nb,2,3,4\nc,1,1,1\nb,2,3,5\n", "line 4: 'b' stands in line 2 already"),
        (f"{HEADER},seed\nb,2,3,4,1\nb,2,3,4,1\n", "line 3: 'b', '1' stands in line 2 already"),
        (f'{HEADER}\nb,2,3,4\n"c"d,2,3,4\n', "line 3: is not CSV"),
        (f'{HEADER}\nb,2,3,4\n"c,2,3,4\n', "line 3: is not CSV"),
        (f"{HEADER}\n{'b' * 200_000},2,3,4\n", "line 2: is not CSV"),
        (f'{HEADER}\n"two\nlines",2,3,4\nc,2,3,x\n', "line 4: reference of 'c' is not a number"),
        (f'{HEADER}\nb,"2,5",3,4\n', "line 2: new_base of 'b' is not a number: '2,5'"),
        ("benchmark;new_base;merged;reference\nb;1.234,5;3;4\n", "line 2: new_base of 'b' is not a number"),
        (f"{HEADER}\nb\x1b[2J,x,3,4\n", "line 2: new_base of 'b\\x1b"),
    ],
)
def test_mistakes_are_errors_with_file_and_line(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    assert str(caught.value).startswith(f"s.csv: {problem}")
    assert caught.value.file == "s.csv"


@pytest.mark.parametrize("cell", ["nan", "NaN", "inf", "-Infinity", "1_000", "٣", "0x10", "1e", "1.2.3", "1e9999"])
def test_what_only_python_takes_for_a_number_is_none(cell: str) -> None:
    with pytest.raises(RecipeError, match=r"line 2: merged of 'b' is not a number"):
        rows(f"b,2,{cell},4")


def test_a_column_called_base_is_asked_about() -> None:
    with pytest.raises(RecipeError) as caught:
        parsed("benchmark,base,merged,reference\nb,2,3,4\n")
    assert "call it new_base" in (caught.value.remedy or "")


def test_other_encodings_are_told(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"{HEADER}\nb,2,3,4\n", encoding="utf-16")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        read_table(tmp_path / "s.csv")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.csv", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(CheckpointError):
            read_table(path)
    (tmp_path / "large.csv").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(CheckpointError, match="more than"):
        read_table(tmp_path / "large.csv")
    with pytest.raises(RecipeError, match="empty"):
        read_table("")


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
NUMBERS = st.integers(0, 10_000).map(lambda hundredths: hundredths / 100)


@given(
    st.dictionaries(NAMES.map(str.strip), st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=8),
    st.sampled_from(",;\t"),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["", "\ufeff"]),
    st.booleans(),
)
def test_what_csv_writes_is_read(
    scores: dict[str, tuple[float, float, float]], separator: str, quoting: int, mark: str, comma: bool
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(HEADER.split(","))
    for name, numbers in scores.items():
        cells = [str(number).replace(".", ",") if comma and separator != "," else str(number) for number in numbers]
        writer.writerow([name, *cells])
    table = parse_table((mark + text.getvalue()).encode(), "s.csv")
    assert table.scores == tuple(Score(name, "", *numbers) for name, numbers in scores.items())


@given(st.binary(max_size=200) | st.text("benchmark,;\t\n\"'new_base merged reference%0.5-\r\0\x1b").map(str.encode))
def test_nothing_but_typed_errors_comes_of_bytes(data: bytes) -> None:
    for start in (b"", f"{HEADER}\nb,".encode()):
        told = ""
        try:
            assert parse_table(start + data, "s.csv").scores
        except RecipeError as error:
            told = str(error)
        assert "\x1b" not in told
