from __future__ import annotations

import importlib.util
import re
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

import paramdelta
from paramdelta.errors import OutputError, RecipeError
from paramdelta.insight.score_plot import checked_plot, drawn, write_plot
from paramdelta.insight.score_table import Score, Table
from paramdelta.insight.scores import TransferReport, transfer_report

if TYPE_CHECKING:
    from pathlib import Path

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")


def report_of(*scores: Score) -> TransferReport:
    return transfer_report(Table("s.csv", scores))


REPORT = report_of(*(Score(f"bench {n}", "8B" if n % 2 else "_70B", 20.0 + n, 50.0 + n, 60.0 + n) for n in range(9)))


def texts(svg: bytes) -> set[str]:
    return {
        "".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")
    }


@needs_matplotlib
@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_same_scores_are_drawn_in_the_same_bytes(kind: str, start: bytes) -> None:
    chart = drawn(REPORT, kind)
    assert chart.startswith(start)
    assert drawn(REPORT, kind) == chart


@needs_matplotlib
def test_a_chart_names_benchmarks_groups_and_numbers() -> None:
    shown = texts(drawn(REPORT, "svg"))
    assert {f"bench {n}" for n in range(9)} <= shown
    for group in ("8B", "_70B"):
        assert any(re.match(rf"{group}: slope 0\.8\d\d, R² -?\d.*, recovered 0\.75", text) for text in shown)


@needs_matplotlib
def test_names_are_drawn_as_they_are_written() -> None:
    names = ("$x^2$", "a < b & c", "\u6570\u5b66", "e\x1b[2J", "$", "l" * 100)
    shown = texts(drawn(report_of(*(Score(name, name, 1.0, 2.0, 3.0) for name in names)), "svg"))
    assert {"$x^2$", "a < b & c", "\u6570\u5b66", "'e\\x1b[2J'", "$"} <= shown
    assert not any("\x1b" in text or "l" * 50 in text for text in shown)


@needs_matplotlib
@pytest.mark.parametrize(
    "scores",
    [
        [Score("b", "", 0.0, 0.0, 0.0)],
        [Score("b", "", 5.0, 5.0, 5.0)],
        [Score("b", "", -3.0, -2.0, -1.0)],
        [Score("b", "", 1.0, 2.0, 3.0), Score("b", "8B", 1.0, 2.0, 3.0)],
        [Score(f"b{n}", f"g{n}", 1.0, n / 1.0, 3.0) for n in range(100)],
    ],
    ids=["zero", "one point", "negative", "some in a group", "many"],
)
def test_whatever_can_be_told_can_be_drawn(scores: list[Score]) -> None:
    assert drawn(report_of(*scores), "svg")


@needs_matplotlib
def test_a_chart_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "c.SVG").write_text("old")
    path = checked_plot(tmp_path / "c.SVG")
    write_plot(REPORT, path)
    assert path.read_bytes() == drawn(REPORT, "svg")
    assert list(tmp_path.iterdir()) == [path]


@needs_matplotlib
def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "dir.svg").mkdir()
    for path in (tmp_path / "nowhere/c.svg", tmp_path / "dir.svg", tmp_path / "a\0.svg"):
        with pytest.raises(OutputError):
            write_plot(REPORT, checked_plot(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["dir.svg"]


@pytest.mark.parametrize("name", ["chart", "chart.jpg", "svg", ".svg", "chart.csv", ""])
def test_a_chart_says_its_format_by_its_ending(name: str) -> None:
    with pytest.raises(RecipeError, match="plot"):
        checked_plot(name)


def test_without_matplotlib_there_is_a_remedy_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match="matplotlib") as caught:
        paramdelta.score("nowhere.csv", plot="c.svg")
    assert "pip install 'paramdelta[plots]'" in (caught.value.remedy or "")
