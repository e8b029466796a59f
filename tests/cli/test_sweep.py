"""Several coefficients in one pass, as a process: names, messages, JSON, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import paramdelta as package
from tests.cli.test_cli import OWN_PEAK, failed, of, paramdelta
from tests.cli.test_run import weights
from tests.make import encode, llama_shapes, normal, sparse_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

ALPHAS = ("--alpha", "0.25", "--alpha", ".5", "--alpha", "1.0")
NAMES = ["alpha-0.25", "alpha-0.5", "alpha-1"]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, role in enumerate(("post", "base", "new_base", "other")):
        tensors = {name: normal(shape, seed=seed) for name, shape in llama_shapes().items()}
        config = {"model_type": "llama", "tie_word_embeddings": False}
        write_checkpoint(tmp_path / "models" / role, tensors, shards=2, config=config)
    return tmp_path / "models"


def recipe(path: Path, *merges: dict[str, Any]) -> Path:
    common = {"new_base": "models/new_base", "post": "models/post", "base": "models/base"}
    path.write_text(json.dumps({"merges": [common | each for each in merges]}, indent=1))  # which is YAML
    return path


def test_a_sweep_writes_what_merges_write_one_by_one(models: Path, tmp_path: Path) -> None:
    run = paramdelta("sweep", *of(models), *ALPHAS, "--alpha", "*mlp*=-2", "-o", tmp_path / "all")
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == NAMES
    lines = run.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1:2]] == [str(tmp_path / "all" / name) for name in NAMES]
    assert lines[-1].startswith("3 of 3 merges done, 0 failed; ")
    for name, alpha in zip(NAMES, ("0.25", "0.5", "1"), strict=True):
        options = ["--alpha", alpha, "--alpha", "*mlp*=-2", "-o", f"{tmp_path}/each/{name}"]
        assert paramdelta("merge", *of(models), *options).returncode == 0
        assert weights(tmp_path / "each" / name) == weights(tmp_path / "all" / name) != {}
        recipes = [(tmp_path / way / name / "recipe.yaml").read_bytes() for way in ("all", "each")]
        assert recipes[0] == recipes[1]
        assert paramdelta("verify", tmp_path / "all" / name, "--recompute").returncode == 0
    again = paramdelta("sweep", *of(models), *ALPHAS, "--alpha", "*mlp*=-2", "-o", tmp_path / "all")
    assert again.stdout.count("nothing to do") == 3


def test_json_is_one_object_with_the_results_of_merges(models: Path, tmp_path: Path) -> None:
    run = paramdelta("sweep", *of(models), *ALPHAS, "-o", tmp_path / "out", "--json", "--quiet")
    assert (run.returncode, run.stderr) == (0, "")
    report = json.loads(run.stdout)
    known = json.loads(paramdelta("merge", *of(models), "-o", tmp_path / "one", "--json").stdout)
    assert [merge.keys() for merge in report["merges"]] == [known.keys()] * 3
    assert [merge["output"] for merge in report["merges"]] == [str(tmp_path / "out" / name) for name in NAMES]
    assert (report["succeeded"], report["failed"], report["not_run"]) == (3, 0, 0)
    assert report["bytes_read"] == known["bytes_read"]
    assert report["peak_rss_bytes"] > 0


def test_a_recipe_names_mixes_that_are_made_in_one_pass(models: Path, tmp_path: Path) -> None:
    delta = {"post": "models/post", "base": "models/base"}
    other = {"post": "models/other", "base": "models/base"}
    merges = [
        {"new_base": "models/new_base", "deltas": [{**delta, "alpha": one}, {**other, "alpha": two}], "output": name}
        for name, one, two in (("x/even", 0.5, 0.5), ("x/more", 0.9, 0.1), ("x/less", 1, -1))
    ]
    (tmp_path / "mix.yaml").write_text(json.dumps({"merges": merges}))
    run = paramdelta("sweep", tmp_path / "mix.yaml", "-o", tmp_path / "all", cwd=models)
    assert run.returncode == 0, run.stderr
    assert paramdelta("run", tmp_path / "mix.yaml", "-o", tmp_path / "each").returncode == 0
    for name in ("even", "more", "less"):
        assert weights(tmp_path / "all" / name) == weights(tmp_path / "each" / name) != {}
        recipes = [(tmp_path / way / name / "recipe.yaml").read_bytes() for way in ("all", "each")]
        assert recipes[0] == recipes[1]


@pytest.mark.usefixtures("models")
def test_recipes_that_differ_in_more_are_told_by_line_and_field(tmp_path: Path) -> None:
    one, two = {"alpha": 0.5, "output": "a"}, {"alpha": 1.0, "output": "b"}
    file = recipe(tmp_path / "r.yaml", one, two | {"dtype": "f32"})
    words = f"{file}: line 10: differs from {file}: line 3 in dtype"
    failed(paramdelta("sweep", file, "-o", tmp_path / "out"), 2, words, "paramdelta run")
    file = recipe(tmp_path / "r.yaml", one, two | {"post": "models/other"})
    failed(paramdelta("sweep", file, "-o", tmp_path / "out"), 2, "line 10: differs from", "in post:")
    file = recipe(tmp_path / "r.yaml", one, two | {"new_base": "a"})
    failed(paramdelta("sweep", file, "-o", tmp_path / "out"), 2, "in new_base:")
    file = recipe(tmp_path / "r.yaml", one, two | {"alpha": 0.5})
    failed(paramdelta("sweep", file, "-o", tmp_path / "out"), 2, "line 10: has the same coefficients as", "line 3")
    file = recipe(tmp_path / "r.yaml", one, two | {"output": "a"})
    failed(paramdelta("sweep", file, "-o", tmp_path / "out"), 2, "line 10: has the same output as")
    file = recipe(tmp_path / "r.yaml", one | {"post": "models/gone"}, two | {"post": "models/gone"})
    failed(paramdelta("sweep", file, "-o", tmp_path / "out"), 3, "models/gone: no such file", "(post)")
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_is_either_options_or_a_recipe(models: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.yaml", {"output": "a"})
    out = ("-o", tmp_path / "out")
    for extra in (("--post", "p"), ("--alpha", "1"), ("--dtype", "f32"), ("--vocab", "pad"), ("--trust-remote-code",)):
        failed(paramdelta("sweep", file, *extra, *out), 2, f"{file}: a recipe file says all of it")
    failed(paramdelta("sweep", "--post", "p", *out), 2, "--base, --new-base, --alpha: missing")
    failed(paramdelta("sweep", *of(models), "--alpha", "*mlp*=1", *out), 2, "--alpha: missing")
    failed(paramdelta("sweep", *of(models), *ALPHAS, "--alpha", "0.50", *out), 2, "alpha-0.5 is given twice")
    failed(paramdelta("sweep", *of(models), *ALPHAS, "-o", ""), 2, "output: the path is empty")
    twice = ("--alpha", "*mlp*=1", "--alpha", "*mlp*=2")
    failed(paramdelta("sweep", *of(models), *ALPHAS, *twice, *out), 2, "a pattern is given twice")
    failed(paramdelta("sweep", *of(models), *ALPHAS, *out, "--memory", "20MB"), 9, "Fewer than 3 outputs at once")
    assert not (tmp_path / "out").exists()


def test_one_that_fails_is_named_and_has_the_exit_code(tmp_path: Path) -> None:
    for role, value in (("post", 3e38), ("base", 0.0), ("new_base", 3e38)):
        write_checkpoint(tmp_path / "in" / role, {"w": ("F32", (2,), encode([1.0, value], "F32"))})
    command = ["sweep", *of(tmp_path / "in"), "--alpha", "1", "--alpha", "0.1", "-o", f"{tmp_path}/out"]
    run = paramdelta(*command, "--quiet")
    assert run.returncode == 8
    assert run.stderr.startswith(f"error: {tmp_path}/out/alpha-1: elements became infinite or NaN")
    assert "--allow-nonfinite goes on from there" in run.stderr
    assert run.stdout.splitlines()[-1].startswith("1 of 2 merges done, 1 failed; ")
    assert package.verify(tmp_path / "out" / "alpha-0.1").ok
    run = paramdelta(*command, "--json")
    report = json.loads(run.stdout)
    assert (run.returncode, report["succeeded"], report["failed"]) == (8, 1, 1)
    assert report["merges"][0]["output"] == f"{tmp_path}/out/alpha-1"
    assert report["merges"][0]["error"]["code"] == 8
    assert report["merges"][1]["already_complete"]
    run = paramdelta(*command, "--allow-nonfinite")
    assert run.returncode == 0
    assert "warning: elements became infinite or NaN in 'w' (1 Inf, 0 NaN)" in run.stderr


@OWN_PEAK
def test_the_whole_process_stays_within_its_memory_budget(tmp_path: Path) -> None:
    for role in ("post", "base", "new_base"):
        sparse_checkpoint(tmp_path / role, {f"w{number}": (1 << 12, 1 << 12) for number in range(3)})
    alphas = [option for number in range(6) for option in ("--alpha", str(number))]
    command = ("sweep", *of(tmp_path), *alphas, "--json", "-o", f"{tmp_path}/out")
    least = paramdelta(*command, "--memory", "20MB").stdout.split("Use --memory ")[1].split()[0]
    for memory, io in ((least, "pread"), ("200MB", "mmap")):
        run = paramdelta(*command, "--memory", memory, "--io", io, "--overwrite")
        assert run.returncode == 0, run.stdout
        assert json.loads(run.stdout)["peak_rss_bytes"] <= int(memory.removesuffix("MB")) * 1_000_000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_a_sweep_that_is_stopped_goes_on_with_the_same_command(tmp_path: Path) -> None:
    for role in ("post", "base", "new_base"):
        sparse_checkpoint(tmp_path / role, {f"w{number}": (1 << 11, 1 << 11) for number in range(9)}, shards=9)
    arguments = ["sweep", *of(tmp_path), *ALPHAS, "-o", str(tmp_path / "out"), "--workers", "1", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "paramdelta", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while sum(path.read_bytes().count(b"\n") > 1 for path in tmp_path.glob("out/*/.paramdelta/journal.jsonl")) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "of 27 shards are finished and kept" in json.loads(printed)["error"]["message"]
    run = paramdelta(*arguments)
    assert run.returncode == 0, run.stderr
    assert "goes on from an earlier run" in run.stderr
    assert all(merge["resumed_shards"] > 0 for merge in json.loads(run.stdout)["merges"])
