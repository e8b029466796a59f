"""The user's benchmark: that it measures what it says, on files as small as they may be. Never how fast."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paramdelta import benchmark
from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.cli import display
from paramdelta.errors import CancelledError, OutputError
from paramdelta.storage import platform

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 << 20


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_OPERAND", 1 << 20)
    monkeypatch.setattr(benchmark, "_ROUNDS", 1)
    monkeypatch.setattr(benchmark, "_THREADS", (2,))


@pytest.mark.usefixtures("quick")
def test_it_measures_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    result = benchmark.run(str(tmp_path), SIZE, said.append)
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 3
    rates = (result.memcpy_rate, result.kernel_rate, result.write_rate, result.read_rate, result.disk_rate)
    assert all(rate > 0 for rate in (*rates, result.merge_rate, result.share_of_disk))
    assert result.file_bytes == SIZE
    big = result.estimates[1]
    assert (big.model, big.bytes_moved) == ("70B", 4 * 141_107_412_992)
    assert big.seconds == pytest.approx(big.bytes_moved / result.merge_rate)
    display.show_benchmark(result)
    shown = capsys.readouterr().out
    assert "post - base + new base in bf16" in shown
    assert "three 405B models" in shown


def test_the_checkpoints_are_checkpoints_with_weights_in_them(tmp_path: Path) -> None:
    speed = benchmark.write_checkpoint(tmp_path / "post", SIZE, 1)
    checkpoint = open_checkpoint(tmp_path / "post")
    assert {(ref.dtype, ref.shape) for ref in checkpoint.tensors.values()} == {("BF16", (4096, 4096))}
    assert len(checkpoint.tensors) == 2
    assert speed.moved == (tmp_path / "post" / "model.safetensors").stat().st_size
    for ref in checkpoint.tensors.values():
        codes = np.fromfile(tmp_path / "post" / "model.safetensors", np.uint16, ref.nbytes // 2, offset=ref.offset)
        weights = (codes.astype(np.uint32) << 16).view(np.float32)
        assert 0.01 < float(np.abs(weights).mean()) < 0.03


def test_the_disk_alone_moves_what_a_merge_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        benchmark.write_file(file, 20_000_001)
    read, written = [], []
    read_some, write_all = platform.read_some, platform.write_all

    def reading(*arguments: object) -> int:
        read.append(read_some(*arguments))  # type: ignore[arg-type]
        return read[-1]

    def writing(descriptor: int, view: memoryview, offset: int) -> None:
        written.append(len(view))
        write_all(descriptor, view, offset)

    monkeypatch.setattr(platform, "read_some", reading)
    monkeypatch.setattr(platform, "write_all", writing)
    speed = benchmark.move(files, tmp_path / "moved", 3)
    assert speed.moved == 4 * 20_000_001
    assert sum(read) >= 3 * 20_000_001
    assert sum(written) >= 20_000_001
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize(("rate", "size"), [(1e6, 64 << 20), (1e8, 158 << 20), (1e12, 512 << 20)])
def test_files_are_as_large_as_a_minute_allows(rate: float, size: int) -> None:
    assert benchmark._affordable(benchmark.Speed(int(rate), 1.0)) == size


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"are needed, .* are free"):
        benchmark.run(str(tmp_path), 1 << 60)
    with pytest.raises(OutputError, match="No such file"):
        benchmark.run(str(tmp_path / "nowhere"), SIZE)
    cancelled = threading.Event()
    monkeypatch.setattr(benchmark, "measure_kernel", lambda: (benchmark.Speed(1, 1.0), benchmark.Speed(1, 1.0)))
    cancelled.set()
    with pytest.raises(CancelledError):
        benchmark.run(str(tmp_path), SIZE, cancelled=cancelled)
    assert list(tmp_path.iterdir()) == []
