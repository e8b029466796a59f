"""The same bytes, wherever inputs lie."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest

import paramdelta
from paramdelta.errors import InputChangedError
from tests.remote.conftest import same_weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import FileServer, HubServer, Relay

KINDS = ("local", "http", "hf", "s3")
MIXES = [(kind,) * 3 for kind in KINDS[1:]] + [*itertools.permutations(KINDS, 3)][::3]


@pytest.fixture
def places(triple: Path, web: FileServer, hub: HubServer, s3: Relay) -> dict[str, str]:  # noqa: ARG001
    """Where each kind of place has the triple."""
    return {"local": f"{triple}/org", "http": f"{web.url}/org", "hf": "hf://org", "s3": "s3://org"}


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_every_mix_of_places_gives_the_same_bytes(
    mix: tuple[str, str, str], places: dict[str, str], merged: Path, tmp_path: Path
) -> None:
    post, base, new = (f"{places[kind]}/{role}" for kind, role in zip(mix, ("post", "base", "new"), strict=True))
    result = paramdelta.merge(post, base, new, tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")
    assert "remote" in result.io
    assert paramdelta.verify(tmp_path / "out").ok


def test_a_plan_of_remote_inputs_is_the_same_after_a_round_trip(places: dict[str, str]) -> None:
    plan = paramdelta.plan(f"{places['hf']}/post", f"{places['s3']}/base", f"{places['hf']}/new")
    assert "tokenizer.model" in [car.name for car in plan.sidecars]
    assert paramdelta.Plan.from_json(json.loads(json.dumps(plan.to_json()))).fingerprint == plan.fingerprint


def test_an_output_is_recomputed_from_where_its_inputs_are(
    places: dict[str, str], hub: HubServer, tmp_path: Path
) -> None:
    """The recipe in the output has the commit that was read, whatever the branch is now."""
    paramdelta.merge(f"{places['hf']}/post", f"{places['s3']}/base", f"{places['http']}/new", tmp_path / "out")
    hub.revisions["main"] = "f" * 40
    assert f"hf://org/post@{hub.commit}" in (tmp_path / "out/recipe.yaml").read_text()
    found = paramdelta.verify(tmp_path / "out", recompute=True)
    assert found.ok
    assert found.recomputed > 0


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_output_names_its_inputs_and_no_address(
    kind: str, places: dict[str, str], tmp_path: Path, hub: HubServer
) -> None:
    place = places[kind]
    paramdelta.merge(f"{place}/post", f"{place}/base", f"{place}/new", tmp_path / "out")
    receipt = json.loads((tmp_path / "out/paramdelta.json").read_text())
    name = f"org/post@{hub.commit}" if kind == "hf" else "post"
    assert [each["name"] for each in receipt["inputs"] if each["role"] == "post"] == [name]
    for name in ("README.md", "paramdelta.json", "config.json"):
        assert "127.0.0.1" not in (tmp_path / "out" / name).read_text()


def test_what_else_fsspec_knows_is_read_too(
    triple: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{triple}/org", "/org", recursive=True)
    try:
        paramdelta.merge("memory://org/post", "memory://org/base", triple / "org/new", tmp_path / "out")
        assert same_weights(merged, tmp_path / "out")
        plan = paramdelta.plan("memory://org/post", "memory://org/base", triple / "org/new")
        memory.pipe_file("/org/base/model.safetensors", (triple / "org/base/model.safetensors").read_bytes())
        monkeypatch.setattr("paramdelta.merging.make_plans", lambda _: [plan])
        with pytest.raises(InputChangedError):
            paramdelta.merge("memory://org/post", "memory://org/base", triple / "org/new", tmp_path / "other")
    finally:
        memory.rm("/org", recursive=True)


def test_single_files_are_read_too(places: dict[str, str], tmp_path: Path, triple: Path) -> None:
    files = [f"{places[kind]}/base/model.safetensors" for kind in ("http", "s3", "hf")]
    result = paramdelta.merge(files[0], files[1], triple / "org/base", tmp_path / "out")
    assert result.tensors == 7
    assert (tmp_path / "out/model.safetensors").read_bytes()[-1000:] == (
        triple / "org/base/model.safetensors"
    ).read_bytes()[-1000:]
