"""Recipe files as a process: many merges, one summary, one exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.test_cli import failed, of, paramdelta
from tests.make import llama_shapes, normal, sparse_checkpoint, write_checkpoint

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
    path.write_text(json.dumps(recipe_of(**changes)))  # which is YAML
    return path


def recipe_of(output: str | None = None, **changes: Any) -> dict[str, Any]:
    content = {"new_base": "models/new_base", "post": "models/post", "base": "models/base", **changes}
    return content if output is None else content | {"output": output}


def weights(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors*")}


def test_a_recipe_merges_as_the_command_line_does(models: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.yaml", alpha=0.5, exclude=["*embed*"], output="one")
    run = paramdelta("run", file, cwd=models)
    assert run.returncode == 0, run.stderr
    options = ["--alpha", "0.5", "--exclude", "*embed*", "-o", f"{tmp_path}/two"]
    assert paramdelta("merge", *of(models), *options).returncode == 0
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


def chain(path: Path, one: str = "one", two: str = "two", **changes: Any) -> Path:
    """Write a recipe of two merges, the second onto what the first writes."""
    merges = [recipe_of(one, **changes), recipe_of(two, new_base=one, post="models/other")]
    path.write_text(json.dumps({"merges": merges}, indent=1))
    return path


@pytest.mark.parametrize("one", ["one", "ch/one"])
def test_a_merge_reads_what_an_earlier_one_writes_wherever_that_is(models: Path, tmp_path: Path, one: str) -> None:
    file = chain(tmp_path / "r.yaml", one)
    assert paramdelta("run", recipe(tmp_path / "old.yaml", alpha=3, output=one)).returncode == 0  # what lies there
    run = paramdelta("run", file, "-o", "moved", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "moved/two/recipe.yaml").read_text().startswith("new_base: ../one\n")
    assert weights(tmp_path / "moved/one") != weights(tmp_path / one)
    paths = ["--post", f"{models}/other", "--base", f"{models}/base", "--new-base", f"{tmp_path}/moved/one"]
    assert paramdelta("merge", *paths, "-o", tmp_path / "same").returncode == 0
    assert weights(tmp_path / "same") == weights(tmp_path / "moved/two") != {}


@pytest.mark.usefixtures("models")
def test_chains_go_through_several_files_and_name_files_of_outputs(tmp_path: Path) -> None:
    first = recipe(tmp_path / "a.yaml", output="one", shard_size="1MB")
    second = recipe(tmp_path / "b.yaml", post="./x/../one/model.safetensors", base="./elsewhere/one", output="two")
    run = paramdelta("run", first, second, "-o", tmp_path / "elsewhere")
    assert run.returncode == 0, run.stderr
    failed(paramdelta("run", second, first), 2, f"{second}: line 1: post is the output", "later", f"{first}: line 1")


@pytest.mark.usefixtures("models")
def test_a_merge_that_reads_a_later_or_its_own_output_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.yaml", output="own", post="own")
    failed(paramdelta("run", file, "-o", tmp_path / "out"), 2, f"{file}: line 1: post is the output of this very merge")
    file = recipe(tmp_path / "r.yaml", output="org/name", new_base="org/name")
    failed(paramdelta("run", file), 2, "new_base is the output of this very merge", "write hf://org/name")
    file = chain(tmp_path / "r.yaml")
    merges = json.loads(file.read_text())["merges"]
    file.write_text(json.dumps({"merges": [recipe_of("zero"), *reversed(merges)]}, indent=1))
    lines = [n for n, line in enumerate(file.read_text().splitlines(), start=1) if line == "  {"]
    words = f"line {lines[1]}: new_base is the output of a merge that comes later ({file}: line {lines[2]})"
    failed(paramdelta("run", file, "--keep-going"), 2, words)
    assert not (tmp_path / "zero").exists()


@pytest.mark.usefixtures("models")
def test_what_depends_on_a_merge_that_failed_fails_and_uses_nothing_older(tmp_path: Path) -> None:
    assert paramdelta("run", chain(tmp_path / "r.yaml")).returncode == 0
    (tmp_path / "two").rename(tmp_path / "three")
    run = paramdelta("run", chain(tmp_path / "r.yaml", alpha=2), "--keep-going", "--json")  # ./one holds another merge
    report = json.loads(run.stdout)
    assert run.returncode == 5
    assert (report["succeeded"], report["failed"], report["not_run"]) == (0, 2, 0)
    own, orphan = (merge["error"] for merge in report["merges"])
    assert (own["recipe"], own["line"], own["code"]) == (str(tmp_path / "r.yaml"), 3, 5)
    assert (orphan["line"], orphan["code"]) == (10, 3)
    assert f"new_base is the output of a merge that failed ({tmp_path}/r.yaml: line 3)" in orphan["message"]
    assert not (tmp_path / "two").exists()


@pytest.mark.usefixtures("models")
def test_a_merge_that_fails_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = chain(tmp_path / "r.yaml", post="models/missing")
    run = paramdelta("run", file)
    assert run.returncode == 3
    assert run.stderr.startswith(f"error: {file}: line 3: {tmp_path}/one: {tmp_path}/models/missing: no such file")
    assert run.stdout == "0 of 2 merges done, 1 failed, 1 not run\n"


@pytest.mark.usefixtures("models")
def test_errors_say_what_paths_in_recipes_are_relative_to(models: Path, tmp_path: Path) -> None:
    (tmp_path / "deep/s").mkdir(parents=True)
    hint = f"relative to its own directory, {tmp_path}/deep."
    for post in ("models/post", "./models/post"):
        file = recipe(tmp_path / "deep/r.yaml", post=post, base=f"{models}/base", new_base=f"{models}/new_base")
        failed(paramdelta("run", file, "-o", tmp_path / "out", cwd=tmp_path), 3, hint, "(post)")
        failed(paramdelta("run", "deep/r.yaml", "-o", tmp_path / "out", cwd=tmp_path), 3, hint)
    file = recipe(tmp_path / "deep/r.yaml", new_base="s/nothere")
    run = paramdelta("run", file, "-o", tmp_path / "out")
    failed(run, 3, f"{tmp_path}/deep/s/nothere: no such file", "Check the spelling", "write hf://s/nothere")
    file = recipe(tmp_path / "deep/r.yaml", new_base="org/nothere")
    run = paramdelta("run", file, "-o", tmp_path / "out")
    failed(run, 3, "is not in the Hub's cache", "(new_base)", "hf download", "write ./org/nothere")


@pytest.mark.usefixtures("models")
def test_a_dry_run_plans_every_merge_and_writes_nothing(models: Path, tmp_path: Path) -> None:
    (models / "broken").mkdir()
    broken = recipe(tmp_path / "b.yaml", output="b", post="models/broken")
    good = recipe(tmp_path / "a.yaml", output="a", vocab="pad")
    run = paramdelta("run", broken, good, chain(tmp_path / "r.yaml"), "--dry-run", "-o", "out", cwd=tmp_path)
    assert run.returncode == 3
    assert run.stderr.startswith(f"error: {broken}: line 1: out/b: ")
    planned = paramdelta("plan", *of(models)).stdout
    assert f"out/a ({good}: line 1)\n{planned}out/one ({tmp_path}/r.yaml: line 3)\n{planned}" in run.stdout
    assert f"out/two ({tmp_path}/r.yaml: line 9): planned when out/one is merged\n" in run.stdout
    assert run.stdout.endswith("2 of 4 merges planned, 1 failed, 1 to be planned later; nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.yaml", "models", "r.yaml"]


@pytest.mark.usefixtures("models")
def test_a_dry_run_in_json_is_one_object_of_plans(models: Path, tmp_path: Path) -> None:
    file = chain(tmp_path / "r.yaml")
    run = paramdelta("run", file, "--dry-run", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    first, second = report.pop("merges")
    assert report == {"planned": 1, "waiting": 1, "failed": 0}
    wanted = json.loads(paramdelta("plan", *of(models), "--json").stdout)
    assert first.items() >= {"output": f"{tmp_path}/one", "already_complete": False, "shards": wanted["shards"]}.items()
    assert first["tensors"] == wanted["tensors"]
    assert second == {"output": f"{tmp_path}/two", "waits_for": [f"{tmp_path}/one"]}
    assert paramdelta("run", recipe(tmp_path / "a.yaml", output="one")).returncode == 0
    first, second = json.loads(paramdelta("run", file, "--dry-run", "--json").stdout)["merges"]
    assert first["already_complete"]
    assert second["bytes_written"] == wanted["bytes_written"]
    assert "waits_for" in json.loads(paramdelta("run", file, "--dry-run", "--json", "--overwrite").stdout)["merges"][1]
    failed = paramdelta("run", chain(tmp_path / "r.yaml", base="models/gone"), "--dry-run", "--json")
    report = json.loads(failed.stdout)
    assert (failed.returncode, report["failed"]) == (3, 2)
    assert report["merges"][1]["error"]["line"] == 9


@pytest.mark.usefixtures("models")
def test_outputs_that_collide_below_a_directory_have_a_remedy(tmp_path: Path) -> None:
    one, two = recipe(tmp_path / "a.yaml", output="x/out"), recipe(tmp_path / "b.yaml", output="y/out")
    run = paramdelta("run", one, two, "-o", tmp_path / "out")
    failed(run, 2, f"{two}: line 1", f"{one}: line 1", "same output", "the last part")
    failed(paramdelta("run", one, one), 2, "same output", "Give each an output of its own")


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


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_tells_so_once(tmp_path: Path, number: int, code: int) -> None:
    for role in ("post", "base", "new_base"):
        sparse_checkpoint(tmp_path / "models" / role, {f"w{n}": (1 << 14, 1 << 14) for n in range(3)})
    one, two = (recipe_of(output=name) for name in ("one", "two"))
    (tmp_path / "r.yaml").write_text(json.dumps({"merges": [one, two]}))
    command = [sys.executable, "-m", "paramdelta", "run", str(tmp_path / "r.yaml"), "--json", "--keep-going"]
    with subprocess.Popen(
        [*command, "--io", "pread", "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("one/.paramdelta/*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == code
    report = json.loads(printed)
    assert (report["succeeded"], report["failed"], report["not_run"]) == (0, 1, 1)
    assert report["merges"][0]["error"]["code"] == code
