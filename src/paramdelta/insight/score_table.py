"""Tables of benchmark scores: CSV to one row per benchmark, every mistake with its file and line."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from paramdelta.checkpoint.files import read_whole
from paramdelta.checkpoint.wording import clipped, listed, printable, quoted
from paramdelta.errors import CheckpointError, RecipeError
from paramdelta.planning.recipe import checked_path

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

MOST_BYTES: Final = 1 << 20
_MODELS: Final = ("new_base", "merged", "reference")
_NEEDED: Final = ("benchmark", *_MODELS)
_KEYS: Final = ("benchmark", "group", "seed")
_KNOWN: Final = (*_KEYS, *_MODELS)
_SEPARATORS: Final = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
_LARGEST: Final = 1e9
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_GUIDE: Final = f'The first line is {",".join(_NEEDED)}; docs/insight.md, "Score a merge", says more.'


@dataclass(frozen=True, slots=True)
class Score:
    """What three models score on one benchmark, in the benchmark's own unit; means over seeds where there are several.

    Attributes:
        group: what the table says beside the benchmark, like a model size; "" where it has no such column.
        new_base: score of the new base, before anything is added to it.
        merged: score of the merged model.
        reference: score of the new base after post-training of its own.
        seeds: number of lines that were averaged.
    """

    benchmark: str
    group: str
    new_base: float
    merged: float
    reference: float
    seeds: int = 1

    @property
    def gain(self) -> float:
        """What post-training of its own gives the new base; negative where it loses."""
        return self.reference - self.new_base

    @property
    def merged_gain(self) -> float:
        """What the merge gives the new base."""
        return self.merged - self.new_base


@dataclass(frozen=True, slots=True)
class Table:
    """A table of scores: its name as messages show it, its rows, and the columns that are not known."""

    file: str
    scores: tuple[Score, ...]
    unused: tuple[str, ...] = ()


def read_table(file: str | os.PathLike[str]) -> Table:
    """Return the scores in a CSV file.

    Raises:
        CheckpointError: it is missing, no regular file, or cannot be read.
        RecipeError: it does not parse; the message names file and line.
    """
    path = Path(checked_path(file, "scores"))
    try:
        data = read_whole(path, MOST_BYTES)
    except CheckpointError as error:
        raise CheckpointError(error.message, file=error.file, remedy="Name a CSV file, or - to pipe one in.") from error
    return parse_table(data, printable(str(path)))


def parse_table(data: bytes, file: str) -> Table:
    """Return the scores in the bytes of a CSV file.

    UTF-8, with or without a byte order mark; cells separated by commas, semicolons or tabs. Lines of one benchmark and
    group that differ in their seed are averaged.

    Args:
        file: its name, as messages show it.

    Raises:
        RecipeError: it does not parse; the message names file and line.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError("is not UTF-8 text", file=file, remedy="Save it as CSV in UTF-8.") from None
    return _Reader(text, file).table()


class _Reader:
    """Reads one table."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        first = next((line for line in text.splitlines() if line.strip()), "")
        # The separator under which most columns are known: what is inside of cells can look like another one.
        self._separator = max(
            _SEPARATORS, key=lambda mark: len({*map(_name, first.replace('"', "").split(mark))}.intersection(_KNOWN))
        )

    def table(self) -> Table:
        """Return what the table holds."""
        records = self._records()
        line, header = next(records, (0, []))
        if not header:
            raise RecipeError("is empty", file=self._file, remedy=_GUIDE)
        places = self._places(line, header)
        lines: dict[tuple[str, ...], int] = {}
        seeds: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for line, cells in records:
            named = self._named(line, cells, header, places)
            key = tuple(named.get(column, "") for column in _KEYS)
            if key in lines:
                again = ", ".join(map(quoted, filter(None, key)))
                remedy = f"Take one out, or tell them apart in a column {_KEYS[1]} or {_KEYS[2]}."
                self._refuse(line, f"{again} stands in line {lines[key]} already", remedy)
            lines[key] = line
            seeds.setdefault((key[0], key[1]), []).append(self._scores(line, named))
        if not seeds:
            raise RecipeError("has no scores", file=self._file, remedy=_GUIDE)
        unused = tuple(cell.strip() for cell in header if cell.strip() and _name(cell) not in _KNOWN)
        return Table(self._file, tuple(_averaged(*key, scores) for key, scores in seeds.items()), unused)

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the records that are not empty, each with the number of the line in which it begins."""
        reader = csv.reader(io.StringIO(self._text, newline=""), delimiter=self._separator, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._refuse(line, f"is not CSV: {error}", "Is a quotation mark missing?")
            if any(cell.strip() for cell in cells):
                yield line, cells

    def _places(self, line: int, header: Sequence[str]) -> dict[str, int]:
        """Return which cell of a line belongs to which column."""
        names = [_name(cell) for cell in header]
        for name in _KNOWN:
            if names.count(name) > 1:
                self._refuse(line, f"has two columns {name}")
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            found = listed([quoted(cell.strip()) for cell in header])
            # base means another checkpoint everywhere else
            which = " If base is the new base's score, call it new_base." if "base" in names else ""
            self._refuse(line, f"lacks the column{plural} {', '.join(missing)}; has {found}", f"{_GUIDE}{which}")
        return {name: names.index(name) for name in _KNOWN if name in names}

    def _named(self, line: int, cells: Sequence[str], header: Sequence[str], places: dict[str, int]) -> dict[str, str]:
        """Return the cells of a line by column."""
        if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
            remedy = f"A cell that holds {_SEPARATORS[self._separator]} stands in quotation marks."
            self._refuse(line, f"has {len(cells)} cells, the first line {len(header)}", remedy)
        named = {name: cells[place].strip() for name, place in places.items()}
        for column in ("benchmark", "group"):
            if not named.get(column, "absent"):
                self._refuse(line, f"{column} is empty")
        return named

    def _scores(self, line: int, named: dict[str, str]) -> tuple[float, float, float]:
        """Return what a line says of new base, merged and reference."""
        new_base, merged, reference = (self._number(line, column, named) for column in _MODELS)
        if len({named[column].endswith("%") for column in _MODELS}) > 1:
            self._refuse(
                line,
                f"some scores of {quoted(named['benchmark'])} have a percent sign, others none",
                "62.5% is read as 62.5: write all scores of a benchmark with it, or none.",
            )
        return new_base, merged, reference

    def _number(self, line: int, column: str, named: dict[str, str]) -> float:
        cell = named[column]
        text = cell.removesuffix("%").rstrip()
        if self._separator != ",":
            text = text.replace(",", ".")
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not abs(number) <= _LARGEST:
            what = "not a number" if math.isnan(number) else "more than scores are"
            problem = f"is {what}: {quoted(cell)}" if cell else "is empty"
            remedy = "Scores are numbers like 62.5 or 62.5%. Take out benchmarks that lack one."
            self._refuse(line, f"{column} of {quoted(named['benchmark'])} {problem}", remedy)
        return number

    def _refuse(self, line: int, problem: str, remedy: str | None = None) -> NoReturn:
        raise RecipeError(f"line {line}: {problem}", file=self._file, remedy=remedy) from None


def _name(cell: str) -> str:
    """Return a column's name: New base is new_base."""
    return re.sub(r"[\s_-]+", "_", cell.strip().casefold())


def _averaged(benchmark: str, group: str, scores: Sequence[tuple[float, float, float]]) -> Score:
    """Return the means of what several lines say of new base, merged and reference."""
    new_base, merged, reference = (math.fsum(each) / len(scores) for each in zip(*scores, strict=True))
    return Score(benchmark, group, new_base, merged, reference, len(scores))


def title(score: Score) -> str:
    """Return what a score is called in messages: by its benchmark, and its group where it has one."""
    return quoted(score.benchmark) + (f" ({printable(clipped(score.group))})" if score.group else "")
