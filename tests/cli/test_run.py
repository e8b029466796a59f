"""Recipe files as a process: many merges, one summary, one exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.test_cli import failed, paramdelta
from tests.make import llama_shapes, normal, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, role in enumerate(("post", "base", "new_base", "other")):
        tensors = {name: normal(shape, seed=seed) for name, shape in llama_shapes().items()}
        config = {"model_type": "llama", "tie_word_embeddings": False}
        write_checkpoint(tmp_path / "models" / role, tensors, shards=2, config=config)
    return tmp_path / "models"


def recipe(path: Path, **changes: Any) -> Path:
    content = {"new_base": "models/new_base", "post": "models/post", "base": "models/base", **changes}
    path.write_text(json.dumps(content))  # which is YAML
    return path


def weights(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors*")}


def test_a_recipe_merges_as_the_command_line_does(models: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.yaml", alpha=0.5, exclude=["*embed*"], output="one")
    run = paramdelta("run", file, cwd=models)
    assert run.returncode == 0, run.stderr
    paths = ["--post", f"{models}/post", "--base", f"{models}/base", "--new-base", f"{models}/new_base"]
    options = ["--alpha", "0.5", "--exclude", "*embed*", "-o", f"{tmp_path}/two"]
    assert paramdelta("merge", *paths, *options).returncode == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two") != {}


def test_an_outputs_own_recipe_makes_it_again_byte_for_byte(models: Path, tmp_path: Path) -> None:
    delta = {"post": "models/post", "base": "models/base", "alpha": 0.5, "alphas": {"*.mlp.*": -1.25}}
    other = {"post": "models/other", "base": "models/base"}
    content = {"new_base": "models/new_base", "deltas": [delta, other], "dtype": "f32", "shard_size": "20kB"}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    assert paramdelta("run", tmp_path / "r.yaml", "-o", tmp_path / "deep/one").returncode == 0
    run = paramdelta("run", tmp_path / "deep/one/recipe.yaml", "-o", tmp_path / "two", cwd=models)
    assert run.returncode == 0, run.stderr
    assert weights(tmp_path / "deep/one") == weights(tmp_path / "two")
    assert len(weights(tmp_path / "two")) > 2


def test_the_first_failure_stops_a_batch_unless_it_shall_go_on(models: Path, tmp_path: Path) -> None:
    (models / "broken").mkdir()
    recipe(tmp_path / "a.yaml", output="a")
    recipe(tmp_path / "b.yaml", output="b", post="models/broken")
    recipe(tmp_path / "c.yaml", output="c", alpha=2)
    files = [tmp_path / f"{name}.yaml" for name in "abc"]
    run = paramdelta("run", *files, "--json")
    report = json.loads(run.stdout)
    assert run.returncode == 3
    assert (report["succeeded"], report["failed"], report["not_run"]) == (1, 1, 1)
    run = paramdelta("run", *files, "--json", "--keep-going")
    report = json.loads(run.stdout)
    assert run.returncode == 3
    assert (report["succeeded"], report["failed"], report["not_run"]) == (2, 1, 0)
    assert report["merges"][0]["already_complete"]
    assert report["merges"][1]["error"]["code"] == 3
    assert report["merges"][2]["output"] == str(tmp_path / "c")
    run = paramdelta("run", *files, "--keep-going", "-o", tmp_path / "elsewhere")
    assert run.stdout.endswith("2 of 3 merges done, 1 failed\n")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"a", "c"}


@pytest.mark.usefixtures("models")
def test_mistakes_in_recipes_are_found_before_anything_is_merged(tmp_path: Path) -> None:
    good, bad = recipe(tmp_path / "a.yaml", output="a"), recipe(tmp_path / "b.yaml", output="b", alhpa=1)
    failed(paramdelta("run", good, bad), 2, str(bad), "line 1", "alpha")
    failed(paramdelta("run", good, tmp_path / "missing.yaml"), 2, "missing.yaml", "no such file", "Check the spelling")
    failed(paramdelta("run", good, tmp_path), 2, "not a regular file", "Name a file")
    failed(paramdelta("run", recipe(tmp_path / "c.yaml")), 2, "no output", "-o DIR")
    failed(paramdelta("run", good, recipe(tmp_path / "d.yaml", output="a")), 2, "same output")
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("models")
def test_outputs_say_how_they_were_made_and_nothing_of_where(tmp_path: Path) -> None:
    assert paramdelta("run", recipe(tmp_path / "r.yaml", output="out")).returncode == 0
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nbase_model:\n- new_base\n- post\n- base\nbase_model_relation: merge\n")
    receipt = json.loads((tmp_path / "out/paramdelta.json").read_text())
    assert [(source["role"], source["name"]) for source in receipt["inputs"]] == [
        ("new base", "new_base"),
        ("post", "post"),
        ("base", "base"),
    ]
    assert all(len(source["fingerprint"]) == 64 for source in receipt["inputs"])
    assert {"README.md", "recipe.yaml"} <= {entry["name"] for entry in receipt["files"]}
    for name in ("README.md", "recipe.yaml", "paramdelta.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
