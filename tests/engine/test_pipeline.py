"""The same bytes from every way of carrying out a plan.

The matrix: backends {auto, mmap, pread, direct} × workers {1, 2, 7} × windows {4 KiB, 1 MiB, 16 MiB} × sinks {direct,
buffered}, on tensors that straddle windows, lie at odd offsets, and are split differently in each checkpoint.
"""

from __future__ import annotations

import errno
import json
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors import safe_open

from paramdelta.engine import pipeline, worker
from paramdelta.engine.budget import Budget, Shape
from paramdelta.engine.inputs import Inputs
from paramdelta.engine.output import DOCUMENTS, OutputDirectory
from paramdelta.engine.progress import NonFinite, Progress
from paramdelta.errors import CancelledError, InputChangedError, OutputError
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.recipe import Delta, Recipe
from paramdelta.storage import platform
from paramdelta.storage.sink import FileSink
from tests import oracle
from tests.make import Tensor, at_odd_offsets, encode, normal, skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WINDOWS = (4 << 10, 1 << 20, 16 << 20)
CODES = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed": ("BF16", (517, 129)),
    "wide": ("BF16", (3, 700_001)),
    "scale": ("F32", (1001,)),
    "half": ("F16", (33, 77)),
    "double": ("F64", (251,)),
    "scalar": ("F32", ()),
    "empty": ("BF16", (0, 16)),
    "norm": ("BF16", (129,)),
}


def tensors(seed: int, *, odd: bool) -> dict[str, Tensor]:
    made = {name: normal(shape, dtype, seed=seed) for name, (dtype, shape) in SHAPES.items()}
    made["steps"] = ("I64", (3,), encode([seed, 2, 3], "I64"))
    made["mask"] = ("BOOL", (5,), bytes([1, 0, 1, 1, seed % 2]))
    return at_odd_offsets(made) if odd else made


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triple")
    for seed, (role, shards) in enumerate((("post", 3), ("base", 1), ("new_base", 2))):
        write_checkpoint(root / role, tensors(seed, odd=True), shards=shards, config={"model_type": "llama"}, align=1)
    return root


def plan_of(root: Path) -> Plan:
    return make_plan(Recipe.of(root / "post", root / "base", root / "new_base"))


def carry_out(
    plan: Plan, output: Path, *, io: str = "auto", workers: int = 2, window: int = 1 << 20
) -> dict[str, bytes]:
    budget = Budget.of(1 << 30, workers, window, Shape.of(plan.operations))
    with OutputDirectory(output, plan, overwrite=False) as directory:
        directory.begin()
        pipeline.run(plan, budget, io, directory)
        directory.publish({}, dict.fromkeys(DOCUMENTS, b""))
    return {file.name: file.read_bytes() for file in output.glob("*.safetensors*")}


def stored(output: Path) -> dict[str, bytes]:
    """Read tensors from their places in the files, by nothing but the format's definition."""
    found = {}
    for file in output.glob("*.safetensors"):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        tree: Mapping[str, dict[str, list[int]]] = json.loads(raw[8 : 8 + length])
        for name, entry in tree.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = raw[8 + length + begin : 8 + length + end]
    return found


def test_every_tensor_is_what_exact_arithmetic_says(triple: Path, tmp_path: Path) -> None:
    """All elements of small tensors, and of a large one those around every 4 KiB and some at random."""
    carry_out(plan_of(triple), tmp_path / "out", window=4 << 10, workers=2)
    found = stored(tmp_path / "out")
    post, base, new = (tensors(seed, odd=True) for seed in range(3))
    assert found.keys() == new.keys()
    for name, (dtype, _, data) in new.items():
        if dtype not in CODES:
            assert found[name] == data
            continue
        codes = [np.frombuffer(raw, CODES[dtype]) for raw in (data, post[name][2], base[name][2], found[name])]
        places = np.arange(codes[0].size)
        if places.size > 50_000:
            near = places[(places % 2048 < 3) | (places % 2048 > 2045)]
            places = np.unique(np.concatenate([near, np.random.default_rng(0).integers(places.size, size=20_000)]))
        for new_code, post_code, base_code, code in zip(*(array[places].tolist() for array in codes), strict=True):
            assert oracle.fuse(new_code, post_code, base_code, (dtype,) * 3, dtype)[0] == code, name


@pytest.fixture(scope="module")
def reference(triple: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return carry_out(plan_of(triple), tmp_path_factory.mktemp("reference") / "out")


@pytest.mark.parametrize("io", ["auto", "mmap", "pread", "direct"])
@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_bytes_depend_on_neither_backend_nor_workers_nor_windows(
    triple: Path, tmp_path: Path, reference: Mapping[str, bytes], io: str, workers: int, window: int
) -> None:
    skip_without_direct_io(io, tmp_path)
    assert carry_out(plan_of(triple), tmp_path / "out", io=io, workers=workers, window=window) == reference


@pytest.fixture(scope="module")
def large_triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of 36 MB at an odd offset: it straddles even the largest windows."""
    root = tmp_path_factory.mktemp("large")
    values = np.random.default_rng(0).integers(1 << 14, size=(3, 18_000_001), dtype=np.uint16)
    for role, codes in zip(("post", "base", "new_base"), values, strict=True):
        write_checkpoint(root / role, at_odd_offsets({"w": ("BF16", (codes.size,), codes.tobytes())}))
    return root


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_tensors_that_straddle_the_largest_windows_have_the_same_bytes_too(
    large_triple: Path, tmp_path: Path, io: str, workers: int
) -> None:
    skip_without_direct_io(io, tmp_path)
    outputs = [
        carry_out(plan_of(large_triple), tmp_path / f"out-{window}", io=io, workers=workers, window=window)
        for window in WINDOWS[1:]
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_bytes_are_the_same_where_the_filesystem_takes_no_direct_writes(
    triple: Path, tmp_path: Path, reference: Mapping[str, bytes], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *, direct: bool = False) -> int:
        if direct:
            raise OSError(errno.EINVAL, "no direct I/O here", path)
        return open_for_writing(path)

    open_for_writing = platform.open_for_writing
    monkeypatch.setattr(platform, "open_for_writing", refuse)
    assert carry_out(plan_of(triple), tmp_path / "out", window=window) == reference


def test_the_output_keeps_the_new_bases_shards_order_and_dtypes(triple: Path, tmp_path: Path) -> None:
    carry_out(plan_of(triple), tmp_path / "out")
    for shard in sorted((triple / "new_base").glob("*.safetensors")):
        with safe_open(shard, "numpy") as before, safe_open(tmp_path / "out" / shard.name, "numpy") as after:
            assert list(after.offset_keys()) == list(before.offset_keys())
            assert after.metadata() == {"format": "pt"}
            for name in before.keys():  # noqa: SIM118 (not a mapping)
                assert after.get_slice(name).get_dtype() == before.get_slice(name).get_dtype()
                assert after.get_slice(name).get_shape() == before.get_slice(name).get_shape()


def test_progress_reaches_the_total_and_every_shard(triple: Path, tmp_path: Path) -> None:
    plan = plan_of(triple)
    seen: list[Progress] = []
    budget = Budget.of(1 << 30, 3, 64 << 10, Shape.of(plan.operations))
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        directory.begin()
        pipeline.run(plan, budget, "auto", directory, seen.append)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1].done == seen[-1].total == sum(shard.size for shard in plan.shards)
    assert seen[-1].shards_done == seen[-1].shards == 2


def test_several_deltas_are_added_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    values = {role: np.linspace(1, 2, 5000) * scale for scale, role in enumerate("pbnq", start=1)}
    for role, value in values.items():
        write_checkpoint(tmp_path / role, {"w": ("F64", (5000,), encode(value, "F64"))})
    paths = {role: str(tmp_path / role) for role in values}
    recipe = Recipe(paths["n"], (Delta(paths["p"], paths["b"], 0.3), Delta(paths["q"], paths["b"], -1.7)))
    carry_out(make_plan(recipe), tmp_path / "out", window=4096)
    wanted = values["n"] + 0.3 * (values["p"] - values["b"])
    wanted = wanted + -1.7 * (values["q"] - values["b"])
    assert np.array_equal(np.frombuffer(stored(tmp_path / "out")["w"]), wanted)


@pytest.mark.parametrize("window", [4 << 10, 1 << 20])
def test_new_non_finite_values_are_counted_once_per_element_wherever_windows_are_cut(
    tmp_path: Path, window: int
) -> None:
    """Behind a 3-byte tensor every window boundary cuts an element."""
    count = 10_000
    for role, value in (("post", 3e38), ("base", -3e38), ("new_base", 3e38)):
        data = encode(np.full(count, value, np.float32), "F32")
        write_checkpoint(tmp_path / role, at_odd_offsets({"w": ("F32", (count,), data)}))
    plan = plan_of(tmp_path)
    budget = Budget.of(1 << 30, 2, window, Shape.of(plan.operations))
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        directory.begin()
        outcome = pipeline.run(plan, budget, "auto", directory)
    assert outcome.nonfinite == {"w": NonFinite(infinities=count, nans=0)}


def test_a_cancelled_run_stops_and_leaves_nothing(triple: Path, tmp_path: Path) -> None:
    plan, cancelled = plan_of(triple), threading.Event()
    budget = Budget.of(1 << 30, 2, 4096, Shape.of(plan.operations))
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        directory.begin()
        with pytest.raises(CancelledError):
            pipeline.run(plan, budget, "auto", directory, lambda _: cancelled.set(), cancelled)
    assert not (tmp_path / "out").exists()


def test_an_interruption_while_workers_are_awaited_closes_nothing_under_them(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, released = threading.Event(), threading.Event()
    events: list[str] = []

    def hold(*_: object) -> None:
        held.set()
        released.wait(60)
        events.append("written")

    def close(_: Inputs) -> None:
        events.append("closed")

    def interrupted(self: threading.Thread) -> None:
        if threading.current_thread() is threading.main_thread():
            held.wait(60)
            raise KeyboardInterrupt
        join(self)

    join = threading.Thread.join
    monkeypatch.setattr(FileSink, "write", hold)
    monkeypatch.setattr(Inputs, "close", close)
    monkeypatch.setattr(worker.Worker, "join", interrupted)
    plan, cancelled = plan_of(triple), threading.Event()
    cancelled.set()
    budget = Budget.of(1 << 30, 2, 4096, Shape.of(plan.operations))
    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        directory.begin()
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(plan, budget, "auto", directory, None, cancelled)
        assert events == []
        released.set()
        closer = next(thread for thread in threading.enumerate() if thread.name == "paramdelta-close")
        closer.join(60)
    assert events.index("closed") == len(events) - 1 > 0


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_an_input_that_shrinks_after_planning_is_an_error_and_leaves_nothing(tmp_path: Path, io: str) -> None:
    skip_without_direct_io(io, tmp_path)
    for seed, role in enumerate(("post", "base", "new_base")):
        write_checkpoint(tmp_path / role, {"w": normal((300, 1000), seed=seed)})
    plan = plan_of(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(InputChangedError) as caught:
        carry_out(plan, tmp_path / "out", io=io)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_an_input_that_shrinks_under_the_run_is_an_error_and_leaves_nothing(tmp_path: Path, io: str) -> None:
    skip_without_direct_io(io, tmp_path)
    for seed, role in enumerate(("post", "base", "new_base")):
        write_checkpoint(tmp_path / role, {"w": normal((300, 10_000), seed=seed)})
    plan = plan_of(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    budget = Budget.of(1 << 30, 1, 4096, Shape.of(plan.operations))

    def shrink(progress: Progress) -> None:
        if progress.done < progress.total / 4:
            with file.open("r+b") as opened:
                opened.truncate(plan.files[1].identity.size * 3 // 4)

    with OutputDirectory(tmp_path / "out", plan, overwrite=False) as directory:
        directory.begin()
        with pytest.raises(InputChangedError):
            pipeline.run(plan, budget, io, directory, shrink)
    assert not (tmp_path / "out").exists()


def test_a_failing_write_is_an_output_error_and_leaves_nothing(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, view: memoryview, offset: int) -> None:
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(descriptor, view, offset)

    write_all = platform.write_all
    monkeypatch.setattr(platform, "write_all", full)
    with pytest.raises(OutputError, match="Free some space") as caught:
        carry_out(plan_of(triple), tmp_path / "out", window=4096)
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_written(triple: Path, tmp_path: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in triple.rglob("*") if file.is_file()}
    carry_out(plan_of(triple), tmp_path / "out")
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
