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


def watch_tree(root: int, peaks: dict[int, int], stop: threading.Event) -> None:
    """Keep the largest peak seen of a process and of each of its descendants until told to stop."""
    while not stop.wait(POLL_SECONDS):
        todo = [root]
        while todo:
            pid = todo.pop()
            peaks[pid] = max(peaks.get(pid, 0), high_water_mark(pid))
            todo += children(pid)


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
    peaks: dict[int, int] = {}
    stop = threading.Event()
    start = time.perf_counter()
    try:
        pid = os.posix_spawnp(command[0], command, os.environ, setpgroup=0)
    except OSError as error:
        sys.exit(f"could not be started: {error}")
    watcher = threading.Thread(target=watch_tree, args=(pid, peaks, stop))
    killer = threading.Timer(timeout, os.killpg, (pid, signal.SIGKILL))
    watcher.start()
    killer.start()
    _, status, usage = os.wait4(pid, 0)
    ended = time.perf_counter()
    killer.cancel()
    if output is not None and output.exists():
        make_durable(output)
    durable = time.perf_counter()
    stop.set()
    watcher.join()
    costs = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall_seconds": durable - start,
        "sync_seconds": durable - ended,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        # ru_maxrss is the largest process of the tree, exactly; the others are as polling last saw them.
        "peak_rss_bytes": tree_peak(peaks, usage.ru_maxrss * 1024),
        "processes": max(1, len(peaks)),
        "major_faults": usage.ru_majflt,
    }
    results.write_text(json.dumps(costs))


if __name__ == "__main__":
    _, results_path, output_path, seconds, *words = sys.argv
    main(Path(results_path), Path(output_path) if output_path else None, float(seconds), words)
