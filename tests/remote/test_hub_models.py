"""The Hub as its own client sees it: revisions, redirects, tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import paramdelta
from paramdelta.errors import FetchError, InputChangedError
from tests.remote.conftest import same_weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import HubServer

ROLES = ("post", "base", "new")


def merge(output: Path, **options: object) -> paramdelta.MergeResult:
    return paramdelta.merge(*(f"org/{role}" for role in ROLES), output, **options)  # type: ignore[arg-type,call-arg]


def test_models_are_read_by_name_and_the_token_stays_with_the_hub(
    hub: HubServer, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    hub.gated = {f"org/{role}": "hf_hunter2" for role in ROLES}
    merge(tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")
    assert not hub.leaked
    assert not (tmp_path / "cache").exists()
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"hunter2" not in written
    assert b"signature=" not in written


def test_signed_addresses_are_asked_for_again_when_they_expire(
    hub: HubServer, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.uses_of_signature = 2
    merge(tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")


def test_a_file_is_looked_for_once_however_many_ranges_are_wanted(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub limits how often it is asked; its storage does not."""
    monkeypatch.chdir(tmp_path)
    merge(tmp_path / "out")
    asked = [
        request.path
        for request in hub.seen
        if request.path.endswith("base/resolve/" + hub.commit + "/model.safetensors")
    ]
    assert 0 < len(asked) <= 2  # for its header, and for its tensors


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hf://org/nothing", "is not there, or is private (HTTP 401), and no token"),
        ("hf://org/post@nothing", "has no such revision (HTTP 404)"),
        ("org/post@nothing", "has no such revision (HTTP 404)"),
    ],
)
def test_what_is_not_there(model: str, message: str, hub: HubServer) -> None:  # noqa: ARG001
    with pytest.raises(FetchError) as caught:
        paramdelta.inspect(model)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "is gated (HTTP 401), and no token"), ("hf_hunter2", "is gated (HTTP 403), and the token of HF_TOKEN")],
)
def test_a_gated_model_says_which_token_does_not_open_it(
    token: str | None, message: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated["org/post"] = "hf_another"
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(FetchError) as caught:
        paramdelta.inspect("hf://org/post")
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "terms" in str(caught.value)


def test_an_address_that_is_signed_is_never_shown(hub: HubServer) -> None:
    def round_and_round(handler: Any, request: Any) -> None:
        handler.refuse(302, {"Location": f"{hub.storage.url}{request.path}"})

    hub.storage.answer = round_and_round  # type: ignore[method-assign]
    with pytest.raises(FetchError, match="redirects") as caught:
        paramdelta.inspect("hf://org/base")
    told = "".join(traceback.format_exception(caught.value)) + json.dumps(caught.value.to_json())
    assert "secret" not in told
    assert str(caught.value.file).startswith("hf://org/base@")


@pytest.mark.skipif(huggingface_hub.__version__.startswith("0."), reason="older clients let .netrc displace the token")
def test_a_token_and_a_netrc_go_together(
    hub: HubServer, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "netrc").write_text("default login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_hunter3")
    hub.gated = {f"org/{role}": "hf_hunter3" for role in ROLES}
    merge(tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")
    assert not hub.leaked


@pytest.mark.parametrize("name", ["hf://org/a--b", "hf://org/a.git"])
def test_a_name_that_the_hub_does_not_take_is_no_bug(name: str, hub: HubServer) -> None:  # noqa: ARG001
    with pytest.raises(FetchError, match="no name"):
        paramdelta.inspect(name)


def test_a_single_file_of_a_commit_is_taken_from_the_cache_too(hub: HubServer, tmp_path: Path, triple: Path) -> None:
    snapshot = tmp_path / f"cache/models--org--base/snapshots/{hub.commit}"
    shutil.copytree(triple / "org/base", snapshot)
    address = f"hf://org/base@{hub.commit}/model.safetensors"
    assert paramdelta.inspect(address).shards[0].path == snapshot / "model.safetensors"
    assert not hub.seen


def test_a_client_that_is_told_to_stay_offline_does(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        paramdelta.inspect("hf://org/post")
    assert not hub.seen


def test_an_unfinished_download_is_not_taken_for_the_model(hub: HubServer, tmp_path: Path, triple: Path) -> None:
    """What the cache has only in part is read from the Hub; what it has whole is not."""
    snapshot = tmp_path / f"cache/models--org--post/snapshots/{hub.commit}"
    shutil.copytree(triple / "org/post", snapshot)
    (tmp_path / "cache/models--org--post/refs").mkdir()
    (tmp_path / "cache/models--org--post/refs/main").write_text(hub.commit)
    assert paramdelta.inspect("hf://org/post").root == snapshot
    assert not hub.seen
    next(snapshot.glob("*.safetensors")).unlink()
    assert str(paramdelta.inspect("hf://org/post").root) == f"hf://org/post@{hub.commit}"


def test_a_busy_hub_is_asked_again(
    hub: HubServer, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.script.once("503", times=3, first=0)
    merge(tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")


def test_other_bytes_at_the_same_commit_are_noticed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = paramdelta.plan(*(f"org/{role}" for role in ROLES))
    hub.tags["org/base/model.safetensors"] = "another"
    from paramdelta.engine.inputs import Inputs
    from paramdelta.storage.pages import Buffer

    [place] = [place for place, file in enumerate(plan.files) if "/base@" in file.path]
    source = Inputs(plan.files, "auto").source(place)
    loan = source.borrow(0, 100, Buffer(4096).view)
    with pytest.raises(InputChangedError):
        source.await_range(loan)


def test_the_program_reads_from_the_endpoint_of_the_environment(hub: HubServer, merged: Path, tmp_path: Path) -> None:
    arguments = [
        f"--{role}=hf://org/{place}" for role, place in (("post", "post"), ("base", "base"), ("new-base", "new"))
    ]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "paramdelta", "merge", *arguments, "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert same_weights(merged, tmp_path / "out")
