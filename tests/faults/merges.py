"""The merges that are disturbed: small triples, and what is in OUT before."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paramdelta import api
from paramdelta.planning.policies import Policies
from paramdelta.storage import platform
from tests.block_scaled import CONFIG, tensors_of
from tests.faults.steps import WRITING, Step, Steps, leave_now
from tests.make import normal, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from paramdelta.results import MergeResult

ROLES = ("post", "base", "new_base")


class Scene(NamedTuple):
    """A merge, what is in OUT before it, and whether OUT's filesystem takes direct writes."""

    name: str
    options: dict[str, Any]
    prepare: Callable[[Path, Path], None]
    keeps: frozenset[str] = frozenset()
    direct: bool = True

    def merge(self, inputs: Path, output: Path) -> MergeResult:
        """Merge as the scene has it."""
        with contextlib.ExitStack() as stack:
            if not self.direct:
                stack.enter_context(_without_direct_io())
            return merge(inputs, output, **self.options)


def merge(inputs: Path, output: Path, **options: Any) -> MergeResult:
    """Merge the triple that the options are for; with one worker step 17 is always the same one."""
    root = inputs / ("fp8" if "policies" in options else "bf16")
    post, base, new_base = (root / role for role in ROLES)
    return api.merge(post, base, new_base, output, **{"workers": 1, "io": "pread", **options})


@contextlib.contextmanager
def _without_direct_io() -> Iterator[None]:
    saved = platform._O_DIRECT
    platform._O_DIRECT = 0  # type: ignore[misc]
    try:
        yield
    finally:
        platform._O_DIRECT = saved  # type: ignore[misc]


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
            leave_now()

    with Steps(stop, WRITING):
        merge(inputs, output)


SCENES = (
    Scene("three shards", {}, nothing),
    Scene("one file", {"shard_size": "1GB"}, nothing),
    Scene("another output is replaced", {"overwrite": True}, older_output, frozenset({"notes.txt"})),
    Scene("the rest of three shards", {}, half_done),
    Scene("FP8 again", {"policies": Policies(fp8="requantise")}, nothing),
    Scene("through the page cache", {}, nothing, direct=False),
    Scene("three workers, direct reads", {"workers": 3, "io": "direct"}, nothing),
    Scene(
        "FP8 by three workers, mapped", {"policies": Policies(fp8="requantise"), "workers": 3, "io": "mmap"}, nothing
    ),
)


def make_inputs(root: Path) -> Path:
    """Write two small triples: three shards in BF16, two in block-scaled FP8."""
    for seed, role in enumerate(ROLES):
        tensors = {f"t{number}": normal((60, 70), seed=seed + 10 * number) for number in range(6)}
        write_checkpoint(root / "bf16" / role, tensors, shards=3, config={"from": role})
        (root / "bf16" / role / "tokenizer.json").write_text(f'{{"from": "{role}"}}')
        matrices = {name: np.random.default_rng(seed).normal(0, 0.02, (150, 140)) for name in "ab"}
        write_checkpoint(root / "fp8" / role, tensors_of(matrices, seed=seed), shards=2, config=CONFIG)
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}
