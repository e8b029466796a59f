from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from paramdelta.planning.card import model_card
from paramdelta.planning.plan import make_plan
from paramdelta.planning.recipe import Delta, Recipe
from tests.make import normal, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def card_of(root: Path, *deltas: tuple[str, str, float, tuple[tuple[str, float], ...]]) -> str:
    names = {"new", *(name for post, base, _, _ in deltas for name in (post, base))}
    for number, name in enumerate(sorted(names)):
        write_checkpoint(root / name, {"a.w": normal((4,), seed=number), "b.w": normal((4,), seed=number)}, config={})
    found = tuple(Delta(str(root / post), str(root / base), alpha, alphas) for post, base, alpha, alphas in deltas)
    return model_card(make_plan(Recipe(str(root / "new"), found)))


def test_one_delta_in_full(tmp_path: Path) -> None:
    card = card_of(tmp_path, ("post", "base", 1.0, ()))
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["new", "post", "base"]
    assert front["base_model_relation"] == "merge"
    assert "# new with the post-training of post\n" in card
    assert "    new base + (post − base)\n" in card
    assert "Every element is the exact result, rounded once." in card
    assert str(tmp_path) not in card


def test_several_deltas_and_coefficients_by_pattern(tmp_path: Path) -> None:
    card = card_of(tmp_path, ("p1", "b1", 0.7, (("a.*", 0.5),)), ("p2", "b2", 0.3, ()))
    assert "# new with the post-training of p1 and p2\n" in card
    assert "    new base + 0.7 · (post 1 − base 1) + 0.3 · (post 2 − base 2)\n" in card
    assert "    0.5 · (post 1 − base 1) where a name is like a.*\n" in card
    assert "Accumulated in f64." in card


def test_what_is_taken_away_is_not_called_training(tmp_path: Path) -> None:
    card = card_of(tmp_path, ("post", "base", -1.0, ()))
    assert "# new and the deltas of post\n" in card
    assert "    new base − (post − base)\n" in card
