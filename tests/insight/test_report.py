"""The report as text: one file that loads nothing, says everything, and trusts no name."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from paramdelta.checkpoint.wording import printable
from paramdelta.insight.report import MOST_ROWS, html_report
from paramdelta.insight.tensor_table import columns
from tests.insight.analyses import analysis, still_analysis

pytest.importorskip("matplotlib")

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "</script><img src=x onerror=\"document.title = 'owned'\">",
    "\"' onmouseover='document.title=1' x=\"",
    "<!--",
    "]]>&amp;&lt;",
    "层.0.注意力",
    "a\u202eb\x00c\n\u2028d",
    "{{7*7}}${7*7}%s{0}",
)


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and self.rows[-1] and self.tags[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data.removesuffix("\n")

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def hostile(made: dict[str, Any]) -> dict[str, Any]:
    """Put names that nobody wants wherever a text comes from a file or a user."""
    for place, name in enumerate(HOSTILE):
        for delta in made["deltas"]:
            delta["tensors"][place]["name"] = name
        made["warnings"].append({"code": name, "message": name})
    for delta in made["deltas"]:
        delta |= {"post": HOSTILE[1], "base": HOSTILE[0], "new_base": HOSTILE[2]}
        delta["tensors"][0]["dtype"] = HOSTILE[1]
    return made


@pytest.fixture(scope="module")
def text() -> str:
    return html_report(analysis())


def test_it_is_the_same_every_time(text: str) -> None:
    assert html_report(analysis()) == text


def test_it_loads_nothing(text: str) -> None:
    page = Page(text)
    assert set(re.findall(r"\w+://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not any({"src", "srcset", "action", "background", "data"} & attributes.keys() for _, attributes in page.tags)
    assert page.count("link") == page.count("iframe") == page.count("img") == 0
    assert "@import" not in text
    assert "url(#" in text
    assert not re.findall(r"url\((?!#)", text)


def test_its_policy_allows_its_own_style_and_script_and_nothing_else(text: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    for pattern in (r"<style>(.*?)</style>", r"<script>(.*?)</script>"):
        (source,) = re.findall(pattern, text, re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in policy[1]
    for tag, attributes in Page(text).tags:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")]


def test_names_from_files_are_text_and_nothing_else() -> None:
    made = hostile(analysis(4))
    text = html_report(made)
    page, before = Page(text), Page(html_report(analysis(4)))
    for tag in ("script", "img", "style", "section", "figure", "tr"):
        assert page.count(tag) == before.count(tag), tag
    assert page.count("li") == before.count("li") + len(HOSTILE)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    shown = {row[0] for row in page.rows}
    assert {printable(name) for name in HOSTILE} <= shown
    assert "\u202e" not in text
    assert "\x00" not in text
    assert text.encode()


def test_warnings_come_first_and_only_where_there_are_some(text: str) -> None:
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings == [
        "Warnings",
        "What was compared",
        "Totals",
        "Between the deltas",
        "Delta 1: Llama-3.2-3B-Instruct",
        "Delta 2: Llama-3.2-3B-Math",
        "Tensors",
    ]
    calm = html_report(analysis(2, deltas=1) | {"warnings": []})
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", calm) == ["What was compared", "Totals", "Plots", "Tensors"]


def test_every_figure_has_a_caption_and_says_what_it_shows(text: str) -> None:
    page = Page(text)
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert page.count("figure") == page.count("figcaption") == len(drawn) == 9
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawn)


def test_ids_are_unique_and_labels_lead_somewhere(text: str) -> None:
    tags = Page(text).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids


def test_colours_of_plots_are_the_pages(text: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert not re.findall(r'"#[0-9a-f]{3,8}"', svg)
    for name in set(re.findall(r"var\(--(\w+)\)", text)):
        assert text.count(f"--{name}:") >= 1, name


def test_every_row_is_there_without_javascript(text: str) -> None:
    rows = {row[0] for row in Page(text).rows}
    assert {row["name"] for row in analysis()["deltas"][0]["tensors"]} <= rows


def test_totals_are_the_analysis_totals(text: str) -> None:
    rows = {row[0]: row for row in Page(text).rows if len(row) == 6}
    first, second = (delta["total"] for delta in analysis()["deltas"])
    assert rows["‖Δ‖"][2:] == [
        f"{value:.{digits}f}"
        for total in (first, second)
        for value, digits in ((total["delta_norm"], 2), (total["mean"]["delta_norm"], 3))
    ]
    assert rows["changed"][2::2] == [f"{total['changed_share']:.2%}" for total in (first, second)]


def test_exceptions_are_shown_where_there_are_some() -> None:
    labels = {column.label for column in columns(analysis(1))}
    assert not labels & {"left out", "infinite", "NaN"}
    assert {"left out", "infinite", "NaN"} <= {column.label for column in columns(still_analysis())}


def test_an_analysis_with_nothing_to_say_is_shown() -> None:
    text = html_report(still_analysis())
    assert "None" not in Page(text).texts
    assert "nan" not in " ".join(Page(text).texts).split()
    assert "<figure" not in text


def test_what_sorts_is_the_number_in_full_and_nothing_comes_last() -> None:
    made = analysis(12, deltas=1)
    tensors = made["deltas"][0]["tensors"]
    tensors[1]["cosine"], tensors[2]["cosine"], tensors[3]["cosine"] = None, 0.123456781, 0.12345678
    found = {column.label: column for column in columns(made)}
    order, said = found["cos(Δ, shift)"].order()
    assert sorted(order) == list(range(len(tensors)))
    assert order[-1] == 1
    assert said == len(tensors) - 1
    assert order.index(3) < order.index(2)
    names = [tensors[place]["name"] for place in found["tensor"].order()[0]]
    nine, ten = (names.index(f"model.layers.{layer}.mlp.up_proj.weight") for layer in (9, 10))
    assert nine < ten


def test_rows_beyond_those_that_a_browser_lays_out_are_data_and_the_page_says_so() -> None:
    made = analysis(4, deltas=1, experts=600)
    tensors = made["deltas"][0]["tensors"]
    text = html_report(hostile(made))
    (raw,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data = json.loads(raw)
    assert f"The first 2,000 of {len(tensors):,} rows." in text
    assert len(data["rest"][0]) == len(tensors) - MOST_ROWS
    assert data["rest"][0] == [row["name"] for row in tensors[MOST_ROWS:]]
    assert all(sorted(order) == list(range(len(tensors))) for order in data["orders"])
    assert text.count("<tr>") < MOST_ROWS + 50


def test_data_cannot_end_its_element() -> None:
    made = analysis(4, deltas=1, experts=600)
    made["deltas"][0]["tensors"][-1]["name"] = HOSTILE[1]
    text = html_report(made)
    assert Page(text).count("img") == 0
    (raw,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(raw)["rest"][0][-1] == HOSTILE[1]
