"""Web servers, and all that goes wrong with them."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

import pytest

import paramdelta
from paramdelta.errors import CancelledError, CheckpointError, FetchError, InputChangedError, RecipeError
from tests.make import normal, write_checkpoint
from tests.remote.conftest import impatient, same_weights
from tests.servers import FileServer, Request

if TYPE_CHECKING:
    from pathlib import Path


def merge(web: FileServer, output: Path, **options: object) -> paramdelta.MergeResult:
    inputs = (f"{web.url}/org/{role}" for role in ("post", "base", "new"))
    return paramdelta.merge(*inputs, output, **options)  # type: ignore[arg-type,call-arg]


@pytest.mark.parametrize("fault", ["reset", "short", "stall", "503", "500", "429:0.1", "408"])
def test_what_goes_wrong_for_a_while_is_asked_for_again(
    fault: str, web: FileServer, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        impatient(monkeypatch, stall=1.0)
    web.script.once(fault, times=3)
    merge(web, tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")


def test_only_what_is_missing_is_asked_for_again(web: FileServer, tmp_path: Path) -> None:
    web.script.once("short")
    merge(web, tmp_path / "out")
    large = [request for request in web.seen if request.begin]
    [again] = [r for r in web.seen if any(r.path == o.path and r.end == o.end and r.begin > o.begin for o in large)]
    [first] = [r for r in large if r.path == again.path and r.end == again.end and r is not again]
    assert again.begin == first.begin + first.size // 2


def test_a_server_is_left_alone_for_as_long_as_it_asks(web: FileServer) -> None:
    times: list[float] = []

    def choose(request: object) -> str | None:  # noqa: ARG001
        times.append(time.monotonic())
        return "429:0.7" if len(times) == 1 else None

    web.script.choose = choose
    paramdelta.inspect(f"{web.url}/org/base/model.safetensors")
    assert len(times) > 1
    assert any(later - times[0] >= 0.7 for later in times[1:])


def test_what_goes_wrong_for_good_is_given_up_and_resumed(web: FileServer, merged: Path, tmp_path: Path) -> None:
    """A dropped network ends the run; the same command goes on behind its last finished shard."""
    last = sorted((web.root / "org/new").glob("*.safetensors"))[-1].name
    web.script.choose = lambda request: "503" if request.begin and request.path.endswith(last) else None
    with pytest.raises(FetchError, match="10 times in a row") as caught:
        merge(web, tmp_path / "out", workers=1)
    assert "2 of 3 shards are finished and kept" in str(caught.value)
    web.script.choose = lambda _: None
    assert merge(web, tmp_path / "out").resumed_shards == 2
    assert same_weights(merged, tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignore-range", "ignores Range"),
        ("gzip", "compresses"),
        ("other-range", "another range"),
        ("401", "needs credentials (HTTP 401)"),
        ("403", "may not be read (HTTP 403)"),
        ("404", "not there (HTTP 404)"),
        ("400", "HTTP 400"),
    ],
)
def test_what_no_repetition_mends_is_told_at_once(fault: str, message: str, web: FileServer, tmp_path: Path) -> None:
    web.script.once(fault)
    with pytest.raises(FetchError) as caught:
        merge(web, tmp_path / "out")
    assert message in str(caught.value)
    assert caught.value.exit_code == 3
    assert str(caught.value.file).startswith(f"{web.url}/org/")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_read_is_noticed(web: FileServer, tmp_path: Path) -> None:
    def choose(request: Request) -> None:
        if request.begin and request.path.endswith("base/model.safetensors"):
            web.tags[request.path.lstrip("/")] = "another"

    web.script.choose = choose
    with pytest.raises(InputChangedError, match="another") as caught:
        merge(web, tmp_path / "out")
    assert caught.value.exit_code == 6


def test_servers_without_tags_are_told_apart_by_size_alone(web: FileServer, merged: Path, tmp_path: Path) -> None:
    web.tags = {path.relative_to(web.root).as_posix(): None for path in web.root.rglob("*.*")}
    merge(web, tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")


def test_credentials_in_an_address_are_refused_and_not_repeated(web: FileServer) -> None:
    for address in (
        "http://me:hunter2@host/model",
        "https://host/model.safetensors?token=hunter2",
        "s3://k:hunter2@b/m",
    ):
        with pytest.raises(RecipeError) as caught:
            paramdelta.plan(address, f"{web.url}/org/base", f"{web.url}/org/new")
        assert "hunter2" not in str(caught.value)


def test_credentials_come_from_netrc(
    web: FileServer, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    web.required = lambda request: None if request.headers.get("authorization", "").startswith("Basic ") else 401
    with pytest.raises(FetchError, match="netrc"):
        merge(web, tmp_path / "out")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    merge(web, tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")
    assert not any("hunter2" in path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())


def test_redirects_are_followed(web: FileServer, merged: Path, tmp_path: Path) -> None:
    class Redirecting(FileServer):
        def answer(self, handler: object, request: object) -> None:
            handler.refuse(307, {"Location": f"{web.url}{request.path}"})  # type: ignore[attr-defined]

    with Redirecting(web.root) as first:
        merge(first, tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")


def test_what_is_not_there_is_an_error_like_that_of_a_path(web: FileServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        paramdelta.inspect(f"{web.url}/org/nothing")
    with pytest.raises(CheckpointError, match="no such file"):
        paramdelta.inspect(f"{web.url}/org/post/nothing.safetensors")
    with pytest.raises(FetchError, match="in a row"):
        paramdelta.inspect("http://127.0.0.1:9/model")
    (tmp_path / "model").mkdir()


def test_nothing_waits_for_a_server_once_a_run_is_cancelled(web: FileServer, tmp_path: Path) -> None:
    cancelled = threading.Event()
    web.script.choose = lambda request: "stall" if request.begin else None
    threading.Timer(0.5, cancelled.set).start()
    begin = time.monotonic()
    with pytest.raises(CancelledError):
        merge(web, tmp_path / "out", cancelled=cancelled)
    assert time.monotonic() - begin < 30


def test_requests_are_under_way_at_the_same_time(web: FileServer, merged: Path, tmp_path: Path) -> None:
    """What is asked for in a window is asked for at once, and windows do not wait for each other."""
    web.script.latency = 0.2
    merge(web, tmp_path / "out")
    assert same_weights(merged, tmp_path / "out")
    assert web.script.most > 3  # of three windows with three inputs or more each


def test_a_file_of_which_nobody_can_tell_whose_it_is_is_no_reason_to_leave_its_sidecars(
    web: FileServer, triple: Path, tmp_path: Path
) -> None:
    """A single file has the config beside it if it is the model: a server that answers strangely does not say."""
    web.script.choose = lambda request: "400" if request.path.endswith("index.json") else None
    with pytest.raises(FetchError, match="400"):
        paramdelta.merge(
            triple / "org/post", triple / "org/base", f"{web.url}/org/base/model.safetensors", tmp_path / "out"
        )


def test_code_that_the_config_names_is_found_where_nothing_can_be_listed(tmp_path: Path) -> None:
    for role in ("post", "base", "new"):
        folder = write_checkpoint(tmp_path / role, {"w": normal((8,))})
        modules = {"AutoModel": "modeling_x.Model", "AutoTokenizer": ["x--tok_y.T", None]}
        (folder / "config.json").write_text(json.dumps({"auto_map": modules}))
        for name in ("modeling_x.py", "tok_y.py"):
            (folder / name).write_text(f"# {role}")
    with FileServer(tmp_path) as server:
        places = [f"{server.url}/{role}" for role in ("post", "base", "new")]
        paramdelta.merge(places[0], places[1], places[2], tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "out/modeling_x.py").read_text() == "# new"
    assert (tmp_path / "out/tok_y.py").exists()


def test_a_server_that_is_dead_does_not_keep_a_run_from_stopping_while_it_plans(
    web: FileServer, tmp_path: Path
) -> None:
    cancelled = threading.Event()
    web.script.latency = 10
    threading.Timer(0.5, cancelled.set).start()
    begin = time.monotonic()
    with pytest.raises(CancelledError):
        merge(web, tmp_path / "out", cancelled=cancelled)
    assert time.monotonic() - begin < 8
