"""One fault, one case: in a fork, and then a look at what it left."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from paramdelta.checkpoint.discovery import STAGING
from paramdelta.engine.journal import JOURNAL
from paramdelta.engine.staging import Staging
from paramdelta.errors import ParamDeltaError
from tests.faults.disk import Disk, Recorder
from tests.faults.failures import FAULTS
from tests.faults.merges import SCENES, Scene, contents, make_inputs
from tests.faults.steps import WRITING, Step, Steps

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable
    from pathlib import Path

    from paramdelta.engine.progress import FinishedShard

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
POWER_CUT = "power cut"


class Report(NamedTuple):
    """How many cases there were of each scene and fault, and what went wrong."""

    cases: Counter[tuple[str, str]]
    wrong: list[str]


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
            scene.merge(self.inputs, root / "wanted")
            self.wanted[scene.name] = contents(root / "wanted")
            shutil.rmtree(root / "wanted")

    def fresh(self, scene: Scene) -> Path:
        """Return OUT as the scene has it at first."""
        output = self.root / "out"
        shutil.rmtree(output, ignore_errors=True)
        in_fork(lambda: scene.prepare(self.inputs, output))
        return output

    def check(self, scene: Scene, output: Path, kept: int = 0) -> list[str]:
        """Return what is wrong with what a fault left, and with what a repeated merge makes of it.

        Args:
            kept: so many shards are finished, and must not be made again.
        """
        wrong = self._broken_promises(scene, output)
        status = in_fork(lambda: self._repeat(scene, output, kept))
        if status != 0:
            return [*wrong, f"the merge cannot be repeated, or makes finished shards again: {status}"]
        found = contents(output)
        if {name: raw for name, raw in found.items() if name not in scene.keeps} != self.wanted[scene.name]:
            wrong.append("the repeated merge gives something else")
        if not scene.keeps <= found.keys():
            wrong.append("a file of the user's is gone")
        if contents(self.inputs) != self.before:
            wrong.append("an input was written")
        return wrong

    def _repeat(self, scene: Scene, output: Path, kept: int) -> None:
        result = scene.merge(self.inputs, output)
        assert result.already_complete or result.resumed_shards >= kept, (result.resumed_shards, kept)

    def _broken_promises(self, scene: Scene, output: Path) -> list[str]:
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


def every_step(ground: Ground, scene: Scene, name: str, stride: int, report: Report) -> None:
    """Let a fault happen at step 1, 1 + stride, … until a merge gets by without it."""
    number = 1
    while True:
        output = ground.fresh(scene)
        reached = ground.root / "reached"
        reached.unlink(missing_ok=True)
        status = in_fork(functools.partial(_disturbed, ground, scene, name, number, output, reached))
        if not reached.exists():
            return
        report.cases[scene.name, name] += 1
        what = reached.read_text()
        wrong = ground.check(scene, output)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in {0, 1}:
            wrong.append(f"an error that nobody planned for ({status})")
        report.wrong.extend(f"{scene.name}, {name} at step {number} ({what}): {each}" for each in wrong)
        number += stride


def _disturbed(ground: Ground, scene: Scene, name: str, number: int, output: Path, reached: Path) -> None:
    fault = FAULTS[name]
    noted = threading.Event()

    def before(step: Step) -> Any:
        if step.number < number:
            return None
        if step.number > number:
            noted.wait(60)  # another thread may be there already, and what kills it must not come before the note
            return fault.later(step, step.number - number)
        with reached.open("w") as file:
            file.write(f"{step.call} {' '.join(str(a) for a in step.arguments if isinstance(a, (str, os.PathLike)))}")
        noted.set()
        return fault.happen(step)

    with Steps(before, fault.calls):
        scene.merge(ground.inputs, output)


def power_cuts(ground: Ground, scene: Scene, stride: int, cuts: int, report: Report) -> None:
    """Cut the power before every step, and look at several disks that may be left."""
    log = ground.root / "cuts"
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir()
    output = ground.fresh(scene)
    order = random.Random(scene.name)

    finished = finished_shards(output)

    def look(number: int, disk: Disk) -> None:
        if number % stride == 0:
            for cut in range(cuts):
                found = disk.after_a_cut(order, (0.0, 1.0, 0.5, 0.9)[cut % 4])
                _materialise(found, output, log / f"{number:04}-{cut}-{finished}")

    def record() -> None:
        real = Staging.record

        def recorded(staging: Staging, shard: FinishedShard) -> None:
            nonlocal finished
            real(staging, shard)
            finished += 1

        Staging.record = recorded  # type: ignore[assignment, method-assign]
        with Steps(Recorder(output, look), WRITING):
            scene.merge(ground.inputs, output)

    if in_fork(record) != 0:
        report.wrong.append(f"{scene.name}: the recorded merge failed")
    for disk in sorted(log.iterdir()):
        shutil.rmtree(output, ignore_errors=True)
        disk.rename(output)
        report.cases[scene.name, POWER_CUT] += 1
        kept = 0 if scene.options.get("overwrite") else int(disk.name.split("-")[2])
        wrong = ground.check(scene, output, kept)
        report.wrong.extend(f"{scene.name}, power cut {disk.name}: {each}" for each in wrong)


def finished_shards(output: Path) -> int:
    """Return how many shards a journal tells of."""
    journal = output / STAGING / JOURNAL
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


_mkdir = os.mkdir  # as it is when no step is taken note of


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
        _mkdir(path)
