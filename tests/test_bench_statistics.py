"""How the benchmark of the statistics counts, and that its stand-ins do the same arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import statistics_cost
from bench.statistics_cost import WITH, WITHOUT, Sample, Speed

import paramdelta
from tests.make import normal, write_checkpoint

ROOT = Path(__file__).parent.parent
MACHINE = {"CPU": "a CPU", "cores": "2", "RAM": "24 GiB", "kernel": "Linux 6", "filesystem": "ext4"}


def test_ratios_are_those_of_a_round() -> None:
    seconds = {WITH: (1.1, 3.3, 2.0), WITHOUT: (1.0, 3.0, 2.0)}
    samples = [
        Sample(player, "warm", number, taken, 0.5)
        for player, runs in seconds.items()
        for number, taken in enumerate(runs)
    ]
    speeds = [Speed(player, 0, "BF16 weights", 2, 20.0, 0.8) for player in (WITH, WITHOUT)]
    content = {**MACHINE, "rounds": 3, "model": "mini", "tensor_bytes": 10**9}
    page = statistics_cost.render(samples, speeds, content)
    assert "| warm, with statistics | 2.00 | 1.10 - 3.30 | 1.100 | 0.50 |" in page
    assert "| BF16 weights | 2 | 20.0 | 0.80 | 20.0 | 0.80 |" in page


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loops that add nothing up."""
    directory = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "bench.bare", str(directory)], check=True, cwd=ROOT)
    return directory


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_without_statistics_the_output_is_the_same(bare: Path, tmp_path: Path, dtype: str) -> None:
    """The same program, with other loops: in a process of its own, since loops are linked once."""
    for seed, role in enumerate(("post", "base", "new_base")):
        write_checkpoint(tmp_path / role, {"w": normal((301, 77), dtype, seed=seed)})
    paramdelta.merge(tmp_path / "post", tmp_path / "base", tmp_path / "new_base", tmp_path / "with")
    command = [sys.executable, "-m", "paramdelta", "merge", "--quiet", "-o", str(tmp_path / "without")]
    command += [f"--{role}={tmp_path / role.replace('-', '_')}" for role in ("post", "base", "new-base")]
    environment = {**os.environ, "PARAMDELTA_CACHE_DIR": str(bare)}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert "0.0% of elements changed" in done.stdout
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert found[0] == found[1]
