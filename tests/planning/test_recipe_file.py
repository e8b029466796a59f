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
    (job,) = parsed("{new_base: org/name, post: other/name, base: ~/b}", tmp_path / "r.yaml")
    assert job.recipe.new_base == str(tmp_path / "org/name")
    assert job.recipe.deltas[0].post == "hf://other/name"
    assert job.recipe.deltas[0].base == str(Path("~/b").expanduser())


def test_what_is_missing_from_a_directory_beside_the_file_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (job,) = parsed("{new_base: s/nothere, post: s/nothere@v1, base: hf://s/nothere}", tmp_path / "r.yaml")
    assert job.recipe.new_base == str(tmp_path / "s/nothere")
    assert job.recipe.deltas == (Delta("hf://s/nothere@v1", "hf://s/nothere"),)


def test_what_a_merge_of_the_file_writes_is_a_path_for_the_others() -> None:
    merge = (
        "- {new_base: n, post: p, base: b, output: ch/one}\n- {new_base: ./x/../ch/one, post: ch/one, base: ch/two}\n"
    )
    _, job = parsed(f"merges:\n{merge}")
    assert job.recipe == Recipe("/models/x/../ch/one", (Delta("/models/ch/one", "hf://ch/two"),))


def test_values_that_yaml_takes_for_something_else_are_text_where_that_is_safe() -> None:
    (job,) = parsed("{new_base: 2025-01-31, post: '5', base: !!str 7, alpha: 1, shard_size: 5000}")
    assert job.recipe == Recipe("/models/2025-01-31", (Delta("/models/5", "/models/7"),), shard_size=5000)
    assert parsed(GOOD + "base: ~nobody-of-this-name/b\n".replace("base", "output"))[0].output is not None


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
        (GOOD + "alpha: nan\n", 4, "alpha must be a finite number, not nan"),
        (GOOD + "alpha: [0.1, 0.9]\n", 4, "alpha must be a number"),
        (GOOD + "alpha:\n", 4, "alpha must be a number"),
        (GOOD + "alpha: true\n", 4, "alpha must be a number"),
        (GOOD + "alphas: [0.1, 0.9]\n", 4, "alphas must be keys with values, like {'*self_attn*': 0.9}"),
        (GOOD + "alphas: {'*.x': -.inf}\n", 4, "alphas: *.x must be a number"),
        (GOOD + "alphas:\n  '*.x': 1\n  '*.y': nan\n", 6, "alphas: *.y must be a finite number"),
        (GOOD + "alphas: {*self_attn*: 0.9}\n", 4, "must stand in quotes: '*self_attn*'"),
        (GOOD + "exclude: *embed*\n", 4, "must stand in quotes"),
        (GOOD + "exclude:\n- *.bias\n", 5, "must stand in quotes"),
        (GOOD + "exclude: *embed\n", 4, "must stand in quotes"),
        ("new_base: n\ndeltas:\n\t- post: p\n", 3, "with spaces, not with tabs"),
        ("new_base: n\n\tpost: p\n", 2, "with spaces, not with tabs"),
        (GOOD + "---\n" + GOOD, 4, "in a list under merges"),
        (GOOD + "alphas: {'*.x': y}\n", 4, "alphas: *.x must be a number"),
        (GOOD + "dtype: int4\n", 4, "'int4' is not a dtype"),
        (GOOD + "shard_size: big\n", 4, "'big' is not a size"),
        (GOOD + "vocab: union\n", 4, "vocab: 'union' must be one of error, pad"),
        (GOOD + "dtype: bf16\non_missing: no\n", 5, "on_missing: 'no' must be one of error, new-base"),
        (GOOD + "on_mismatch: [post]\n", 4, "on_mismatch must be one of error, new-base"),
        (GOOD + "fp8:\n", 4, "fp8 must be one of dequantise, requantise, and is empty"),
        (GOOD + "include: []\n", 4, "list of at least one"),
        (GOOD + "trust_remote_code: yes\n", 4, "true or false"),
        (GOOD + "output:\n", 4, "output must be text"),
        (GOOD + "include: ['*', '']\n", 4, "an empty pattern"),
        (GOOD + "include: [5]\n", 4, "include must be text: if it is, write it in quotes, '5'"),
        (GOOD + "output: 1.5\n", 4, "output must be text: if it is, write it in quotes, '1.5'"),
        (GOOD + "output: !foo x\n", 4, "unknown tag '!foo'"),
        (GOOD + "alphas: !!python/dict {}\n", 4, "unknown tag '!!python/dict'"),
        (GOOD + "include: !bar [a]\n", 4, "unknown tag '!bar'"),
        (GOOD + "dtype: 16\n", 4, "dtype must be text"),
        (GOOD + "trust_remote_code: 'true'\n", 4, "true or false"),
        (GOOD + "deltas: [{post: p, base: b}]\n", 2, "stands both by itself and under deltas"),
        ("new_base: n\ndeltas:\n  - {post: p}\n", 3, "base is missing"),
        ("new_base: n\ndeltas:\n  - {post: p, base: b, bass: c}\n", 3, "did you mean base?"),
        ("new_base: ''\npost: p\nbase: b\n", 1, "the path is empty"),
        ("new_base: 5\npost: p\nbase: b\n", 1, "new_base must be text: if it is, write it in quotes, '5'"),
        ("new_base: n\ndeltas: {post: p, base: b}\n", 2, "deltas must be a list of at least one entry, like [{post:"),
        ("new_base: n\ndeltas: [p, b]\n", 2, "each of deltas must be keys with values, like {post: P, base: B}"),
        ("merges: []\n", 1, "list of at least one"),
        ("merges: {new_base: n}\n", 1, "list of at least one entry, like [{new_base: N"),
        ("merges:\n  - new_base: n\ndtype: bf16\n", 3, "dtype stands beside merges: each merge has its own settings"),
        (GOOD + "merge_method: linear\n", 4, '"From mergekit"'),
        ("models:\n  - model: p\n", 1, "models is mergekit's: this is not a recipe of paramdelta"),
        ("dtype: bf16\nslices: []\n", 2, "docs/recipes.md"),
        ("merges:\n  - base_model: b\n    models: []\n", 3, "models is mergekit's"),
        (GOOD + "weight: 0.5\n", 4, "unknown key 'weight': here it is alpha"),
        ("new_base: n\npost: p\nbase_model: b\n", 3, "here it is two things, the base of each delta and new_base"),
        ("merges:\n  - new_base: n\nother: 1\n", 3, "unknown key 'other'"),
        ("a: &a [*a]\n", 1, "unknown key 'a'"),
        (GOOD + 'alphas: {"\\e[2J*": x}\n', 4, "alphas: '\\x1b[2J*' must be a number, not 'x'"),
        (GOOD + 'alphas: {"\\e[2J*": nan}\n', 4, "alphas: '\\x1b[2J*' must be a finite number, not nan"),
        (GOOD + 'alpha: "\\u2028inf"\n', 4, "alpha must be a finite number, not '\\u2028inf'"),
        (GOOD + 'output: !!int "\\e[2J"\n', 4, "output must be text: if it is, write it in quotes, '\\x1b[2J'"),
        (GOOD + '!!int "\\e[2J": 5\n', 4, "a key must be text: if it is, write it in quotes, '\\x1b[2J'"),
        (GOOD + '"\\e[2J": 5\n', 4, "unknown key '\\x1b[2J'"),
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
    assert all(part.isprintable() for part in caught.value.message.split("\n"))
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
