"""`paramdelta score` as a process: what people and scripts get, and exit codes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import failed, paramdelta

GUIDE = Path(__file__).parents[2] / "docs" / "insight.md"
ROWS = [("a", 20, 45, 50), ("b", 30, 50, 60), ("c", 10, 60, 60), ("d", 50, 70, 75), ("e", 40, 44, 48), ("f", 5, 20, 30)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["benchmark,new_base,merged,reference", *(",".join(map(str, row)) for row in ROWS), "same,70,70,70"]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_table_for_people_and_warnings_on_standard_error(table: Path) -> None:
    run = paramdelta("score", table)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [" ".join(line.split()[:3]) for line in lines] == [
        "transfer efficiency value",
        "slope of merged",
        "its R² 0.924",
        "slope beside an",
        "the intercept, in",
        "its R² 0.960",
        "recovered, mean over",
        "recovered, of all",
        "7 benchmarks; intervals",
    ]
    assert run.stderr.startswith("warning: reference and new base differ by less than 0.75 in 'same'")
    assert max(map(len, lines)) < 80


def test_the_example_in_the_guide_is_what_the_command_prints() -> None:
    text = GUIDE.read_text(encoding="utf-8").partition("## Score a merge")[2]
    table, shown = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("csv", "console"))
    run = paramdelta("score", "-", input=table)
    printed = [line.rstrip() for line in (run.stdout + run.stderr).splitlines()]
    assert printed == shown.splitlines()[1:]


def test_json_is_one_object_with_the_documented_fields(table: Path) -> None:
    run = paramdelta("score", table, "--json")
    assert run.stderr == ""
    told = json.loads(run.stdout, parse_constant=pytest.fail)
    whole = told["overall"]
    assert whole["benchmarks"] == 7
    assert whole["slope"]["low"] < whole["slope"]["value"] < whole["slope"]["high"]
    assert whole["recovered_of_sums"]["value"] == pytest.approx(134 / 168)
    assert whole["left_out"] == ["same"]
    assert told["groups"] == {}
    assert told["scores"][0] == {
        "benchmark": "a",
        "group": None,
        "new_base": 20.0,
        "merged": 45.0,
        "reference": 50.0,
        "seeds": 1,
        "recovered": pytest.approx(25 / 30),
    }
    assert told["scores"][-1]["recovered"] is None
    assert (told["confidence"], told["resamples"], told["seed"]) == (0.95, 10_000, 0)
    assert [warning["code"] for warning in told["warnings"]] == ["small-gain"]


def test_a_pipe_gives_what_the_file_does(table: Path) -> None:
    piped = paramdelta("score", "-", "--json", input=table.read_text())
    told = json.loads(piped.stdout)
    assert told.pop("file") == "standard input"
    assert {**told, "file": str(table)} == json.loads(paramdelta("score", table, "--json").stdout)
    failed(paramdelta("score", "-", input=""), 2, "standard input: is empty")
    failed(paramdelta("score", "-", input="\n" * (1 << 21)), 2, "standard input", "bytes")


def test_groups_stand_below_each_other_and_few_benchmarks_have_no_interval(tmp_path: Path) -> None:
    header, row = "group;benchmark;new_base;merged;reference", "a;10,5%;20%;30%"
    (tmp_path / "s.csv").write_text(f"{header}\n[red]8B;{row}\n70B\x1b;{row}\n")
    run = paramdelta("score", tmp_path / "s.csv")
    assert run.returncode == 0, run.stderr
    starts = [line.split()[0] for line in run.stdout.splitlines() if "slope of merged" in line]
    assert starts == ["[red]8B", "'70B\\x1b'", "all"]
    assert "1 benchmark; intervals need 6" in run.stdout
    assert "nan" not in run.stdout


def test_exit_codes(table: Path, tmp_path: Path) -> None:
    failed(paramdelta("score", tmp_path / "nowhere.csv"), 3, "nowhere.csv", "no such file")
    failed(paramdelta("score", tmp_path), 3, "not a regular file")
    failed(paramdelta("score", table, "--min-gain", "0"), 2, "min-gain")
    failed(paramdelta("score", table, "--plot", "c.txt"), 2, ".svg")
    table.write_text(table.read_text() + "\ng,1,nan,2\n")
    run = paramdelta("score", table, "--json")
    assert run.returncode == 2
    error = json.loads(run.stdout)["error"]
    assert error["type"] == "RecipeError"
    assert error["message"].startswith(f"{table}: line 9: merged of 'g' is not a number: 'nan'")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")
def test_a_chart_is_drawn_where_it_is_asked_for(table: Path, tmp_path: Path) -> None:
    run = paramdelta("score", table, "--plot", tmp_path / "c.svg", "--json")
    assert json.loads(run.stdout)["plot"] == str(tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    failed(paramdelta("score", table, "--plot", tmp_path / "nowhere/c.svg"), 5, "c.svg")


def test_matplotlib_is_imported_for_a_chart_only(table: Path) -> None:
    program = (
        "import sys\n"
        "from paramdelta.cli.app import commands\n"
        f"commands(['score', {str(table)!r}], standalone_mode=False)\n"
        "assert not {'matplotlib', 'numba'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
