"""`paramdelta analyze`: what goes where, and what is refused before anything is read."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.insight.test_analysis import ROLES, weights, write

COMMAND = (sys.executable, "-m", "paramdelta", "analyze")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("analyze")
    for seed, role in enumerate(ROLES):
        write(root / role, weights(seed))
    return root


def analyze(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, check=False, cwd=root)


TRIPLE = ("--post", "post", "--base", "base", "--new-base", "new_base")


def test_json_of_a_triple(root: Path) -> None:
    done = analyze(root, *TRIPLE, "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    [delta] = found["deltas"]
    assert (delta["post"], delta["base"], delta["new_base"], delta["alpha"]) == ("post", "base", "new_base", 1.0)
    assert found["tensors"] == delta["tensors"]
    assert found["groups"] == delta["groups"]
    assert found["total"] == delta["total"]
    assert {"name", "delta_norm", "base_shift_norm", "cosine", "max_abs_delta", "changed"} <= found["tensors"][0].keys()
    assert found["warnings"] == []


def test_json_of_a_recipe_with_two_deltas(root: Path) -> None:
    recipe = root / "two.yaml"
    recipe.write_text(
        "new_base: new_base\ndeltas: [{post: post, base: base}, {post: post2, base: base2, alpha: 0.5}]\n"
    )
    done = analyze(root, "two.yaml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [delta["alpha"] for delta in found["deltas"]] == [1.0, 0.5]
    assert len(found["pairs"]) == 1
    assert "tensors" not in found


def test_people_read_a_table_and_warnings_on_standard_error(root: Path) -> None:
    write(root / "stranger", weights(9, lineage=1))
    done = analyze(root, "--post", "post", "--base", "stranger", "--new-base", "new_base")
    assert done.returncode == 0
    assert "wrong-lineage" in done.stderr or "trained from another model" in done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "-" not in line)
    assert "attention" in done.stdout
    more = analyze(root, *TRIPLE, "--tensors", "--quiet")
    assert "model.layers.0.self_attn.q_proj.weight" in more.stdout
    assert more.stderr == ""


def test_files(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, page, plots = tmp_path / "t.csv", tmp_path / "r.html", tmp_path / "plots"
    done = analyze(root, *TRIPLE, "--csv", str(table), "--html", str(page), "--plots", str(plots), "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in found["tensors"]]
    assert [float(row["delta_norm"]) for row in rows] == [row["delta_norm"] for row in found["tensors"]]
    assert "<svg" in page.read_text(encoding="utf-8")
    assert {path.suffix for path in plots.iterdir()} == {".svg"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--post", "post", "--base", "base"), 2, "--new-base"),
        ((), 2, "recipe"),
        (("nothing.yaml", *TRIPLE), 2, "beside"),
        (("nothing.yaml",), 2, "nothing.yaml"),
        ((*TRIPLE, "--csv", "."), 5, "directory"),
        ((*TRIPLE, "--html", "none/there.html"), 5, "none/there.html"),
        (("--post", "none", "--base", "base", "--new-base", "new_base"), 3, "none"),
        ((*TRIPLE, "--memory", "1MB"), 9, "MB"),
        ((*TRIPLE, "--csv", "post/model-00001-of-00002.safetensors"), 5, "input"),
        ((*TRIPLE, "--csv", "base/new.csv"), 5, "input"),
        ((*TRIPLE, "--html", "new_base"), 5, "input"),
        ((*TRIPLE, "--csv", "other.safetensors"), 5, "not replaced"),
        ((*TRIPLE, "--csv", "twice", "--html", "./twice"), 5, "twice"),
    ],
)
def test_refusals(root: Path, options: tuple[str, ...], code: int, said: str) -> None:
    (root / "other.safetensors").write_bytes(b"something")
    done = analyze(root, *options)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    as_json = json.loads(analyze(root, *options, "--json").stdout)
    assert as_json["error"]["code"] == code


def test_several_merges_in_a_recipe_are_refused(root: Path) -> None:
    merge = "{new_base: new_base, post: post, base: base, output: %s}"
    (root / "several.yaml").write_text(f"merges: [{merge % 'one'}, {merge % 'two'}]\n")
    done = analyze(root, "several.yaml")
    assert done.returncode == 2
    assert "2 merges" in done.stderr


def test_a_link_stays_one_and_devices_are_written_to(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    assert analyze(root, *TRIPLE, "--csv", str(tmp_path / "link.csv"), "--quiet").returncode == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text(encoding="utf-8").startswith("delta,")
    shown = analyze(root, *TRIPLE, "--csv", os.devnull, "--quiet")
    assert shown.returncode == 0
    assert not Path(os.devnull).is_file()


def test_quietly_nothing_is_warned_of(root: Path) -> None:
    write(root / "stranger", weights(9, lineage=1))
    shown = analyze(root, "--post", "post", "--base", "stranger", "--new-base", "new_base", "--quiet")
    assert (shown.returncode, shown.stderr) == (0, "")
