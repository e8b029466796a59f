"""What is drawn of an analysis, and that it is the same file every time, readable to those who do not see it."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from paramdelta.errors import OutputError, RecipeError
from paramdelta.insight.drawing import DARK, LIGHT, themed
from paramdelta.insight.plot import LayerAxis, steps
from paramdelta.insight.plots import export_plots, plots
from tests.insight.analyses import analysis, still_analysis

if TYPE_CHECKING:
    from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match=r"(?s)need matplotlib.*pip install 'paramdelta\[plots\]'"):
        export_plots(analysis(1), tmp_path)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_every_colour_can_be_read_on_the_page(colours: dict[str, str]) -> None:
    assert LIGHT.keys() == DARK.keys()
    for name in colours.keys() - {"paper"}:
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def test_every_light_colour_stands_for_one_name() -> None:
    assert len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize(
    ("least", "step"), [(-1, 1), (0.3, 1), (1, 1), (1.1, 2), (2.1, 5), (9, 10), (11, 20), (60, 100)]
)
def test_steps_of_an_axis_are_round(least: float, step: int) -> None:
    assert steps(least) == step


@pytest.mark.parametrize("last", [0, 1, 27, 79, 125])
def test_what_is_in_no_layer_lies_behind_the_last(last: int) -> None:
    axis = LayerAxis.of([*range(last + 1), None])
    assert axis.place(None) >= last + 2
    assert [axis.place(layer) for layer in range(last + 1)] == list(range(last + 1))


pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return analysis()


def test_each_delta_has_four_plots_and_several_one_together(made: dict[str, Any]) -> None:
    names = [plot.name for plot in plots(made)]
    assert names[0] == "pairs"
    assert names[1:] == [f"{name}-{place}" for place in (1, 2) for name in ("relative", "norms", "cosine", "changes")]
    assert [plot.name for plot in plots(analysis(deltas=1))] == ["relative", "norms", "cosine", "changes"]


def test_a_plot_is_the_same_every_time_and_says_what_it_shows(made: dict[str, Any]) -> None:
    for plot in plots(made):
        svg = plot.svg()
        assert svg == plot.svg()
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == f"{plot.title}. {plot.summary}"
        assert re.search(r"\d", plot.summary)
        assert plot.caption.endswith(".")


def test_an_svg_needs_no_permission_to_style_and_every_reference_leads_somewhere(made: dict[str, Any]) -> None:
    every: list[str] = []
    for plot in plots(made):
        svg = themed(plot.svg())
        root = ElementTree.fromstring(svg)
        ids = [element.get("id", "") for element in root.iter() if element.get("id")]
        every += ids
        assert all(name.startswith(f"{plot.name}-") for name in ids)
        assert set(re.findall(r"#([\w-]+)", svg)) == set(ids)
        assert not [element for element in root.iter() if element.get("style") or element.tag == f"{SVG}style"]
        assert {element.tag for element in root.iter()} <= {
            f"{SVG}{tag}" for tag in ("svg", "defs", "g", "path", "use", "text", "title", "clipPath", "rect")
        }
    assert len(every) == len(set(every))


def test_points_and_cells_tell_their_numbers(made: dict[str, Any]) -> None:
    found = {plot.name: plot.svg() for plot in plots(made)}
    delta = made["deltas"][0]
    groups = {(group["layer"], group["module"]): group for group in delta["groups"]}
    assert f"<title>layer 3, mlp: {groups[3, 'mlp']['relative_delta']:.5f}</title>" in found["relative-1"]
    assert f"<title>in no layer, head: {groups[None, 'head']['delta_norm']:.3f}</title>" in found["norms-1"]
    assert f"<title>layer 27, norm: {groups[27, 'norm']['cosine']:z.4f}</title>" in found["cosine-1"]
    assert f"<title>1 and 2: {made['pairs'][0]['cosine']:.4f}</title>" in found["pairs"]
    assert found["cosine-1"].count("<title>") == len(groups) + 11  # and the key


def test_shares_of_a_histogram_come_to_all(made: dict[str, Any]) -> None:
    svg = next(plot.svg() for plot in plots(made) if plot.name == "changes-1")
    shares = [float(found) for found in re.findall(r": ([\d.]+)% of elements</title>", svg)]
    assert sum(shares) == pytest.approx(200, abs=1)


def test_nothing_is_drawn_of_what_has_nothing_to_say() -> None:
    assert plots(still_analysis()) == []


def test_gaps_zeros_and_what_has_no_direction_do_not_stop_a_plot() -> None:
    made = analysis(6)
    for delta in made["deltas"]:
        for group in delta["groups"]:
            if group["layer"] in (1, 2):
                group |= {"relative_delta": None, "delta_norm": 0.0, "cosine": None}
        delta["tensors"][3] |= {"relative_delta": 0.0, "changed_share": 0.0, "cosine": None}
        delta["groups"] = [group for group in delta["groups"] if (group["layer"], group["module"]) != (4, "mlp")]
    made["pairs"][0]["layers"][0]["cosine"] = made["pairs"][0]["cosine"] = None
    found = {plot.name: plot for plot in plots(made)}
    assert "Zeros are not drawn." in found["norms-1"].caption
    assert "Not drawn left" in found["changes-1"].caption
    for plot in found.values():
        assert "nan" not in plot.svg()


@pytest.mark.parametrize("layers", [0, 1, 126])
def test_any_number_of_layers_can_be_drawn(layers: int) -> None:
    for plot in plots(analysis(layers, deltas=1)):
        ElementTree.fromstring(plot.svg())


def test_many_deltas_can_be_drawn() -> None:
    plot = plots(analysis(4, deltas=12))[0]
    assert plot.name == "pairs"
    assert "11 and 12" in plot.svg()


@pytest.mark.parametrize(("kind", "magic"), [(".svg", b"<svg"), (".png", b"\x89PNG")])
def test_plots_are_written_to_a_directory(tmp_path: Path, kind: str, magic: bytes) -> None:
    files = export_plots(analysis(2, deltas=1), tmp_path / "a" / "b", kind)
    assert [file.name for file in files] == [f"{name}{kind}" for name in ("relative", "norms", "cosine", "changes")]
    assert all(file.read_bytes().startswith(magic) for file in files)


def test_a_name_with_a_suffix_begins_those_of_the_files(tmp_path: Path) -> None:
    files = export_plots(analysis(2, deltas=1), tmp_path / "model.png")
    assert files[0] == tmp_path / "model-relative.png"
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_what_cannot_be_written_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        export_plots(analysis(1), tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    with pytest.raises(RecipeError, match="not a kind of plot"):
        export_plots(analysis(1), tmp_path, ".gif")
