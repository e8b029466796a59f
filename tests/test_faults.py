from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").is_dir(), reason="needs fork and /proc")
def test_faults_at_some_of_the_steps_leave_nothing_broken() -> None:
    """A part of `make faults`, in a process of its own: a fork of one with threads is no good ground."""
    run = subprocess.run([sys.executable, "-m", "tests.faults", "17", "4"], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"\*\*([\d,]+) cases, (\d+) of them wrong", run.stdout)
    assert found is not None, run.stderr
    assert run.returncode == 0, run.stdout
    assert int(found[1].replace(",", "")) > 100
