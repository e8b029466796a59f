"""The report in a real browser: it sorts, filters, prints, is dark where that is wished, and loads nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from paramdelta.checkpoint.wording import printable
from paramdelta.insight.drawing import DARK, LIGHT
from paramdelta.insight.report import MOST_ROWS, html_report
from tests import browser
from tests.insight.analyses import analysis, still_analysis
from tests.insight.test_report import HOSTILE, hostile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.browser import Browser, Page

    Open = Callable[..., Page]

PROGRAM = browser.found()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed: apt-get install chromium"),
]
pytest.importorskip("matplotlib")

BODY = "document.querySelector('#table tbody')"
A4 = {"portrait": (210, 297, 24), "landscape": (297, 210, 20)}  # mm, the last what both margins take


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browser.Browser(PROGRAM, tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture
def opened(running: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open reports; at the end nothing was complained of, and nothing but the reports was loaded."""
    pages: list[Page] = []

    def open_report(made: dict[str, Any], before: dict[str, dict[str, Any]] | None = None) -> Page:
        path = tmp_path / f"report {len(pages)}.html"
        path.write_text(html_report(made), encoding="utf-8")
        pages.append(running.open(path, before=before))
        return pages[-1]

    yield open_report
    for page in pages:
        assert page.events("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
        loaded = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
        assert len(loaded) == 1
        assert loaded[0].startswith("file://")
        page.close()


def button(label: str) -> str:
    label = label.replace(" /", "\u00a0/")
    return f"[...document.querySelectorAll('#table th button')].find(button => button.textContent === '{label}')"


def column(page: Page, label: str) -> list[str]:
    """Return what a column says, from the top down."""
    found: list[str] = page.value(
        f"(() => {{ const place = {button(label)}.parentNode.cellIndex;"
        f" return [...{BODY}.rows].map(row => row.cells[place].textContent); }})()"
    )
    return found


def sorted_by(page: Page) -> dict[str, str]:
    """Return which columns say that the table is sorted by them, and how."""
    found: dict[str, str] = page.value(
        "Object.fromEntries([...document.querySelectorAll('#table th[aria-sort]')]"
        ".map(head => [head.textContent, head.ariaSort]))"
    )
    return found


def type_filter(page: Page, text: str) -> str:
    page.value("document.getElementById('filter').focus(); document.getElementById('filter').select()")
    page.send("Input.insertText", text=text) if text else page.press("Delete", 46)
    shown: str = page.value("document.getElementById('shown').textContent")
    return shown


def test_everything_is_there(opened: Open) -> None:
    made = analysis()
    page = opened(made)
    assert page.value("document.title") == "What post-training changed: Llama-3.2-3B-Instruct, Llama-3.2-3B-Math"
    assert page.value(f"{BODY}.rows.length") == sum(len(delta["tensors"]) for delta in made["deltas"])
    sizes = page.value("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
    assert len(sizes) == 9
    assert min(sizes) > 100


def test_a_click_sorts_and_another_one_reverses(opened: Open) -> None:
    made = analysis(12, deltas=1)
    tensors = made["deltas"][0]["tensors"]
    tensors[5]["cosine"] = tensors[50]["cosine"] = None
    page = opened(made)
    known = sorted(row["cosine"] for row in tensors if row["cosine"] is not None)
    nothing = ["–", "–"]
    for direction, expected in (("descending", known[::-1]), ("ascending", known), ("descending", known[::-1])):
        page.click(button("cos(Δ, shift)"))
        assert sorted_by(page) == {"cos(Δ, shift)": direction}
        assert column(page, "cos(Δ, shift)") == [f"{value:z.4f}" for value in expected] + nothing
    page.click(button("tensor"))
    assert sorted_by(page) == {"tensor": "ascending"}
    layers = [int(found[1]) for name in column(page, "tensor") if (found := re.search(r"layers\.(\d+)", name))]
    assert layers == sorted(layers)


def test_numbers_are_sorted_as_numbers(opened: Open) -> None:
    made = analysis(1, deltas=1)
    values = [1e-12, 9.0, 10.0, 0.5, 123456.0, 2e9, 0.0, 1e300, 3.0, 4.0, 5.0, 6.0]
    for row, value in zip(made["deltas"][0]["tensors"], values, strict=True):
        row["delta_norm"] = value
    page = opened(made)
    page.click(button("‖Δ‖"))
    shown = [float(text.replace(",", "")) for text in column(page, "‖Δ‖")]
    assert shown == sorted(values, reverse=True)


def test_the_keyboard_is_enough(opened: Open) -> None:
    page = opened(analysis(4))
    page.value("document.getElementById('filter').focus()")
    for _ in range(2):  # the region that scrolls, then the first head
        page.press("Tab", 9)
    assert page.value("document.activeElement.textContent") == "tensor"
    for direction in ("ascending", "descending"):
        page.press("Enter", 13)
        assert sorted_by(page) == {"tensor": direction}
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_filter_leaves_names_that_hold_every_word(opened: Open) -> None:
    made = analysis(12, deltas=2)
    page = opened(made)
    page.click(button("‖Δ‖"))
    before = column(page, "‖Δ‖")
    assert type_filter(page, "layers.3. Q_PROJ") == f"2 match, of {len(before)} rows."
    assert column(page, "tensor") == ["model.layers.3.self_attn.q_proj.weight"] * 2
    assert type_filter(page, "no such tensor") == f"0 match, of {len(before)} rows."
    assert column(page, "tensor") == []
    assert type_filter(page, "") == f"{len(before)} rows."
    assert column(page, "‖Δ‖") == before
    assert sorted_by(page) == {"‖Δ‖": "descending"}


def test_names_are_shown_as_text(opened: Open) -> None:
    page = opened(hostile(analysis(4)))
    assert page.value("document.title").startswith("What post-training changed: ")
    shown = column(page, "tensor")
    assert shown[: len(HOSTILE)] == [printable(name) for name in HOSTILE]
    page.click(button("tensor"))
    assert sorted(column(page, "tensor")) == sorted(shown)


def test_an_analysis_with_nothing_to_say_sorts_too(opened: Open) -> None:
    page = opened(still_analysis())
    for label in ("cos(Δ, shift)", "left out", "shape"):
        page.click(button(label))
    assert sorted_by(page) == {"shape": "ascending"}
    assert column(page, "tensor") == ["v", "w"]


def test_a_hundred_thousand_tensors_are_searched_though_few_are_laid_out(opened: Open) -> None:
    made = analysis(28, deltas=1, experts=3570)
    tensors = made["deltas"][0]["tensors"]
    page = opened(made)
    assert len(tensors) > 100_000
    assert page.value(f"{BODY}.rows.length") == MOST_ROWS
    page.click(button("‖Δ‖ / ‖base‖"))
    assert page.value(f"{BODY}.rows.length") == MOST_ROWS
    best = sorted(tensors, key=lambda row: -row["relative_delta"])[:MOST_ROWS]
    assert column(page, "tensor") == [row["name"] for row in best]
    assert page.value("document.getElementById('shown').textContent") == f"The first 2,000 of {len(tensors):,} rows."
    assert type_filter(page, "layers.27.mlp.experts.3569.") == f"1 match, of {len(tensors):,} rows."
    assert column(page, "elements") == [f"{256 * 3072:,}"]


def test_it_says_everything_without_javascript(opened: Open) -> None:
    page = opened(analysis(4), {"Emulation.setScriptExecutionDisabled": {"value": True}})
    page.send("Emulation.setScriptExecutionDisabled", value=False)
    assert page.value(f"{BODY}.rows.length") == 2 * 39
    assert page.value("document.querySelectorAll('#table button').length") == 0
    assert page.value("document.getElementById('controls').hidden")
    assert page.value("document.querySelectorAll('figure svg').length") == 9


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_plots_and_text_have_the_colours_that_the_reader_wishes(
    opened: Open, scheme: str, colours: dict[str, str]
) -> None:
    page = opened(analysis(4))
    page.media(prefers_color_scheme=scheme)

    def rgb(name: str) -> str:
        return f"rgb({', '.join(str(int(colours[name][at : at + 2], 16)) for at in (1, 3, 5))})"

    assert page.value("getComputedStyle(document.body).backgroundColor") == rgb("paper")
    assert page.value("getComputedStyle(document.querySelector('figure svg text')).fill") == rgb("ink")
    assert page.value("getComputedStyle(document.querySelector('svg [stroke=\"var(--mlp)\"]')).stroke") == rgb("mlp")


def test_paper_is_white_and_no_page_cuts_anything_off(opened: Open) -> None:
    page = opened(analysis())
    page.media("print", prefers_color_scheme="dark")
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.value("getComputedStyle(document.getElementById('controls')).display") == "none"
    for way, parts in (("landscape", "#table"), ("portrait", "table:not(#table), figure svg")):
        width, height, margins = A4[way]
        page.size(round((width - margins) / 25.4 * 96), round(height / 25.4 * 96))
        right = page.value(
            f"Math.max(...[...document.querySelectorAll('{parts}')].map(e => e.getBoundingClientRect().right))"
        )
        assert right <= page.value("innerWidth") + 1, way
    page.media()
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", page.pdf())
    wide = [float(width) > float(height) for width, height in sizes]
    assert wide == sorted(wide)  # the table's pages lie on their side, and come last
    assert wide.count(False) == 4
    assert wide.count(True) > 5


def test_a_narrow_screen_scrolls_plots_and_tables_but_not_the_page(opened: Open) -> None:
    page = opened(analysis())
    page.size(390, 844)
    assert page.value("document.documentElement.scrollWidth") == 390
    page.size(1440, 900)
    assert page.value("document.documentElement.scrollWidth") == 1440


def test_heads_of_the_table_stay_in_sight(opened: Open) -> None:
    page = opened(analysis())
    page.size(1000, 800)
    page.value("document.getElementById('tensors').scrollIntoView({behavior: 'instant'})")
    page.value("document.querySelector('.tall').scrollTo({top: 3000, left: 400, behavior: 'instant'})")
    box, head, name = page.value(
        "['.tall', '#table thead th', '#table tbody tr:nth-child(120) th'].map(s => document.querySelector(s)"
        ".getBoundingClientRect()).map(r => [r.x, r.y])"
    )
    assert head == [box[0] + 1, box[1] + 1]
    assert name[0] == box[0] + 1


@pytest.mark.parametrize(("layers", "deltas"), [(1, 1), (28, 2), (80, 4), (126, 10)])
def test_no_label_of_a_plot_lies_on_another(opened: Open, layers: int, deltas: int) -> None:
    page = opened(analysis(layers, deltas))
    overlaps = page.value("""
        [...document.querySelectorAll('figure svg')].flatMap(svg => {
          const labels = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
          return labels.flatMap(([one, a], place) => labels.slice(place + 1)
            .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2)
            .map(([other]) => `${one} on ${other}`));
        })
    """)
    assert overlaps == []
