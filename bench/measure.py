"""Runs a command as a whole process and says what it cost.

The peak RSS is the kernel's own high-water mark, not a sample. `ru_maxrss` of a child starts at the size of the process
that forked it, so a large benchmark runner would lend its own size to small contenders; therefore each command is
started by `shim.py`, a fresh interpreter of some 10 MB, which is less than any contender needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SHIM = Path(__file__).with_name("shim.py")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
READ_SIZE = 16 << 20


@dataclass(frozen=True)
class Measurement:
    """What one run of a command cost, all of its processes included."""

    exit_code: int
    wall_seconds: float
    sync_seconds: float  # the part of the wall time spent making the output durable after the command's end
    cpu_seconds: float
    peak_rss_bytes: int  # the sum of the processes' own peaks, so an upper bound where there are several
    processes: int
    major_faults: int
    stdout: str
    stderr: str
    dirty_peak_bytes: int = 0  # of the whole system: written to the page cache, not yet to the device
    cached_growth_bytes: int = 0  # of the whole system's page cache, from the start until the output is durable
    device_read_bytes: int | None = None  # None where the system does not tell

    @property
    def ok(self) -> bool:
        """Tell whether the command succeeded."""
        return self.exit_code == 0

    def last_words(self, lines: int = 5) -> str:
        """Return the end of what it wrote to stderr: usually why it failed."""
        return "\n".join(self.stderr.replace("\r", "\n").strip().splitlines()[-lines:])


def measure(
    command: Sequence[str],
    *,
    output: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 1800,
) -> Measurement:
    """Run the command and wait for it; with `output`, the time until that directory is durable counts too."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "results.json")
        shim = [sys.executable, "-I", "-S", str(SHIM), str(results), str(output or ""), str(timeout), *command]
        done = subprocess.run(
            shim,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, **(environment or {})},
        )
        if not results.is_file():  # the command could not even be started
            return Measurement(127, 0.0, 0.0, 0.0, 0, 0, 0, done.stdout, done.stderr)
        costs = json.loads(results.read_text())
    return Measurement(stdout=done.stdout, stderr=done.stderr, **costs)


def drop_caches() -> bool:
    """Empty the page cache, so that the next run reads from the device. False where that is not permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def warm(paths: Iterable[Path], share: float = 1.0) -> None:
    """Read the files once, or the first part of each, so that the next run finds that in the page cache."""
    buffer = memoryview(bytearray(READ_SIZE))
    for path in paths:
        left = round(path.stat().st_size * share)
        with path.open("rb", buffering=0) as file:
            while left > 0 and (count := file.readinto(buffer[:left])):
                left -= count
