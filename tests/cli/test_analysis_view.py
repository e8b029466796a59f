"""What people see of an analysis on a terminal: 80 columns, whatever the model, the encoding and the names."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import pytest

from paramdelta.cli.analysis_view import show_analysis
from tests.insight.analyses import analysis, still_analysis

if TYPE_CHECKING:
    from collections.abc import Callable

    Show = Callable[..., str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Show:
    def show(made: dict[str, Any], encoding: str = "utf-8", *, tensors: bool = False) -> str:
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", out)
        show_analysis(made, tensors=tensors)
        out.seek(0)
        return out.read()

    return show


@pytest.mark.parametrize("layers", [1, 16, 17, 28, 126])
def test_it_fits_a_terminal_however_many_layers_there_are(shown: Show, layers: int) -> None:
    lines = shown(analysis(layers)).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 60
    assert not any("\x1b" in line for line in lines)


def test_layers_are_taken_together_as_one_vector(shown: Show) -> None:
    made = analysis(32, deltas=1)
    pair = [g for g in made["deltas"][0]["groups"] if g["module"] == "mlp" and g["layer"] in (0, 1)]
    for group, delta, shift, base, cosine in zip(pair, (3.0, 4.0), (6.0, 8.0), (30.0, 40.0), (1.0, 0.5), strict=True):
        group |= {"delta_norm": delta, "base_shift_norm": shift, "base_norm": base, "cosine": cosine}
    line = next(line for line in shown(made).splitlines() if line.startswith("0-1 "))
    assert " 0.100 " in line
    assert " 0.680 " in line  # (18 + 16) / (5 · 10)


def test_four_modules_fit_too(shown: Show) -> None:
    made = analysis(28)
    for delta in made["deltas"]:
        delta["groups"] += [group | {"module": "other"} for group in delta["groups"] if group["module"] == "mlp"]
    lines = shown(made).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("other" in line for line in lines)


def test_bars_are_ascii_where_the_terminal_knows_no_others(shown: Show) -> None:
    assert "█" in shown(analysis())
    plain = shown(analysis(), "ascii")
    assert plain.isascii()
    assert "###" in plain


def test_totals_pairs_and_counts_are_told(shown: Show) -> None:
    made = analysis(deltas=3)
    made["deltas"][1]["total"] |= {"left_out": 5, "nans": 2}
    text = shown(made)
    assert text.count("cosine of deltas ") == 3
    assert "delta 2, elements: 5 left out, 2 NaN\n" in text
    assert "delta 1, elements" not in text
    assert f"{made['deltas'][0]['total']['delta_norm']:.2f}" in text


def test_warnings_go_to_standard_error(shown: Show, capsys: pytest.CaptureFixture[str]) -> None:
    assert "128011" not in shown(analysis())
    assert "warning: post and new base have different tokens for 12 ids" in capsys.readouterr().err


def test_what_has_nothing_to_say_is_shown_as_that(shown: Show) -> None:
    text = shown(still_analysis())
    assert "nan" not in text
    assert "None" not in text


def test_every_tensor_is_listed_where_asked_for(shown: Show) -> None:
    made = analysis(4)
    text = shown(made, tensors=True)
    for delta in made["deltas"]:
        for row in delta["tensors"]:
            assert f" {row['name']} " in text
    assert "q_proj" not in shown(made)


def test_names_carry_neither_markup_nor_control_characters(shown: Show) -> None:
    made = analysis(1, deltas=1)
    made["deltas"][0] |= {"post": "[red]post\x1b[2J", "base": "[/] base", "new_base": "models/[bold]new"}
    made["deltas"][0]["tensors"][0]["name"] = "w\x1b[2J"
    text = shown(made, tensors=True)
    assert "\x1b" not in text
    assert "'[red]post\\x1b[2J' - [/] base\n" in text
    assert "for models/[bold]new, alpha 1\n" in text
