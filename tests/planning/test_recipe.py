from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from paramdelta.errors import RecipeError
from paramdelta.planning.recipe import Delta, Recipe


def test_the_main_form_is_new_base_plus_one_delta() -> None:
    recipe = Recipe.of("post", Path("base"), "new", dtype="bf16", shard_size="5GB")
    assert recipe == Recipe("new", (Delta("post", "base", 1.0),), "BF16", 5_000_000_000)


def test_form_and_shards_are_the_new_bases_unless_asked_for() -> None:
    recipe = Recipe.of("post", "base", "new")
    assert recipe.dtype is None
    assert recipe.shard_size is None


def test_one_delta_with_coefficient_one_is_exact_and_nothing_else_is() -> None:
    assert Recipe.of("p", "b", "n").is_exact
    assert Recipe("n", (Delta("p", "b"),)).is_exact
    assert not Recipe.of("p", "b", "n", alpha=0.5).is_exact
    assert not Recipe.of("p", "b", "n", alpha=-1.0).is_exact
    assert not Recipe("n", (Delta("p", "b"), Delta("q", "b"))).is_exact


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), float("-inf")])
def test_a_coefficient_that_is_not_finite_is_refused_by_name(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"^alpha: "):
        Recipe.of("p", "b", "n", alpha=alpha)
    with pytest.raises(RecipeError, match=r"^alpha: "):
        Delta("p", "b", alpha)


def test_a_recipe_without_a_delta_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"^deltas: "):
        Recipe("n", ())


@pytest.mark.parametrize(("field", "value"), [("dtype", "int8"), ("shard_size", "large"), ("shard_size", 0)])
def test_a_value_that_does_not_parse_is_refused_by_name(field: str, value: str | int) -> None:
    with pytest.raises(RecipeError, match=f"^{field.replace('_', '-')}: ") as caught:
        Recipe.of("p", "b", "n", **{field: value})  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "bf16"), ("dtype", "I8"), ("shard_size", 0), ("shard_size", -1)]
)
def test_a_recipe_written_out_is_checked_too(field: str, value: str | int) -> None:
    with pytest.raises(RecipeError, match=f"^{field.replace('_', '-')}: "):
        Recipe("n", (Delta("p", "b"),), **{field: value})  # type: ignore[arg-type]


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.of("p", "b", "n")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.dtype = "F32"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.deltas[0].alpha = 2.0  # type: ignore[misc]


def test_equal_requests_are_equal_recipes() -> None:
    assert Recipe.of("p", "b", "n", alpha=1) == Recipe.of(Path("p"), Path("b"), Path("n"))
    assert hash(Recipe.of("p", "b", "n")) == hash(Recipe.of("p", "b", "n"))


@pytest.mark.parametrize("field", ["post", "base", "new_base"])
def test_an_empty_path_is_no_directory(field: str) -> None:
    paths = {"post": "p", "base": "b", "new_base": "n"} | {field: ""}
    with pytest.raises(RecipeError, match=f"^{field.replace('_', '-')}: the path is empty"):
        Recipe.of(paths["post"], paths["base"], paths["new_base"])


def test_paths_of_any_kind_are_kept_as_text() -> None:
    recipe = Recipe(Path("n"), (Delta(Path("p"), Path("b")),))  # type: ignore[arg-type]
    assert recipe == Recipe("n", (Delta("p", "b"),))
    assert isinstance(recipe.new_base, str)
