"""A triple on this machine, and the same on servers of every kind."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants, file_download

import paramdelta
from paramdelta.storage.remote import retries
from tests.make import normal, write_checkpoint
from tests.servers import FileServer, HubServer, Relay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPES = {f"layer.{number}.weight": (128, 200) for number in range(6)} | {"norm.weight": (77,)}
SHARDS = {"post": 2, "base": 1, "new": 3}


PATIENCE = retries.Patience


def impatient(monkeypatch: pytest.MonkeyPatch, stall: float) -> None:
    """Wait hardly at all between tries, and so many seconds for an answer."""
    monkeypatch.setattr(retries, "Patience", functools.partial(PATIENCE, first=0.01, stall=stall))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait little between tries; and take no token or credential of whoever runs the tests."""
    impatient(monkeypatch, stall=20.0)  # a busy machine is slow to answer
    for name in [*os.environ]:
        if name.startswith(("AWS_", "FSSPEC_", "HF_", "HUGGING_FACE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")


@pytest.fixture(scope="session")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with org/post, org/base and org/new."""
    root = tmp_path_factory.mktemp("triple")
    for seed, (role, shards) in enumerate(SHARDS.items()):
        tensors = {name: normal(shape, seed=100 * seed + place) for place, (name, shape) in enumerate(SHAPES.items())}
        folder = write_checkpoint(root / "org" / role, tensors, shards=shards)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "tokenizer.model").write_bytes(b"as all three have it")
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 100}')
    return root


@pytest.fixture(scope="session")
def merged(triple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a merge of local files gives."""
    output = tmp_path_factory.mktemp("merged") / "out"
    paramdelta.merge(triple / "org/post", triple / "org/base", triple / "org/new", output)
    return output


@pytest.fixture
def web(triple: Path) -> Iterator[FileServer]:
    """A web server with the triple."""
    with FileServer(triple) as server:
        yield server


@pytest.fixture
def hub(triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the triple, and no cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with FileServer(triple) as storage, HubServer(triple, storage) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # old clients have it in both
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template, raising=False)
        yield server


@pytest.fixture(scope="session")
def moto(triple: Path) -> Iterator[str]:
    """An S3 server with the triple in the bucket ``org``."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    client.create_bucket(Bucket="org")
    for path in sorted((triple / "org").rglob("*.*")):
        client.put_object(Bucket="org", Key=path.relative_to(triple / "org").as_posix(), Body=path.read_bytes())
    yield url
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """The S3 server, through what can make its answers go wrong."""
    import s3fs

    with Relay(moto) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield relay
        s3fs.S3FileSystem.clear_instance_cache()


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two outputs have the same weights, sidecars and index, byte for byte."""
    names = {path.name for path in one.iterdir() if path.suffix == ".safetensors" or "config" in path.name}
    names |= {path.name for path in one.glob("*.index.json")}
    return len(names) > 3 and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
