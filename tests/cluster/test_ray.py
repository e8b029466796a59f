"""A Ray cluster of several nodes, each with processes of its own, on this machine (`make cluster`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import paramdelta
from tests.make import normal, write_checkpoint
from tests.servers import FileServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.cluster

SHARDS = 6
STAGING = ".paramdelta"


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triple")
    for seed, role in enumerate(("post", "base", "new")):
        tensors = {f"t{n}": normal((4_000_000,), seed=100 * seed + n) for n in range(SHARDS)}
        folder = write_checkpoint(root / role, tensors, shards=SHARDS)
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return root


@pytest.fixture(scope="module")
def whole(triple: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    paramdelta.merge(triple / "post", triple / "base", triple / "new", output)
    return output


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs no tasks, and two nodes with a processor each."""
    utilities = pytest.importorskip("ray.cluster_utils")
    made = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


def start(triple: Path | str, output: Path, address: str | None) -> subprocess.Popen[str]:
    roles = (("post", "post"), ("base", "base"), ("new-base", "new"))
    inputs = [f"--{role}={triple}/{name}" for role, name in roles]
    command = [sys.executable, "-m", "paramdelta", "merge", *inputs, "-o", str(output), "--engine", "ray", "--json"]
    command += ["--memory", "400MB", *(["--address", address] if address else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(run: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stdout + stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def same_weights(one: Path, other: Path) -> bool:
    names = {path.name for path in one.glob("*.safetensors*")} | {"config.json", "README.md"}
    return len(names) > SHARDS and all((one / n).read_bytes() == (other / n).read_bytes() for n in names)


def workers() -> list[psutil.Process]:
    """Return the processes that make a shard right now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any("paramdelta-shard" in word or "_make_shard" in word for word in process.cmdline()):
                found.append(process)
    return found


def wait_for(holds: Callable[[], Any]) -> Any:
    end_of_patience = time.monotonic() + 120
    while not (found := holds()):
        assert time.monotonic() < end_of_patience
        time.sleep(0.01)
    return found


def records(output: Path) -> list[Path]:
    return list((output / STAGING).glob("*.record"))


def test_a_cluster_writes_what_one_machine_writes(cluster: Any, triple: Path, whole: Path, tmp_path: Path) -> None:
    result = end(start(triple, tmp_path / "out", cluster.address))
    assert result["shards"] == SHARDS
    assert same_weights(whole, tmp_path / "out")
    assert paramdelta.verify(tmp_path / "out", recompute=True).ok
    again = end(start(triple, tmp_path / "out", cluster.address))
    assert again["already_complete"]


def test_inputs_may_be_read_where_they_are(cluster: Any, triple: Path, whole: Path, tmp_path: Path) -> None:
    with FileServer(triple) as server:
        end(start(server.url, tmp_path / "out", cluster.address))
    assert same_weights(whole, tmp_path / "out")


def test_a_worker_that_is_killed_costs_its_shard(cluster: Any, triple: Path, whole: Path, tmp_path: Path) -> None:
    run = start(triple, tmp_path / "out", cluster.address)
    wait_for(lambda: records(tmp_path / "out"))
    victim = wait_for(workers)[0]
    os.kill(victim.pid, signal.SIGKILL)
    end(run)
    assert same_weights(whole, tmp_path / "out")


def test_a_node_that_is_killed_costs_its_shard(cluster: Any, triple: Path, whole: Path, tmp_path: Path) -> None:
    run = start(triple, tmp_path / "out", cluster.address)
    wait_for(lambda: records(tmp_path / "out"))
    cluster.remove_node(cluster.nodes[0], allow_graceful=False)
    end(run)
    assert same_weights(whole, tmp_path / "out")


def test_a_driver_that_is_killed_goes_on(cluster: Any, triple: Path, whole: Path, tmp_path: Path) -> None:
    run = start(triple, tmp_path / "out", cluster.address)
    wait_for(lambda: records(tmp_path / "out"))
    run.kill()
    run.communicate()
    made = len(records(tmp_path / "out"))
    assert 0 < made < SHARDS
    result = end(start(triple, tmp_path / "out", cluster.address))
    assert result["resumed_shards"] == SHARDS
    assert same_weights(whole, tmp_path / "out")


def test_what_is_wrong_is_told_as_by_a_merge_of_its_own(cluster: Any, triple: Path, tmp_path: Path) -> None:
    run = start(triple, tmp_path / "file/out", cluster.address)
    (tmp_path / "file").write_text("in the way")
    stdout, _ = run.communicate(timeout=120)
    assert run.returncode == 5
    assert json.loads(stdout)["error"]["type"] == "OutputError"
    run = start(tmp_path / "missing", tmp_path / "out", cluster.address)
    assert run.wait(timeout=120) == 3
    run.communicate()
