"""The device's floor: how long a merge's traffic takes without a merge. `python -m bench.floor INPUT... -o DIR`.

Reads all inputs and writes as much as one of them at the same time, synced at the end. In several ways, because none is
always the fastest one: past the page cache with fio (libaio) where installed and with a loop of threads here, and the
same loop through the page cache, with reads and with mappings. The fastest one counts, so that what is called the floor
is the best that this machine was seen to do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paramdelta.storage.pages import map_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
BLOCK = 4096  # what O_DIRECT wants offsets, lengths and memory to be multiples of


@dataclass(frozen=True)
class Traffic:
    """What is moved: these files are read, and this many bytes are written."""

    reads: tuple[Path, ...]
    write_bytes: int

    @property
    def bytes(self) -> int:
        """Count the bytes moved in both directions."""
        return sum(whole_blocks(path.stat().st_size) for path in self.reads) + whole_blocks(self.write_bytes)


@dataclass(frozen=True)
class Method:
    """A way of moving the bytes: fio's queue depth, or this module's number of threads."""

    tool: str
    depth: int
    block_bytes: int

    def __str__(self) -> str:
        unit = "deep" if self.tool == "fio" else "threads"
        return f"{self.tool}, {self.depth} {unit}, {self.block_bytes // MIB} MiB blocks"


@dataclass(frozen=True)
class Floor:
    """One timing."""

    method: Method
    seconds: float
    bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Rate in both directions together, in 10^9 bytes a second."""
        return self.bytes / self.seconds / 1e9


METHODS = (
    Method("fio", 4, 4 * MIB),
    Method("fio", 16, 1 * MIB),
    Method("threads", 2, 8 * MIB),
    Method("threads", 4, 4 * MIB),
    Method("threads", 8, 4 * MIB),
    Method("buffered", 2, 8 * MIB),
    Method("buffered", 4, 4 * MIB),
    Method("mmap", 4, 4 * MIB),
)


def whole_blocks(size: int) -> int:
    """Return the size without its unaligned rest, which O_DIRECT cannot move and which is too small to matter."""
    return size - size % BLOCK


def fio_job(name: str, path: Path, size: int, direction: str) -> list[str]:
    """Return the options of one fio job."""
    job = [f"--name={name}", f"--filename={path}", f"--size={size}", f"--rw={direction}"]
    return [*job, "--fallocate=native", "--end_fsync=1"] if direction == "write" else job


def fio_seconds(traffic: Traffic, method: Method, scratch: Path) -> float:
    """Time the longest of the concurrent jobs, by fio's own clock: without its start and its report."""
    jobs = [
        option
        for number, path in enumerate(traffic.reads)
        for option in fio_job(f"read{number}", path, whole_blocks(path.stat().st_size), "read")
    ]
    jobs += fio_job("write", scratch, whole_blocks(traffic.write_bytes), "write")
    settings = ["--ioengine=libaio", "--direct=1", f"--bs={method.block_bytes}", f"--iodepth={method.depth}"]
    done = subprocess.run(
        ["fio", "--output-format=json", "--invalidate=0", *settings, *jobs],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    return max(float(job["job_runtime"]) for job in report["jobs"]) / 1000


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a descriptor, to be closed at the end."""
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_block(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer; short reads go on."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"a file ended before byte {offset + len(buffer)}")
        done += count


def touch_block(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Map as much as the buffer holds, and have every page fetched; the buffer stays as it is."""
    with map_range(descriptor, offset, len(buffer)) as mapping:
        mapping.madvise(mmap.MADV_WILLNEED)
        np.frombuffer(mapping, np.uint8)[::BLOCK].max()


def write_block(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write the buffer; short writes go on."""
    done = 0
    while done < len(buffer):
        done += os.pwritev(descriptor, [buffer[done:]], offset + done)


FETCH: dict[str, Callable[[int, memoryview, int], None]] = {
    "threads": read_block,
    "buffered": read_block,
    "mmap": touch_block,
}


def thread_seconds(traffic: Traffic, method: Method, scratch: Path) -> float:
    """Merge without arithmetic: each thread takes the next window, reads it from every input and writes it once."""
    total = whole_blocks(traffic.write_bytes)
    extent = max([total, *(path.stat().st_size for path in traffic.reads)])
    past_cache = os.O_DIRECT if method.tool == "threads" else 0
    fetch = FETCH[method.tool]
    local = threading.local()
    with contextlib.ExitStack() as stack:
        reads = [
            (stack.enter_context(opened(path, os.O_RDONLY | past_cache)), whole_blocks(path.stat().st_size))
            for path in traffic.reads
        ]
        write = stack.enter_context(opened(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | past_cache))

        def work(offset: int) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = mmap.mmap(-1, method.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                local.buffer.madvise(mmap.MADV_HUGEPAGE)  # of small pages a device is asked for little at a time
            view = memoryview(local.buffer)
            for descriptor, size in reads:
                if offset < size:
                    fetch(descriptor, view[: size - offset], offset)
            if offset < total:
                write_block(write, view[: total - offset], offset)

        start = time.perf_counter()
        os.posix_fallocate(write, 0, total)
        with ThreadPoolExecutor(method.depth) as workers:
            for _ in workers.map(work, range(0, extent, method.block_bytes)):
                pass
        os.fsync(write)
        return time.perf_counter() - start


def forget(path: Path) -> None:
    """Take a file out of the page cache, as far as nobody has it mapped."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def measure_floor(traffic: Traffic, method: Method, directory: Path) -> Floor:
    """Time one method; the file it writes is removed."""
    os.sync()
    for path in traffic.reads:
        forget(path)
    seconds_of = fio_seconds if method.tool == "fio" else thread_seconds
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        return Floor(method, seconds_of(traffic, method, Path(scratch, "floor.bin")), traffic.bytes)


def available_methods(traffic: Traffic) -> list[Method]:
    """Return what can be tried: fio where installed, mappings where something is read."""
    return [
        method
        for method in METHODS
        if (method.tool != "fio" or shutil.which("fio")) and (method.tool != "mmap" or traffic.reads)
    ]


def best_methods(traffic: Traffic, directory: Path) -> list[Method]:
    """Try every method once and return the best one of each tool."""
    best: dict[str, Floor] = {}
    for method in available_methods(traffic):
        try:
            floor = measure_floor(traffic, method, directory)
        except (OSError, subprocess.CalledProcessError):  # a filesystem without direct I/O
            continue
        if method.tool not in best or floor.seconds < best[method.tool].seconds:
            best[method.tool] = floor
    return [floor.method for floor in best.values()]


def main() -> None:
    """Print the time of every method."""
    parser = argparse.ArgumentParser(description="Time the reads and the write of a merge, without the merge.")
    parser.add_argument("inputs", nargs="+", type=Path, help="files to read")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory on the filesystem to write to")
    parser.add_argument("--write-bytes", type=int, help="default: the size of the last input")
    options = parser.parse_args()
    traffic = Traffic(tuple(options.inputs), options.write_bytes or options.inputs[-1].stat().st_size)
    for method in available_methods(traffic):
        floor = measure_floor(traffic, method, options.output)
        print(f"{method!s:40} {floor.seconds:6.2f} s  {floor.gigabytes_per_second:5.2f} GB/s")


if __name__ == "__main__":
    main()
