"""What a plan says of the network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import paramdelta
from paramdelta.cli.app import commands
from paramdelta.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import FileServer

BYTES = 2 * (6 * 128 * 200 + 77)


def test_bytes_of_remote_inputs_are_counted_and_no_others(web: FileServer, triple: Path) -> None:
    plan = paramdelta.plan(f"{web.url}/org/post", triple / "org/base", f"{web.url}/org/new")
    assert paramdelta.network_of(plan) == paramdelta.Network(2 * BYTES, None, None)
    assert paramdelta.network_of(plan, "1kB").seconds == 2 * BYTES / 1000
    local = paramdelta.plan(triple / "org/post", triple / "org/base", triple / "org/new")
    assert paramdelta.network_of(local, "1kB") == paramdelta.Network(0, None, None)
    with pytest.raises(RecipeError, match="bandwidth"):
        paramdelta.network_of(plan, "fast")


def test_the_bandwidth_is_measured_with_the_files_themselves(
    web: FileServer, triple: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paramdelta.storage.remote.speed.measure.__defaults__", (0.2,))
    plan = paramdelta.plan(f"{web.url}/org/post", triple / "org/base", triple / "org/new")
    found = paramdelta.network_of(plan, "measure")
    assert found.bandwidth is not None
    assert found.seconds == pytest.approx(BYTES / found.bandwidth)
    assert max(request.size for request in web.seen) > 100_000  # not from headers alone


def test_the_command_says_for_how_long(web: FileServer, triple: Path) -> None:
    roles = (("post", f"{web.url}/org/post"), ("base", f"{triple}/org/base"), ("new-base", f"{triple}/org/new"))
    arguments = ["plan", *(f"--{role}={place}" for role, place in roles), "--bandwidth", "1kB"]
    text = CliRunner().invoke(commands, arguments).stdout
    assert "come over the network: 0:05:07 at 1 kB/s" in " ".join(text.split())
    told = json.loads(CliRunner().invoke(commands, [*arguments, "--json"]).stdout)
    assert told["network"] == {"bytes": BYTES, "bandwidth": 1000.0, "seconds": BYTES / 1000}
