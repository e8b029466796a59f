"""What this machine can do: the arithmetic beside memcpy, the disk alone, a merge beside the disk, and what follows.

Files of random weights are written, read and merged in a directory on the disk in question, in about a minute. The disk
alone moves just what a merge moves, three files in and one out, and computes nothing: its fastest way is the limit.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from paramdelta import api
from paramdelta.checkpoint.header import TensorEntry, build_header
from paramdelta.engine import budget, kernels
from paramdelta.engine.sums import Sums
from paramdelta.errors import CancelledError, OutputError, ParamDeltaError
from paramdelta.planning.units import format_size
from paramdelta.storage.pages import Buffer
from paramdelta.storage.platform import ALIGNMENT
from paramdelta.storage.sink import FileSink, output_refused
from paramdelta.storage.source import Source, open_source

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from paramdelta.results import MergeResult

ROLES: Final = ("post", "base", "new_base")
MODELS: Final = {"8B": 16_060_522_496, "70B": 141_107_412_992, "405B": 811_706_417_152}
"""Bytes of Llama 3.1's weights in bf16."""

SMALLEST: Final = 64 << 20
LARGEST: Final = 512 << 20
_SECONDS: Final = 60
_PASSES: Final = 36  # how often, in all, as many bytes as one file has are moved
_ROUNDS: Final = 3
_WINDOW: Final = 8 << 20
_THREADS: Final = (2, 4, 8)
_SIDE: Final = 4096  # of the weights, which are square
_OPERAND: Final = 48 << 20  # bytes: more than processors cache


class Speed(NamedTuple):
    """So many bytes moved in so many seconds."""

    moved: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.moved / self.seconds


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge of three models of a size would take on this disk.

    Attributes:
        bytes_moved: read and written.
        seconds: at the rate of the merges that were timed.
        room_bytes: on the disk, for the output.
    """

    model: str
    bytes_moved: int
    seconds: float
    room_bytes: int


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What this machine can do. Rates are bytes per second, read and written together.

    Attributes:
        directory: where the files lay.
        file_bytes: size of each file.
        threads: how many computed at once.
        memcpy_rate: of copying memory, in so many threads.
        kernel_rate: of the exact sum of bf16, in as many.
        write_rate: of writing one file; ``read_rate`` of reading three.
        disk_rate: of reading three files while one is written, nothing computed.
        merge_rate: of merging them, planning and publication included.
        share_of_disk: median over the rounds of the disk's time over the merge's.
        io: how the inputs were read.
        peak_rss_bytes: the most RAM that the process held, what the benchmark itself needs included.
    """

    directory: str
    file_bytes: int
    threads: int
    memcpy_rate: float
    kernel_rate: float
    write_rate: float
    read_rate: float
    disk_rate: float
    merge_rate: float
    share_of_disk: float
    io: str
    peak_rss_bytes: int
    estimates: tuple[Estimate, ...]


def run(
    directory: str = ".",
    size: int | None = None,
    say: Callable[[str], None] | None = None,
    cancelled: threading.Event | None = None,
) -> Benchmark:
    """Measure.

    Args:
        directory: on the disk in question; what is written there is removed again.
        size: bytes of each file; by default as many as a minute allows.
        say: called with a line on each step.
        cancelled: set it, from any thread, to stop.

    Raises:
        OutputError: the directory cannot be written, or has too little room.
        CancelledError: ``cancelled`` was set.
    """
    say = say or _quietly
    with ExitStack() as stack:
        root = _working_directory(Path(directory), stack)
        say("arithmetic, beside memcpy")
        memcpy, kernel = measure_kernel()
        pace = write_file(root / "pace", SMALLEST)
        (root / "pace").unlink()
        size = size or _affordable(pace)
        _refuse_full(root, 4 * size)
        say(f"disk: three files of {format_size(size)}")
        writing = [write_checkpoint(root / role, size, seed, cancelled) for seed, role in enumerate(ROLES)]
        files = [root / role / "model.safetensors" for role in ROLES]
        reading = move(files, None, max(_THREADS), cancelled)
        best = min(_THREADS, key=lambda threads: move(files, root / "moved", threads, cancelled).seconds)
        rounds = []
        for number in range(_ROUNDS):
            say(f"merge, beside the disk alone ({number + 1} of {_ROUNDS})")
            disk = move(files, root / "moved", best, cancelled)
            rounds.append((disk, *_merge(root, cancelled)))
        merge_rate = median(merged.rate for _, merged, _ in rounds)
        result = rounds[-1][2]
        return Benchmark(
            directory=str(Path(directory)),
            file_bytes=size,
            threads=budget.usable_processors(),
            memcpy_rate=memcpy.rate,
            kernel_rate=kernel.rate,
            write_rate=median(speed.rate for speed in writing),
            read_rate=reading.rate,
            disk_rate=median(disk.rate for disk, _, _ in rounds),
            merge_rate=merge_rate,
            share_of_disk=median(merged.rate / disk.rate for disk, merged, _ in rounds),
            io=result.io,
            peak_rss_bytes=result.peak_rss_bytes,
            estimates=tuple(Estimate(name, 4 * each, 4 * each / merge_rate, each) for name, each in MODELS.items()),
        )


def _quietly(line: str) -> None:
    """Say nothing."""


def _working_directory(directory: Path, stack: ExitStack) -> Path:
    try:
        made = tempfile.TemporaryDirectory(prefix="paramdelta-bench-", dir=directory)
    except OSError as error:
        raise output_refused(error, directory) from error
    return Path(stack.enter_context(made))


def _affordable(pace: Speed) -> int:
    size = int(pace.rate * _SECONDS / _PASSES)
    return min(max(size, SMALLEST), LARGEST) >> 20 << 20


def _refuse_full(root: Path, wanted: int) -> None:
    free = shutil.disk_usage(root).free
    if free < wanted:
        raise OutputError(
            f"{format_size(wanted)} are needed, {format_size(free)} are free",
            file=str(root.parent),
            remedy="Choose a smaller --size, or another directory.",
        )


# -- arithmetic ------------------------------------------------------------------------------------------------------


def measure_kernel() -> tuple[Speed, Speed]:
    """Return the speed of memcpy, and of the exact sum of three operands in bf16, on all processors."""
    threads = budget.usable_processors()
    for prepare in kernels.preparations([(("BF16",) * 3, (1.0,), "BF16")], scaled=False):
        prepare()
    areas = [[Buffer(_OPERAND) for _ in range(4)] for _ in range(threads)]
    weights = _random_weights(_OPERAND // 2, 0)
    for area in areas:
        for number, buffer in enumerate(area):
            np.frombuffer(buffer.view, np.uint16)[:] = np.roll(weights, number)

    def copy(area: Sequence[Buffer]) -> None:
        for source, target in ((area[0], area[1]), (area[2], area[3])):
            ctypes.memmove(target.address, source.address, _OPERAND)

    def fuse(area: Sequence[Buffer]) -> None:
        addresses = [buffer.address for buffer in area[:3]]
        counters, sums = array("q", (0, 0)), Sums(1)
        kernels.fuse(addresses, ("BF16",) * 3, (1.0,), area[3].address, "BF16", _OPERAND // 2, counters, sums)

    with ThreadPoolExecutor(threads) as pool:
        seconds = [median(_seconds(pool, job, areas) for _ in range(5)) for job in (copy, fuse)]
    moved = threads * 4 * _OPERAND
    return Speed(moved, seconds[0]), Speed(moved, seconds[1])


def _seconds(
    pool: ThreadPoolExecutor, job: Callable[[Sequence[Buffer]], None], areas: Sequence[Sequence[Buffer]]
) -> float:
    started = time.perf_counter()
    list(pool.map(job, areas))
    return time.perf_counter() - started


def _random_weights(count: int, seed: int) -> NDArray[np.uint16]:
    """Return weights of ordinary size in bf16: a million, and these again."""
    numbers = 0.02 * np.random.default_rng(seed).standard_normal(1_000_003, np.float32)
    return np.resize((numbers.view(np.uint32) >> 16).astype(np.uint16), count)


# -- the disk --------------------------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, size: int, seed: int, cancelled: threading.Event | None = None) -> Speed:
    """Write a checkpoint of one file of about ``size`` bytes, around the page cache where that can be done."""
    side_bytes = 2 * _SIDE * _SIDE
    entries = []
    for number in range(max(1, size // side_bytes)):
        begin = number * side_bytes
        entries.append((f"layers.{number}.weight", TensorEntry("BF16", (_SIDE, _SIDE), begin, begin + side_bytes)))
    header = build_header(entries, {"format": "pt"})
    directory.mkdir()
    return write_file(directory / "model.safetensors", len(header) + entries[-1][1].end, header, seed, cancelled)


def write_file(
    path: Path, size: int, header: bytes = b"", seed: int = 0, cancelled: threading.Event | None = None
) -> Speed:
    """Write a file that begins with a header and goes on with random weights; its sync counts."""
    buffer = Buffer(_WINDOW)
    codes = _random_weights(_WINDOW // 2, seed)
    started = time.perf_counter()
    sink = FileSink(path, size)
    try:
        for begin in range(0, size, _WINDOW):
            _stop_if(cancelled)
            np.frombuffer(buffer.view, np.uint16)[:] = codes
            if begin == 0:
                buffer.view[: len(header)] = header
            sink.write(begin, buffer.view[: _whole_blocks(min(_WINDOW, size - begin))])
    except BaseException:
        sink.abandon()
        raise
    sink.finish()
    return Speed(size, time.perf_counter() - started)


def move(files: Sequence[Path], output: Path | None, threads: int, cancelled: threading.Event | None = None) -> Speed:
    """Read all files, window by window in so many threads, and write as much as one of them; compute nothing."""
    size = files[0].stat().st_size
    started = time.perf_counter()
    with ExitStack() as stack:
        sources = [open_source(str(file), size, _cold_backend(file)) for file in files]
        for source in sources:
            stack.callback(source.close)
        sink = None if output is None else FileSink(output, size)
        windows = iter(range(0, size, _WINDOW))
        try:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda _: _move_windows(windows, sources, sink, size, cancelled), range(threads)))
        except BaseException:
            if sink is not None:
                sink.abandon()
            raise
        if sink is not None and output is not None:
            sink.finish()
    seconds = time.perf_counter() - started
    if output is not None:
        output.unlink()
    return Speed(size * (len(files) + (output is not None)), seconds)


def _cold_backend(file: Path) -> str:
    """Return the backend that reads around the page cache, or the one that works everywhere."""
    try:
        open_source(str(file), file.stat().st_size, "direct").close()
    except ParamDeltaError:
        return "pread"
    return "direct"


def _move_windows(
    windows: Iterator[int],
    sources: Sequence[Source],
    sink: FileSink | None,
    size: int,
    cancelled: threading.Event | None,
) -> None:
    memory = Buffer(max(source.room(_WINDOW) for source in sources))
    for begin in windows:
        _stop_if(cancelled)
        length = min(_WINDOW, size - begin)
        for source in sources:
            source.give_back(source.borrow(begin, length, memory.view))
        if sink is not None:
            sink.write(begin, memory.view[: _whole_blocks(length)])


def _whole_blocks(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _stop_if(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("stopped on request")


# -- a merge ---------------------------------------------------------------------------------------------------------


def _merge(root: Path, cancelled: threading.Event | None) -> tuple[Speed, MergeResult]:
    """Merge the three, planning and publication included."""
    post, base, new_base = (root / role for role in ROLES)
    io = _cold_backend(post / "model.safetensors")
    result = api.merge(post, base, new_base, root / "merged", io=io, cancelled=cancelled)
    shutil.rmtree(root / "merged")
    return Speed(result.bytes_read + result.bytes_written, result.seconds), result
