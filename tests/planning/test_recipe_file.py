from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.errors import RecipeError
from paramdelta.planning.policies import CHOICES, Policies
from paramdelta.planning.recipe import Delta, Recipe
from paramdelta.planning.recipe_file import Job, parse_recipes, write_recipe

FILE = Path("/models/recipe.yaml")


def parsed(text: str, path: Path = FILE) -> list[Job]:
    return parse_recipes(text, path)


def test_the_smallest_recipe() -> None:
    (job,) = parsed("new_base: n\npost: p\nbase: b\n")
    assert job == Job(Recipe("/models/n", (Delta("/models/p", "/models/b"),)), None, str(FILE), 1)


def test_every_key() -> None:
    (job,) = parsed(
        """
new_base: ../n
deltas:
  - {post: p1, base: b1, alpha: -0.5, alphas: {"*.mlp.*": 1e-3, "lm_head*": 2}}
  - {post: org/p2@v1, base: /b2}
dtype: bfloat16
shard_size: 5GB
vocab: pad
on_missing: new-base
on_mismatch: post
fp8: requantise
include: ["*"]
exclude: "*.bias"
trust_remote_code: true
output: out
"""
    )
    first = Delta("/models/p1", "/models/b1", -0.5, (("*.mlp.*", 1e-3), ("lm_head*", 2.0)))
    policies = Policies("pad", "new-base", "post", "requantise", ("*",), ("*.bias",))
    recipe = Recipe("/models/../n", (first, Delta("hf://org/p2@v1", "/b2")), "BF16", 5 * 10**9, policies, True)
    assert job == Job(recipe, "/models/out", str(FILE), 2)


def test_many_merges_in_a_file() -> None:
    jobs = parsed(
        "merges:\n- {new_base: n, post: p, base: b, output: x}\n- {new_base: m, post: p, base: b, output: y}\n"
    )
    assert [(job.output, job.line) for job in jobs] == [("/models/x", 2), ("/models/y", 3)]


def test_paths_are_relative_to_the_file_and_what_is_there_wins_over_the_hub(tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    (job,) = parsed("{new_base: org/name, post: org/other, base: ~/b}", tmp_path / "r.yaml")
    assert job.recipe.new_base == str(tmp_path / "org/name")
    assert job.recipe.deltas[0].post == "hf://org/other"
    assert job.recipe.deltas[0].base == str(Path("~/b").expanduser())


def test_where_the_program_runs_has_no_say_in_what_a_path_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/models/post").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (job,) = parsed("{new_base: n, post: models/post, base: org/b@pr/1}", tmp_path / "r.yaml")
    assert job.recipe.deltas[0].post == "hf://models/post"
    assert job.recipe.deltas[0].base == "hf://org/b@pr/1"


GOOD = "new_base: n\npost: p\nbase: b\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "is empty"),
        ("- a\n", 1, "must be keys with values"),
        ("new_base: [\n", 2, "not YAML"),
        (GOOD + "alhpa: 2\n", 4, "unknown key 'alhpa'; did you mean alpha?"),
        (GOOD + "on-missing: skip\n", 4, "did you mean on_missing?"),
        (GOOD + "wibble: 2\n", 4, "known are new_base"),
        (GOOD + "post: q\n", 4, "'post' is written twice"),
        ("post: p\nbase: b\n", 1, "new_base is missing"),
        ("new_base: n\npost: p\n", 1, "base is missing"),
        (GOOD + "alpha: much\n", 4, "alpha must be a number, not 'much'"),
        (GOOD + "alpha: .inf\n", None, "alpha"),
        (GOOD + "alpha: nan\n", 1, "alpha: must be a finite number"),
        (GOOD + "alphas: {'*.x': y}\n", 4, "alphas: *.x must be a number"),
        (GOOD + "dtype: int4\n", 4, "'int4' is not a dtype"),
        (GOOD + "shard_size: big\n", 4, "'big' is not a size"),
        (GOOD + "vocab: perhaps\n", 1, "'perhaps' is none of error, pad"),
        (GOOD + "include: []\n", 4, "list of at least one"),
        (GOOD + "trust_remote_code: yes\n", 4, "true or false"),
        (GOOD + "output:\n", 4, "output must be text"),
        (GOOD + "deltas: [{post: p, base: b}]\n", 1, "stands both by itself and under deltas"),
        ("new_base: n\ndeltas:\n  - {post: p}\n", 3, "base is missing"),
        ("new_base: n\ndeltas:\n  - {post: p, base: b, bass: c}\n", 3, "did you mean base?"),
        ("new_base: ''\npost: p\nbase: b\n", 1, "the path is empty"),
        ("merges: []\n", 1, "list of at least one"),
        ("merges:\n  - new_base: n\nother: 1\n", 3, "unknown key 'other'"),
        ("a: &a [*a]\n", 1, "unknown key 'a'"),
        ("new_base: \x00", None, "not YAML"),
        ("[" * 100_000, None, "not YAML"),
    ],
)
def test_mistakes_are_errors_that_name_file_and_line(text: str, line: int | None, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    assert caught.value.exit_code == 2
    assert caught.value.file == str(FILE)
    assert words in str(caught.value)
    if line is not None:
        assert f"line {line}: " in str(caught.value)


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
patterns = st.lists(names, max_size=3).map(tuple)
policies = st.builds(
    Policies,
    vocab=st.sampled_from(CHOICES["vocab"]),
    on_missing=st.sampled_from(CHOICES["on_missing"]),
    on_mismatch=st.sampled_from(CHOICES["on_mismatch"]),
    include=patterns,
    exclude=patterns,
)


@given(
    st.lists(st.tuples(numbers, st.dictionaries(names, numbers, max_size=3)), min_size=1, max_size=3),
    st.none() | st.sampled_from(["BF16", "F16", "F32", "F64"]),
    st.none() | st.integers(1, 10**12),
    policies,
    st.booleans(),
)
def test_a_recipe_that_was_written_is_read_as_it_was(
    deltas: list[tuple[float, dict[str, float]]], dtype: str | None, size: int | None, policies: Policies, code: bool
) -> None:
    made = tuple(Delta("hf://org/post", "hf://org/base", alpha, tuple(alphas.items())) for alpha, alphas in deltas)
    recipe = Recipe("hf://org/new@pr/1", made, dtype, size, policies, code)
    (job,) = parsed(write_recipe(recipe, Path("/models")))
    assert job.recipe == recipe


def test_a_written_recipe_leads_to_its_inputs_from_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("in/post", "in/base", "in/new"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = write_recipe(Recipe.of("in/post", "in/base", "in/new"), tmp_path / "deep" / "out")
    assert str(tmp_path) not in text
    (tmp_path / "deep/out").mkdir(parents=True)
    (job,) = parsed(text, tmp_path / "deep/out/recipe.yaml")
    assert Path(job.recipe.new_base).resolve() == tmp_path / "in/new"


def test_a_written_recipe_says_nothing_of_the_users_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "somebody"
    for name in ("post", "base", "new"):
        (home / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    text = write_recipe(Recipe.of(home / "post", home / "base", home / "new"), tmp_path / "mnt")
    assert "somebody" not in text
    (job,) = parsed(text, tmp_path / "mnt/recipe.yaml")
    assert job.recipe.new_base == str(home / "new")
