"""Starts one command and writes what it cost: `shim.py RESULTS OUTPUT TIMEOUT COMMAND...`.

Small on purpose: a child's `ru_maxrss` starts at the size of the process that forks it. Nothing is imported that the
job does not need.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

POLL_SECONDS = 0.05


def children(pid: int) -> list[int]:
    """List the processes that a process has started and that still live."""
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, tasks.read_text().split())
    return found


def high_water_mark(pid: int) -> int:
    """Return a process's peak RSS so far in bytes, 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def memory_use() -> dict[str, int]:
    """Return what the whole system uses its memory for, in bytes, by the names in /proc/meminfo."""
    return parse_memory(Path("/proc/meminfo").read_text())


def parse_memory(text: str) -> dict[str, int]:
    """Read the lines that are given in kB."""
    lines = [line.split() for line in text.splitlines() if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in lines}


def to_be_written() -> int:
    """Return the bytes that the system still has to write, or is writing."""
    use = memory_use()
    return use["Dirty"] + use["Writeback"]


def device_reads() -> int | None:
    """Return the bytes that this process and the ones it has waited for had fetched from devices, None if not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


class Watch:
    """What has been seen of a tree of processes and of the system while it ran, at most `POLL_SECONDS` ago."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.peaks: dict[int, int] = {}  # RSS by process
        self.dirty_peak = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.look)

    def look(self) -> None:
        """Keep the largest values until told to stop."""
        while not self.stop.wait(POLL_SECONDS):
            self.dirty_peak = max(self.dirty_peak, to_be_written())
            todo = [self.root]
            while todo:
                pid = todo.pop()
                self.peaks[pid] = max(self.peaks.get(pid, 0), high_water_mark(pid))
                todo += children(pid)

    def end(self) -> None:
        """Stop looking."""
        self.stop.set()
        self.thread.join()


def make_durable(directory: Path) -> None:
    """Sync every file below the directory, and the directories themselves; quick where that has been done."""
    for folder, _, files in os.walk(directory):
        for path in [*(Path(folder, name) for name in files), Path(folder)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def tree_peak(peaks: dict[int, int], largest: int) -> int:
    """Return the sum of the processes' peaks, given the exact peak of the largest one."""
    return largest + sum(sorted(peaks.values())[:-1])


def main(results: Path, output: Path | None, timeout: float, command: list[str]) -> None:
    """Run the command, wait, and write the results."""
    cached, fetched = memory_use()["Cached"], device_reads()
    start = time.perf_counter()
    try:
        pid = os.posix_spawnp(command[0], command, os.environ, setpgroup=0)
    except OSError as error:
        sys.exit(f"could not be started: {error}")
    watch = Watch(pid)
    killer = threading.Timer(timeout, os.killpg, (pid, signal.SIGKILL))
    watch.thread.start()
    killer.start()
    _, status, usage = os.wait4(pid, 0)
    ended = time.perf_counter()
    killer.cancel()
    if output is not None and output.exists():
        make_durable(output)
    durable = time.perf_counter()
    watch.end()
    now_fetched = device_reads()
    costs = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall_seconds": durable - start,
        "sync_seconds": durable - ended,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        # ru_maxrss is the largest process of the tree, exactly; the others are as polling last saw them.
        "peak_rss_bytes": tree_peak(watch.peaks, usage.ru_maxrss * 1024),
        "processes": max(1, len(watch.peaks)),
        "major_faults": usage.ru_majflt,
        "dirty_peak_bytes": watch.dirty_peak,
        "cached_growth_bytes": memory_use()["Cached"] - cached,
        "device_read_bytes": None if fetched is None or now_fetched is None else now_fetched - fetched,
    }
    results.write_text(json.dumps(costs))


if __name__ == "__main__":
    _, results_path, output_path, seconds, *words = sys.argv
    main(Path(results_path), Path(output_path) if output_path else None, float(seconds), words)
