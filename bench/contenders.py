"""What is compared: paramdelta with several budgets, the peers as their users would run them, and the system's copy."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench.triple import ROLES

if TYPE_CHECKING:
    from bench.triple import Triple

REFERENCE = "paramdelta"  # what the others are compared with
MERGED = "merged"  # where in the scratch directory the reference's output of the rehearsal is kept
PEERS = Path(__file__).parent / "peers"

MERGEKIT_CONFIG = """\
merge_method: linear
models:
  - model: {post}
    parameters: {{weight: 1.0}}
  - model: {base}
    parameters: {{weight: -1.0}}
  - model: {new_base}
    parameters: {{weight: 1.0}}
parameters: {{normalize: false}}
"""


class CommandMaker(Protocol):
    """Something that makes the command which merges a triple into an output directory."""

    def __call__(self, triple: Triple, output: Path, scratch: Path) -> list[str]:
        """Return the command; helper files that it needs may be written into scratch."""
        ...


@dataclass(frozen=True)
class Contender:
    """Something that makes an output from a triple, as one process."""

    name: str
    about: str
    command: CommandMaker
    budget_bytes: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    reads: tuple[str, ...] = ROLES  # checkpoints of the triple, or what was merged before
    writes: bool = True
    single_file: bool = False  # knows no shards

    @property
    def merges(self) -> bool:
        """Tell whether its output is a merge, to be compared with paramdelta's and with the disk."""
        return self.reads == ROLES and self.writes

    @property
    def files_moved(self) -> int:
        """Count the checkpoints that are read and written."""
        return len(self.reads) + self.writes

    def files(self, triple: Triple, scratch: Path) -> list[Path]:
        """Return the weight files that it reads."""
        folders = [scratch / MERGED if name == MERGED else triple.path(name) for name in self.reads]
        return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


@dataclass(frozen=True)
class Tools:
    """Where the programs are."""

    paramdelta: Path
    peers: Path  # bin directory of the peers' virtual environment


def default_tools(root: Path) -> Tools:
    """Find paramdelta in the environment of this interpreter, peers from .venv-peers in the project."""
    beside = Path(sys.executable).with_name("paramdelta")
    found = shutil.which("paramdelta")
    return Tools(beside if beside.exists() or found is None else Path(found), root / ".venv-peers" / "bin")


def paramdelta(tools: Tools, name: str, about: str, *options: str, budget: int | None = None) -> Contender:
    """Enter the project itself."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        inputs = ["--post", str(triple.path("post")), "--base", str(triple.path("base"))]
        inputs += ["--new-base", str(triple.path("new_base"))]
        return [str(tools.paramdelta), "merge", *inputs, "-o", str(output), *options, "--json"]

    return Contender(name, about, command, budget)


def verify(tools: Tools) -> Contender:
    """Enter the reading of what the reference wrote, checked against its digests."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        return [str(tools.paramdelta), "verify", str(scratch / MERGED), "--json"]

    return Contender("verify", "`paramdelta verify` of its output", command, reads=(MERGED,), writes=False)


def mergekit(tools: Tools, name: str, about: str, dtypes: str) -> Contender:
    """Enter mergekit's `linear` with weights 1, -1, 1.

    Of its ways to compute ParamDelta this is the fastest and the most accurate one. Its performance options are for
    GPUs, pickles, or several output shards; on these inputs they make no difference beyond the noise, so it runs with
    its defaults. The triple has no tokenizer to copy.
    """

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:
        config = scratch / f"{name}.yml"
        paths = {role: str(triple.path(role)) for role in ROLES}
        config.write_text(MERGEKIT_CONFIG.format(**paths) + dtypes)
        return [str(tools.peers / "mergekit-yaml"), str(config), str(output), "--no-copy-tokenizer"]

    return Contender(name, about, command, environment=(("HF_HUB_OFFLINE", "1"),))


def script(tools: Tools, name: str, about: str, *, single_file: bool = False) -> Contender:
    """Enter a script from `peers`, run by the peers' interpreter."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        paths = [str(triple.path(role)) for role in ("post", "base", "new_base")]
        return [str(tools.peers / "python"), str(PEERS / f"{name.replace('-', '_')}_script.py"), *paths, str(output)]

    return Contender(name, about, command, single_file=single_file)


def copy() -> Contender:
    """Enter the system's own copy of one input: what moving one file from the disk to the disk takes."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        return ["cp", "-R", "--reflink=never", str(triple.path("new_base")), str(output)]

    return Contender("cp", "the system's own copy of one of the three inputs", command, reads=("new_base",))


def all_contenders(tools: Tools) -> list[Contender]:
    """Return everything that can be compared."""
    small, large = 256 * 10**6, 10**9
    return [
        paramdelta(tools, REFERENCE, "default budget"),
        paramdelta(tools, "paramdelta-256MB", "small budget", "--memory", "256MB", budget=small),
        paramdelta(tools, "paramdelta-1GB", "large budget", "--memory", "1GB", budget=large),
        mergekit(tools, "mergekit", "`linear`, weights 1, -1, 1, `normalize: false`, bf16", "dtype: bfloat16\n"),
        mergekit(
            tools,
            "mergekit-f32",
            "the same, tensors taken to f32 and the result to bf16",
            "dtype: float32\nout_dtype: bfloat16\n",
        ),
        script(tools, "sd-mecha", "`add_difference`, merged in f32, written in bf16", single_file=True),
        script(tools, "torch", "`load_file` three times, `post - base + new_base` in bf16, `save_file`"),
        copy(),
        verify(tools),
    ]
