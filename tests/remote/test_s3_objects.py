"""S3: moto's server through s3fs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import botocore.session
import pytest

import paramdelta
from paramdelta.errors import CheckpointError, FetchError, InputChangedError
from tests.remote.conftest import impatient, same_weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Relay, Request


def merge(output: Path, **options: object) -> paramdelta.MergeResult:
    return paramdelta.merge("s3://org/post", "s3://org/base/", "s3://org/new", output, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["reset", "short", "stall", "503", "429:0.1"])
def test_what_goes_wrong_for_a_while_is_asked_for_again(
    fault: str, s3: Relay, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        impatient(monkeypatch, stall=1.0)
    s3.script.once(fault, times=3)
    merge(tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")


def test_an_object_that_is_replaced_is_noticed(s3: Relay, moto: str, tmp_path: Path, triple: Path) -> None:
    client = botocore.session.Session().create_client(
        "s3", endpoint_url=moto, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    content = (triple / "org/base/model.safetensors").read_bytes()

    replaced: list[Request] = []

    def choose(request: Request) -> None:
        if not request.begin or not request.path.endswith("base/model.safetensors"):
            return
        with s3.script.lock:
            replaced.append(request)
            is_first = len(replaced) == 1
        if is_first:  # another might come when the object is itself again
            client.put_object(Bucket="org", Key="base/model.safetensors", Body=content[:-1] + b"x")

    s3.script.choose = choose
    try:
        with pytest.raises(InputChangedError, match="changed since the merge was planned"):
            merge(tmp_path / "out")
    finally:
        client.put_object(Bucket="org", Key="base/model.safetensors", Body=content)


def test_a_refusal_names_where_credentials_are_looked_for(s3: Relay, tmp_path: Path) -> None:
    s3.required = lambda _: 403
    with pytest.raises(FetchError, match="AWS_") as caught:
        merge(tmp_path / "out")
    assert "HTTP 403" in str(caught.value)
    assert "very-secret" not in str(caught.value)


def test_what_is_not_there(s3: Relay) -> None:  # noqa: ARG001
    with pytest.raises(CheckpointError):
        paramdelta.inspect("s3://org/nothing")
    with pytest.raises(CheckpointError):
        paramdelta.inspect("s3://nothing/nothing")
