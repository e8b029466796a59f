"""Shards read again: nothing is left out unnoticed, whatever threads and memory do; and what is told stays readable."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import paramdelta
from paramdelta.checkpoint.header import Header, parse_header
from paramdelta.engine.claims import Claims
from paramdelta.engine.digests import REGION, Digest
from paramdelta.engine.regions import TensorExtents, check_shards
from paramdelta.errors import BudgetError, CheckpointError, VerificationError
from paramdelta.storage.pages import Buffer
from paramdelta.storage.source import open_source
from tests.make import file_bytes, header_bytes, normal, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

ENOMEM = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triple")
    for seed, role in enumerate(("post", "base", "new")):
        tensors = {name: normal((700, 4000), seed=seed) for name in "ab"}
        write_checkpoint(root / role, tensors, shards=2)
    paramdelta.merge(root / "post", root / "base", root / "new", root / "out")
    return root / "out"


@pytest.fixture
def damaged(output: Path) -> Any:
    path = output / "model-00001-of-00002.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    yield output
    path.write_bytes(good)


@pytest.mark.parametrize("error", [ENOMEM, MemoryError()])
@pytest.mark.parametrize("failing", [0, 2])
def test_memory_that_no_thread_gets_is_told(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, failing: int
) -> None:
    made: list[int] = []

    def buffer(size: int) -> Buffer:
        made.append(size)
        if len(made) > failing:
            raise error
        return Buffer(size)

    monkeypatch.setattr("paramdelta.engine.regions.Buffer", buffer)
    with pytest.raises(BudgetError, match=f"only {failing} of 4 threads could be started"):
        paramdelta.verify(damaged, workers=8)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("paramdelta-verify")]


def test_threads_that_the_system_does_not_give_are_told(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name == "paramdelta-verify-1":
            raise RuntimeError("can't start new thread")
        real(thread)

    real = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(BudgetError, match="only 1 of 3 threads"):
        paramdelta.verify(damaged, workers=3)


def fail_at_second_region(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def open_failing(path: str, size: int, io: str) -> Any:
        source = open_source(path, size, io)
        borrow = source.borrow

        def failing(offset: int, size: int, memory: memoryview) -> Any:
            if offset:
                raise error
            return borrow(offset, size, memory)

        monkeypatch.setattr(source, "borrow", failing)
        return source

    monkeypatch.setattr("paramdelta.engine.regions.open_source", open_failing)


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [ENOMEM, MemoryError(), caused_by(CheckpointError("cannot be mapped"), ENOMEM)])
def test_memory_that_is_short_while_reading_is_no_damage(
    output: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_at_second_region(monkeypatch, error)
    with pytest.raises(BudgetError, match="not enough memory"):
        paramdelta.verify(output, workers=2)


@pytest.mark.parametrize("error", [RuntimeError("whatever"), SystemExit(3)])
@pytest.mark.parametrize("workers", [1, 4])
def test_what_ends_a_thread_is_raised(
    output: Path, monkeypatch: pytest.MonkeyPatch, workers: int, error: BaseException
) -> None:
    fail_at_second_region(monkeypatch, error)
    with pytest.raises(type(error)):
        paramdelta.verify(output, workers=workers)


def test_only_what_was_read_counts_as_read(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paramdelta.verify(output).bytes_read
    fail_at_second_region(monkeypatch, CheckpointError("cannot be read"))
    result = paramdelta.verify(output)
    second = sum(f.stat().st_size - REGION for f in output.glob("*.safetensors"))
    assert result.bytes_read == whole - second
    assert [(f.offset, f.message) for f in result.failures] == [(REGION, "cannot be read")] * 2


def test_what_nobody_read_is_never_as_it_was_written(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramdelta.engine.regions._Reader.run", lambda *_: None)
    with pytest.raises(VerificationError, match="only 0 of") as caught:
        paramdelta.verify(output)
    assert caught.value.exit_code == 7


LIMITED = """
import resource, sys
import paramdelta
from paramdelta.errors import BudgetError

output = sys.argv[1]
assert not paramdelta.verify(output, io="pread").ok
held = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
told = set()
for more in range(0, 128 << 20, 3 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.RLIM_INFINITY))
    try:
        assert not paramdelta.verify(output, io=sys.argv[2], workers=8).ok
        told.add("damage")
    except BudgetError:
        told.add("memory")
print(*sorted(told))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are kept on Linux only")
@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
def test_whatever_address_space_is_left_damage_is_found_or_memory_asked_for(damaged: Path, io: str) -> None:
    command = [sys.executable, "-c", LIMITED, str(damaged), io]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == ("damage memory\n", 0), run.stderr


def test_a_shard_that_is_wrong_throughout_is_named_in_few_words_and_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, name = 33, "model.safetensors"
    size = count * REGION
    header = header_bytes({"w": {"dtype": "U8", "shape": [size - 4096], "data_offsets": [0, size - 4096]}}, align=4096)
    with (tmp_path / name).open("wb") as file:
        file.write(header)
        file.truncate(size)
    parsed: list[str] = []

    def parse(raw: bytes, size: int, file: str) -> Header:
        parsed.append(file)
        return parse_header(raw, size, file)

    monkeypatch.setattr("paramdelta.engine.regions.parse_header", parse)
    claims = Claims({}, {name: Digest.of([1] * count)}, {name: size})
    failures, read = check_shards(tmp_path, claims, 4, "auto")
    assert (len(parsed), read) == (1, size)
    assert [failure.offset for failure in failures] == [*(number * REGION for number in range(20)), None]
    assert failures[-1].message == "and 13 more regions like these"
    assert all(failure.tensors == ("w",) for failure in failures[:-1])


@given(
    st.lists(st.integers(0, 4), max_size=12),
    st.integers(0, 300),
    st.integers(1, 300),
)
def test_the_tensors_of_a_range_are_those_with_bytes_in_it(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], begin: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "extents.safetensors"
    path.write_bytes(file_bytes({f"t{n}": ("U8", (size,), bytes(size)) for n, size in enumerate(sizes)}))
    place = path.stat().st_size - sum(sizes)
    wanted = []
    for number, size in enumerate(sizes):
        if place < begin + length and place + size > begin:
            wanted.append(f"t{number}")
        place += size
    assert list(TensorExtents.of(path).between(begin, begin + length)) == wanted


def test_a_header_that_does_not_parse_names_no_tensor(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 20)
    assert TensorExtents.of(tmp_path / "x").between(0, 20) == ()
    assert TensorExtents.of(tmp_path / "nothing").between(0, 20) == ()
