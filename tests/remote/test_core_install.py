"""What a core install lacks is not missed by who works with files of this machine, and named to who does not."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import paramdelta
from paramdelta.cli.app import commands
from paramdelta.errors import FetchError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

MERGE = """
import sys, paramdelta
root, output = sys.argv[1:]
paramdelta.merge(f"{root}/post", f"{root}/base", f"{root}/new", output)
paramdelta.verify(output, recompute=True)
paramdelta.analyze(f"{root}/post", f"{root}/base", f"{root}/new")
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted({"fsspec", "huggingface_hub", "s3fs", "aiohttp", "botocore", "ray", "asyncio"} & loaded))
"""


def test_nothing_that_speaks_to_servers_is_imported_for_local_files(triple: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MERGE, str(triple / "org"), str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("address", ["https://host/model", "s3://bucket/model", "hf://org/name@v1"])
def test_the_extra_is_named_where_it_is_missing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("web", "s3", "hub"):
        monkeypatch.setitem(sys.modules, f"paramdelta.storage.remote.{module}", None)
    with pytest.raises(FetchError, match=r"paramdelta\[remote\]"):
        paramdelta.inspect(address)


def test_an_unknown_kind_of_address_is_told() -> None:
    with pytest.raises(RecipeError, match="no kind of address"):
        paramdelta.inspect("gopher://host/model")


def test_ray_is_asked_for_where_it_is_missing(triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    places = [f"--{role}={triple / 'org' / name}" for role, name in (("post", "post"), ("base", "base"))]
    arguments = ["merge", *places, f"--new-base={triple / 'org/new'}", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(commands, [*arguments, "--engine", "ray"])
    assert done.exit_code == 2
    assert "paramdelta[ray]" in done.output
    assert CliRunner().invoke(commands, [*arguments, "--address", "auto"]).exit_code == 2
    assert not (tmp_path / "out").exists()
