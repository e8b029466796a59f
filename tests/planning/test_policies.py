from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import paramdelta
from paramdelta.errors import MismatchError, RecipeError
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.policies import Coefficients, Policies, Selection
from paramdelta.planning.recipe import Delta, Recipe
from tests.make import encode, normal, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def plan_of(root: Path, **policies: Any) -> Plan:
    return make_plan(Recipe.of(root / "post", root / "base", root / "new", policies=Policies(**policies)))


def ops(plan: Plan) -> dict[str, tuple[str, list[int]]]:
    """Return for each output tensor its operation and the files that it is made from."""
    return {o.name: (o.op, [operand.file for part in o.parts for operand in part.operands]) for o in plan.operations}


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """One tensor in all, one that each alone has, one that each alone lacks; files: 0 new, 1 post, 2 base."""
    for role in ("new", "post", "base"):
        names = ["all", f"only.{role}", *(f"no.{other}" for other in ("new", "post", "base") if other != role)]
        write_checkpoint(tmp_path / role, {name: normal((4,)) for name in names}, config={})
    return tmp_path


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("new-base", {"only.new": 0, "no.post": 0, "no.base": 0}),
        ("post", {"only.new": 0, "only.post": 1, "no.new": 1, "no.post": 0, "no.base": 1}),
        ("skip", {}),
    ],
)
def test_tensors_that_some_lack_are_taken_as_the_policy_says(
    uneven: Path, policy: str, expected: dict[str, int]
) -> None:
    plan = plan_of(uneven, on_missing=policy)
    found = ops(plan)
    assert found.pop("all") == ("delta", [0, 1, 2])
    assert found == {name: ("copy", [file]) for name, file in expected.items()}
    (warning,) = (warning for warning in plan.warnings if warning.code == "on-missing")
    for name in ("only.new", "only.post", "only.base", "no.new", "no.post", "no.base"):
        assert name in warning.message


def test_by_default_they_are_an_error(uneven: Path) -> None:
    with pytest.raises(MismatchError, match="--on-missing"):
        plan_of(uneven)


@pytest.mark.parametrize(("policy", "file", "shape"), [("new-base", 0, (4, 3)), ("post", 1, (5, 3))])
def test_tensors_of_other_shapes_are_taken_as_the_policy_says(
    tmp_path: Path, policy: str, file: int, shape: tuple[int, int]
) -> None:
    for role, rows in (("new", 4), ("post", 5), ("base", 4)):
        write_checkpoint(tmp_path / role, {"w": normal((rows, 3)), "v": normal((2,))}, config={})
    plan = plan_of(tmp_path, on_mismatch=policy)
    assert ops(plan) == {"w": ("copy", [file]), "v": ("delta", [0, 1, 2])}
    assert plan.operations[0].shape == shape
    assert [warning.code for warning in plan.warnings] == ["on-mismatch"]


def test_a_tensor_of_posts_gets_the_new_bases_dtype(tmp_path: Path) -> None:
    for role, rows, dtype in (("new", 4, "BF16"), ("post", 5, "F32"), ("base", 4, "BF16")):
        write_checkpoint(tmp_path / role, {"w": normal((rows, 3), dtype)}, config={})
    out = tmp_path / "out"
    paramdelta.merge(tmp_path / "post", tmp_path / "base", tmp_path / "new", out, policies=Policies(on_mismatch="post"))
    raw = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + length])["w"]["dtype"] == "BF16"
    assert raw[8 + length :] == normal((5, 3), "BF16")[2]


def test_integers_that_a_policy_takes_stay_what_they_are(tmp_path: Path) -> None:
    for role in ("new", "post", "base"):
        tensors = {"w": normal((4,))} | ({} if role == "new" else {"ids": ("I64", (2,), encode([1, 2], "I64"))})
        write_checkpoint(tmp_path / role, tensors, config={})
    plan = plan_of(tmp_path, on_missing="post")
    assert plan.operations[-1].name == "ids"
    assert plan.operations[-1].dtype == "I64"


def test_excluded_tensors_are_the_new_bases(tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.w", "model.layers.0.attn.w", "model.layers.10.mlp.w", "model.embed.w"]
    for role in ("new", "post", "base"):
        write_checkpoint(tmp_path / role, {name: normal((4,)) for name in names}, config={})

    def merged(**policies: Any) -> list[str]:
        return [name for name, (op, _) in ops(plan_of(tmp_path, **policies)).items() if op == "delta"]

    assert merged(exclude=("*embed*",)) == names[:3]
    assert merged(include=("*.mlp.*",)) == [names[0], names[2]]
    assert merged(include=("*.mlp.*",), exclude=("*.10.*",)) == names[:1]
    assert merged(include=("model.layers.?.*",)) == names[:2]
    with pytest.raises(MismatchError, match=r"'\*\.mpl\.\*'"):
        merged(include=("*.mlp.*", "*.mpl.*"))


def test_excluding_what_does_not_fit_is_a_way_out(tmp_path: Path) -> None:
    for role, rows in (("new", 4), ("post", 5), ("base", 4)):
        write_checkpoint(tmp_path / role, {"w": normal((rows, 3)), "v": normal((2,))}, config={})
    assert ops(plan_of(tmp_path, exclude=("w",)))["w"] == ("copy", [0])


def test_a_coefficient_for_a_pattern_counts_for_what_it_means(tmp_path: Path) -> None:
    for role in ("new", "post", "base"):
        write_checkpoint(tmp_path / role, {name: normal((4,)) for name in ("a.mlp", "a.attn", "b")}, config={})
    delta = Delta(str(tmp_path / "post"), str(tmp_path / "base"), 0.5, (("a.*", 1), ("*.attn", -2)))
    recipe = Recipe(str(tmp_path / "new"), (delta,))
    plan = make_plan(recipe)
    assert {o.name: o.parts[0].alphas for o in plan.operations} == {"a.mlp": (1.0,), "a.attn": (-2.0,), "b": (0.5,)}
    assert not recipe.is_exact
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    other = make_plan(Recipe(recipe.new_base, (Delta(delta.post, delta.base, 0.5, (("a.*", 1), ("*.attn", -3))),)))
    assert other.fingerprint != plan.fingerprint
    with pytest.raises(MismatchError, match="'nothing'"):
        make_plan(Recipe(recipe.new_base, (Delta(delta.post, delta.base, 1, (("nothing", 2),)),)))


@pytest.mark.parametrize("field", ["vocab", "on_missing", "on_mismatch"])
def test_an_unknown_policy_is_an_error_that_names_the_choices(field: str) -> None:
    with pytest.raises(RecipeError, match=f"{field.replace('_', '-')}: 'perhaps' is none of error, "):
        Policies(**{field: "perhaps"})  # type: ignore[arg-type]


def test_an_empty_pattern_is_an_error() -> None:
    with pytest.raises(RecipeError, match="exclude"):
        Policies(exclude=("",))


def test_patterns_remember_whether_they_were_of_use() -> None:
    selection = Selection(Policies(include=("a*", "b"), exclude=("*z",)))
    assert [selection.has(name) for name in ("a", "az", "c")] == [True, False, False]
    assert selection.unused() == ["b"]
    coefficients = Coefficients(1.0, (("a", 2.0), ("b", 3.0)))
    assert [coefficients(name) for name in "ac"] == [2.0, 1.0]
    assert coefficients.unused() == ["b"]
