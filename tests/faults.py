"""Faults of every kind at every step of a merge, and what is left afterwards.

`python -m tests.faults` does all of it, some minutes long, and writes `docs/faults.md`; `tests/test_faults.py` does a
part. A step is a system call that creates, writes, reserves, cuts, syncs, renames or removes. Every case runs in a fork
of a process in which the kernels are loaded, with one worker, so that step 17 is always the same one. After each:

- where the index (or the single model file) is in place, everything that it names is complete and right;
- the same merge, repeated, gives the same files, byte for byte, as one that nothing disturbed;
- inputs and files of the user's are untouched.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paramdelta import api
from paramdelta.errors import ParamDeltaError
from paramdelta.planning.policies import Policies
from paramdelta.storage import platform
from tests.block_scaled import CONFIG, tensors_of
from tests.make import normal, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from paramdelta.results import MergeResult

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CALLS = ("open", "pwrite", "ftruncate", "fsync", "replace", "unlink", "mkdir", "rmdir")
ROLES = ("post", "base", "new_base")


# -- the merges ------------------------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """A merge, and what is in OUT before it."""

    name: str
    options: dict[str, Any]
    prepare: Callable[[Path, Path], None]
    keeps: frozenset[str] = frozenset()


def nothing(_inputs: Path, _output: Path) -> None:
    """OUT does not exist."""


def older_output(inputs: Path, output: Path) -> None:
    """OUT holds another merge, and a file of the user's."""
    merge(inputs, output, alpha=0.5)
    (output / "notes.txt").write_text("mine")


def half_done(inputs: Path, output: Path) -> None:
    """OUT holds the first shards of this merge."""

    def stop(step: Step) -> None:
        if step.shards_synced == 2:
            os._exit(0)

    with Steps(stop):
        merge(inputs, output)


SCENES = (
    Scene("three shards", {}, nothing),
    Scene("one file", {"shard_size": "1GB"}, nothing),
    Scene("another output is replaced", {"overwrite": True}, older_output, frozenset({"notes.txt"})),
    Scene("the rest of three shards", {}, half_done),
    Scene("FP8 again", {"policies": Policies(fp8="requantise")}, nothing),
)


def make_inputs(root: Path) -> Path:
    """Write two small triples: three shards in BF16, two in block-scaled FP8."""
    import numpy as np

    for seed, role in enumerate(ROLES):
        tensors = {f"t{number}": normal((60, 70), seed=seed + 10 * number) for number in range(6)}
        write_checkpoint(root / "bf16" / role, tensors, shards=3, config={"from": role})
        (root / "bf16" / role / "tokenizer.json").write_text(f'{{"from": "{role}"}}')
        matrices = {name: np.random.default_rng(seed).normal(0, 0.02, (150, 140)) for name in "ab"}
        write_checkpoint(root / "fp8" / role, tensors_of(matrices, seed=seed), shards=2, config=CONFIG)
    return root


def merge(inputs: Path, output: Path, **options: Any) -> MergeResult:
    """Merge the triple that the options are for, with one worker."""
    root = inputs / ("fp8" if "policies" in options else "bf16")
    post, base, new_base = (root / role for role in ROLES)
    return api.merge(post, base, new_base, output, workers=1, io="pread", **options)


def contents(root: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


# -- steps -----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A system call that is about to be made: its number, name and arguments, and how many shards are synced."""

    number: int
    call: str
    arguments: tuple[Any, ...]
    shards_synced: int


class Steps:
    """Calls ``before`` with every step, and makes the call unless that returns something else to return."""

    def __init__(self, before: Callable[[Step], Any]) -> None:
        self._before = before
        self._number = 0
        self._records = 0
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Steps:
        places = [(os, name) for name in CALLS] + [(platform, "_fallocate")]
        for module, name in places:
            real = getattr(module, name)
            self._saved.append((module, name, real))
            setattr(module, name, functools.partial(self._called, name.lstrip("_"), real))
        self._saved.append((shutil, "_use_fd_functions", shutil._use_fd_functions))  # type: ignore[attr-defined]
        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, real in reversed(self._saved):
            setattr(module, name, real)

    def _called(self, name: str, real: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if name == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **named)
        self._number += 1
        self._records += name == "pwrite" and bytes(arguments[1][:9]) == b'{"shard":'
        instead = self._before(Step(self._number, name, arguments, self._records))
        return real(*arguments, **named) if instead is None else instead


# -- cases in forks --------------------------------------------------------------------------------------------------


def in_fork(work: Callable[[], Any]) -> int:
    """Do something in a fork of this process; return its wait status: 0 done, 256 a deliberate error, else it died."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except ParamDeltaError:
            code = 1
        except BaseException as error:  # the parent reports it
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]


class Ground:
    """Where cases happen: inputs, what an undisturbed merge gives for each scene, and a place to work in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = make_inputs(root / "inputs")
        self.before = contents(self.inputs)
        self.wanted: dict[str, dict[str, bytes]] = {}
        for scene in SCENES:  # also loads the kernels, before any fork
            merge(self.inputs, root / "wanted", **scene.options)
            self.wanted[scene.name] = contents(root / "wanted")
            shutil.rmtree(root / "wanted")

    def fresh(self, scene: Scene) -> Path:
        """Return OUT as the scene has it at first."""
        output = self.root / "out"
        shutil.rmtree(output, ignore_errors=True)
        in_fork(lambda: scene.prepare(self.inputs, output))
        return output

    def check(self, scene: Scene, output: Path) -> list[str]:
        """Return what is wrong with what a fault left, and with what a repeated merge makes of it."""
        wrong = self.broken_promises(scene, output)
        status = in_fork(lambda: merge(self.inputs, output, **scene.options))
        if status != 0:
            return [*wrong, f"the merge cannot be repeated: {status}"]
        found = contents(output)
        if {name: raw for name, raw in found.items() if name not in scene.keeps} != self.wanted[scene.name]:
            wrong.append("the repeated merge gives something else")
        if not scene.keeps <= found.keys():
            wrong.append("a file of the user's is gone")
        if contents(self.inputs) != self.before:
            wrong.append("an input was written")
        return wrong

    def broken_promises(self, scene: Scene, output: Path) -> list[str]:
        """Return what an index or a single model file in place promises and does not hold."""
        if (output / INDEX).exists():
            names = set(json.loads((output / INDEX).read_bytes())["weight_map"].values())
        elif (output / SINGLE).exists():
            names = {SINGLE}
        else:
            return []
        wanted = self.wanted[scene.name]
        receipt = json.loads((output / "paramdelta.json").read_bytes())
        if receipt["fingerprint"] != json.loads(wanted["paramdelta.json"])["fingerprint"]:
            sizes = {entry["name"]: entry["bytes"] for entry in receipt["files"]}
            return [f"{name} is incomplete" for name in names if (output / name).stat().st_size != sizes[name]]
        return [f"{name} is not what the index promises" for name in names if _read(output / name) != wanted[name]]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


# -- kinds of faults -------------------------------------------------------------------------------------------------


def die(step: Step) -> None:
    """Kill the process before the call."""
    del step
    os.kill(os.getpid(), signal.SIGKILL)


def die_halfway(step: Step) -> None:
    """Write the first half, then kill the process."""
    if step.call == "pwrite":
        descriptor, data, offset = step.arguments
        half = len(data) // 2 // 4096 * 4096 or (len(data) // 2 if len(data) < 4096 else 0)
        if half:
            _pwrite(descriptor, data[:half], offset)
    die(step)


_pwrite = os.pwrite


def fail_with(code: int) -> Callable[[Step], Any]:
    """Let the call fail."""

    def fail(step: Step) -> Any:
        if step.call == "fallocate":
            import ctypes

            ctypes.set_errno(code)
            return -1
        raise OSError(code, os.strerror(code))

    return fail


def write_less(step: Step) -> Any:
    """Write less than was asked for: a block, or a byte."""
    if step.call != "pwrite":
        return None
    descriptor, data, offset = step.arguments
    return _pwrite(descriptor, data[: 4096 if len(data) > 4096 else 1], offset) if len(data) > 1 else None


FAULTS: dict[str, Callable[[Step], Any]] = {
    "killed": die,
    "killed in a write": die_halfway,
    "EIO": fail_with(errno.EIO),
    "ENOSPC": fail_with(errno.ENOSPC),
    "short write": write_less,
}


class Report(NamedTuple):
    """How many cases there were of each scene and fault, and what went wrong."""

    cases: Counter[tuple[str, str]]
    wrong: list[str]


def every_step(ground: Ground, scene: Scene, fault: str, stride: int, report: Report) -> None:
    """Let a fault happen at step 1, 1 + stride, … until a merge gets by without it."""
    number = 1
    while True:
        output = ground.fresh(scene)
        reached = ground.root / "reached"
        reached.unlink(missing_ok=True)
        status = in_fork(functools.partial(_disturbed, ground, scene, fault, number, output, reached))
        if not reached.exists():
            return
        report.cases[scene.name, fault] += 1
        what = reached.read_text()
        wrong = ground.check(scene, output)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in {0, 1}:
            wrong.append(f"an error that nobody planned for ({status})")
        report.wrong.extend(f"{scene.name}, {fault} at step {number} ({what}): {each}" for each in wrong)
        number += stride


def _disturbed(ground: Ground, scene: Scene, fault: str, number: int, output: Path, reached: Path) -> None:
    def before(step: Step) -> Any:
        if step.number != number:
            return None
        with reached.open("w") as file:
            file.write(f"{step.call} {' '.join(str(a) for a in step.arguments if isinstance(a, (str, Path)))}")
        return FAULTS[fault](step)

    with Steps(before):
        merge(ground.inputs, output, **scene.options)


# -- power loss ------------------------------------------------------------------------------------------------------


class Disk:
    """What a disk may hold after a power cut: what was synced, and any part of what was not.

    Files are numbered like inodes. A file's bytes are safe up to its last sync, a directory's entries up to its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.safe: dict[int, bytes] = {}
        self.pending: dict[int, list[tuple[str, int, bytes]]] = {}
        self.entries: dict[Path, int | None] = {}  # None: a directory
        self.changes: list[tuple[Path, Path | None, int | None]] = []  # gone, come, what; not yet synced
        self._now: dict[Path, int | None] = {}
        self._open: dict[int, int | Path] = {}
        self._next = 0

    def opened(self, path: Path, descriptor: int) -> None:
        """Take note of a file that was created or opened, or of a directory."""
        if path.is_dir():
            self._open[descriptor] = path
            return
        if self._now.get(path) is None:
            self._next += 1
            self.safe[self._next], self.pending[self._next] = b"", []
            self._change(path, path, self._next)
        number = self._now[path]
        assert number is not None
        self._open[descriptor] = number

    def _change(self, gone: Path, come: Path | None, what: int | None) -> None:
        self._now.pop(gone, None)
        if come is not None:
            self._now[come] = what
        self.changes.append((gone, come, what))

    def made(self, path: Path) -> None:
        """Take note of a new directory."""
        self._change(path, path, None)

    def removed(self, path: Path) -> None:
        """Take note of a file or directory that was removed."""
        self._change(path, None, None)

    def renamed(self, old: Path, new: Path) -> None:
        """Take note of a rename."""
        self._change(old, new, self._now.get(old))

    def changed(self, descriptor: int, what: str, place: int, data: bytes) -> None:
        """Take note of a write, or of a new size."""
        number = self._open.get(descriptor)
        if isinstance(number, int):
            self.pending[number].append((what, place, data))

    def synced(self, descriptor: int) -> None:
        """Take note of a sync, of a file or of a directory."""
        what = self._open.get(descriptor)
        if isinstance(what, Path):
            kept = []
            for change in self.changes:
                places = {path.parent for path in change[:2] if path is not None}
                if what in places:
                    _enter(self.entries, change)
                else:
                    kept.append(change)
            self.changes = kept
        elif what is not None:
            self.safe[what] = _written(self.safe[what], self.pending[what])
            self.pending[what] = []

    def after_a_cut(self, order: random.Random, share: float) -> dict[Path, bytes | None]:
        """Return files and directories: all that is safe, and of each other change a share."""
        entries = dict(self.entries)
        for change in self.changes:
            if order.random() < share:
                _enter(entries, change)
        found: dict[Path, bytes | None] = {}
        for path, number in entries.items():
            parents = set(path.parents)
            if not all(parent in entries for parent in parents if self.root in (parent, *parent.parents)):
                continue
            if number is None:
                found[path] = None
            else:
                lucky = [write for write in self.pending[number] if order.random() < share]
                found[path] = _written(self.safe[number], lucky)
        return found


def _enter(entries: dict[Path, int | None], change: tuple[Path, Path | None, int | None]) -> None:
    gone, come, what = change
    entries.pop(gone, None)
    if come is not None:
        entries[come] = what


def _written(content: bytes, writes: Iterable[tuple[str, int, bytes]]) -> bytes:
    raw = bytearray(content)
    for what, place, data in writes:
        if what == "size":
            raw = raw[:place] + bytes(max(0, place - len(raw)))
        else:
            raw += bytes(max(0, place + len(data) - len(raw)))
            raw[place : place + len(data)] = data
    return bytes(raw)


class Recorder:
    """Records on a `Disk` what a merge does, and looks at what a power cut would leave after each step."""

    def __init__(self, output: Path, look: Callable[[int, Disk], None]) -> None:
        self.disk = Disk(output)
        self._look = look
        self._open, self._close = os.open, os.close

    def __call__(self, step: Step) -> Any:
        self._look(step.number, self.disk)
        arguments = step.arguments
        if step.call == "open":
            descriptor = self._open(*arguments)
            self.disk.opened(Path(arguments[0]), descriptor)
            return descriptor
        if step.call in {"mkdir", "unlink", "rmdir"}:
            (self.disk.made if step.call == "mkdir" else self.disk.removed)(Path(arguments[0]))
        elif step.call == "replace":
            self.disk.renamed(Path(arguments[0]), Path(arguments[1]))
        elif step.call == "pwrite":
            self.disk.changed(arguments[0], "data", arguments[2], bytes(arguments[1]))
        elif step.call == "ftruncate":
            self.disk.changed(arguments[0], "size", arguments[1], b"")
        elif step.call == "fallocate":
            self.disk.changed(arguments[0], "size", arguments[3], b"")
        elif step.call == "fsync":
            self._note_directory(arguments[0])
            self.disk.synced(arguments[0])
        return None

    def _note_directory(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            self.disk.opened(path, descriptor)


def power_cuts(ground: Ground, scene: Scene, stride: int, cuts: int, report: Report) -> None:
    """Cut the power before every step, and look at several disks that may be left."""
    log = ground.root / "cuts"
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir()
    output = ground.fresh(scene)
    if scene.prepare is not nothing:
        return  # what is on the disk before the merge is not recorded
    order = random.Random(scene.name)

    def look(number: int, disk: Disk) -> None:
        if number % stride == 0:
            for cut in range(cuts):
                found = disk.after_a_cut(order, (0.0, 1.0, 0.5, 0.9)[cut % 4])
                _materialise(found, output, log / f"{number:04}-{cut}")

    os_mkdir = os.mkdir

    def _materialise(found: dict[Path, bytes | None], old: Path, new: Path) -> None:
        for path, raw in sorted(found.items()):
            target = new / path.relative_to(old)
            if raw is None:
                _make_all(target)
            else:
                _make_all(target.parent)
                with target.open("wb") as file:
                    file.write(raw)

    def _make_all(path: Path) -> None:
        if not path.exists():
            _make_all(path.parent)
            os_mkdir(path)

    def record() -> None:
        with Steps(Recorder(output, look)):
            merge(ground.inputs, output, **scene.options)

    if in_fork(record) != 0:
        report.wrong.append(f"{scene.name}: the recorded merge failed")
    for disk in sorted(log.iterdir()):
        shutil.rmtree(output, ignore_errors=True)
        disk.rename(output)
        report.cases[scene.name, "power cut"] += 1
        report.wrong.extend(f"{scene.name}, power cut {disk.name}: {each}" for each in ground.check(scene, output))


# -- all of it -------------------------------------------------------------------------------------------------------


def run(root: Path, stride: int, cuts: int) -> Report:
    """Let everything happen at every step, or at every so many."""
    ground = Ground(root)
    report = Report(Counter(), [])
    for scene in SCENES:
        for fault in FAULTS:
            every_step(ground, scene, fault, stride, report)
        power_cuts(ground, scene, stride, cuts, report)
    return report


def rows(report: Report) -> Iterator[str]:
    """Yield the lines of a table: scenes down, faults across."""
    kinds = [*FAULTS, "power cut"]
    yield f"| merge | {' | '.join(kinds)} |"
    yield f"|---|{'--:|' * len(kinds)}"
    for scene in SCENES:
        yield f"| {scene.name} | {' | '.join(str(report.cases[scene.name, kind]) for kind in kinds)} |"


def main() -> int:
    """Run everything, or with arguments every N-th step and so many cuts, and write the record."""
    stride, cuts = (int(argument) for argument in sys.argv[1:3]) if len(sys.argv) > 2 else (1, 6)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paramdelta-faults-") as root:
        report = run(Path(root).resolve(), stride, cuts)
    seconds = time.monotonic() - started
    record = f"""# Faults

Written by `python -m tests.faults` (`make faults`): a merge is disturbed at each of its steps, one case each. A step is
a system call that creates, writes, reserves, cuts, syncs, renames or removes. A power cut leaves what was synced and
any part of what was not. After each case the promise is checked, and the merge repeated: the files must be those of a
merge that nothing disturbed, inputs and the user's files untouched.

{chr(10).join(rows(report))}

**{sum(report.cases.values()):,} cases, {len(report.wrong)} of them wrong**, in {seconds:.0f} s.
"""
    print(record)
    print("\n".join(report.wrong[:40]))
    if stride == 1 and not report.wrong:
        (Path(__file__).parent.parent / "docs" / "faults.md").write_text(record, encoding="utf-8")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
