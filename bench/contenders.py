"""What is compared: paramdelta with several budgets, and the peers as their users would run them."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from bench.triple import Triple

REFERENCE = "paramdelta"  # what the others are compared with
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
dtype: bfloat16
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


def mergekit(tools: Tools) -> Contender:
    """Enter mergekit's `linear` with weights 1, -1, 1 in bf16.

    Of its ways to compute ParamDelta this is the fastest and the most accurate one. Its performance options are for
    GPUs, pickles, or several output shards; on these inputs they make no difference beyond the noise, so it runs with
    its defaults. The triple has no tokenizer to copy.
    """

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:
        config = scratch / "mergekit.yml"
        paths = {role: str(triple.path(role)) for role in ("post", "base", "new_base")}
        config.write_text(MERGEKIT_CONFIG.format(**paths))
        return [str(tools.peers / "mergekit-yaml"), str(config), str(output), "--no-copy-tokenizer"]

    return Contender(
        "mergekit",
        "`linear`, weights 1, -1, 1, `normalize: false`, bf16",
        command,
        environment=(("HF_HUB_OFFLINE", "1"),),
    )


def torch_script(tools: Tools) -> Contender:
    """Enter a dozen lines of torch."""

    def command(triple: Triple, output: Path, scratch: Path) -> list[str]:  # noqa: ARG001
        paths = [str(triple.path(role)) for role in ("post", "base", "new_base")]
        return [str(tools.peers / "python"), str(PEERS / "torch_script.py"), *paths, str(output)]

    return Contender("torch", "`load_file` three times, `post - base + new_base` in bf16, `save_file`", command)


def all_contenders(tools: Tools) -> list[Contender]:
    """Return everything that can be compared."""
    small, large = 256 * 10**6, 10**9
    return [
        paramdelta(tools, REFERENCE, "default budget"),
        paramdelta(tools, "paramdelta-256MB", "small budget", "--memory", "256MB", budget=small),
        paramdelta(tools, "paramdelta-1GB", "large budget", "--memory", "1GB", budget=large),
        mergekit(tools),
        torch_script(tools),
    ]
