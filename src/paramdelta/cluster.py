"""A merge over the machines of a Ray cluster: each shard of the plan is a task, the driver publishes.

Tasks are runs that make one shard each (`paramdelta.sharing`), so a worker or a node that dies costs its shard, and a
driver that starts again goes on with what is missing. Inputs must be readable and OUT writable from every node under
the same name: shared storage, or inputs that are read where they are.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paramdelta.api import estimate_memory
from paramdelta.engine.progress import Progress
from paramdelta.engine.receipt import is_complete
from paramdelta.errors import BudgetError, OutputError, ParamDeltaError, RecipeError
from paramdelta.merging import Conduct, carry_out_one, stop_if
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.recipe import checked_path
from paramdelta.planning.units import format_size, parse_size
from paramdelta.sharing import ShardsResult, merge_shards, missing_numbers
from paramdelta.storage.remote.stopping import ended_by

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paramdelta.planning.recipe import Recipe
    from paramdelta.planning.warnings import PlanWarning
    from paramdelta.results import MergeResult

CPUS: Final = 2
"""Processors that a task asks for: with twice as many workers, reading, computing and writing overlap."""

RETRIES: Final = 5
"""How often the task of a shard is given to another worker when its own has died."""

PATIENCE: Final = 60.0
"""Seconds for which a task waits for its shard: what a driver that died has left running ends within that."""

_POLL_SECONDS: Final = 0.5


def merge_on_ray(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    address: str | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    io: str = "auto",
    allow_nonfinite: bool = False,
    on_warning: Callable[[PlanWarning], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
) -> MergeResult:
    """Merge with the machines of a Ray cluster; the output is what `paramdelta.merge` writes, byte for byte.

    Args:
        address: of the cluster, by default what ``RAY_ADDRESS`` says; where that says nothing, one on this machine that
            ends with the merge.
        memory: most RAM of each task, which is also what it asks the cluster for.
        workers: threads of each task, by default four.

    Other arguments and errors as `paramdelta.merge`; also

    Raises:
        OutputError: a shard's worker died time and again.
        RecipeError: Ray is not installed, or the cluster cannot be reached.
    """
    ray = _import_ray()
    path = Path(os.path.abspath(checked_path(output, "output")))  # noqa: PTH100 (not there yet)
    with ended_by(cancelled):
        plan = make_plan(recipe)
    if on_warning is not None:
        for warning in plan.warnings:
            on_warning(warning)
    if not is_complete(path, plan):
        limit = estimate_memory(plan) if memory is None else parse_size(memory, "memory")
        settings = {"memory": limit, "workers": workers or 2 * CPUS, "io": io}
        with _Cluster(ray, address) as cluster:
            cluster.make_shards(
                _absolute(plan), path, missing_numbers(path, plan), settings, plan, on_progress, cancelled
            )
    stop_if(cancelled)
    how = Conduct(None, None, "auto", False, allow_nonfinite, None, None, cancelled)
    return carry_out_one(_absolute(plan), str(path), how)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RecipeError(
            "engine: Ray is not installed", remedy="Install it here and on every node: pip install 'paramdelta[ray]'"
        ) from error
    return ray


def _absolute(plan: Plan) -> Recipe:
    """Return the recipe with paths that mean the same wherever a task runs, and revisions as they were planned with."""
    recipe = plan.pinned_recipe
    here = [path for path in recipe.paths if os.path.lexists(path)]
    return recipe.moved({path: os.path.abspath(path) for path in here})  # noqa: PTH100 (links stay)


class _Cluster:
    """A connection to a Ray cluster, ended with the merge unless it was there before."""

    def __init__(self, ray: Any, address: str | None) -> None:
        self._ray = ray
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._ours = False

    def __enter__(self) -> _Cluster:
        if not self._ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own reports to nobody
            os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # it would try for ever
            options = {"address": self._address} if self._address else {"include_dashboard": False}
            try:
                with _own_signals():
                    self._ray.init(log_to_driver=False, logging_level="warning", **options)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise RecipeError(f"address: no Ray cluster at {self._address}: {error}") from error
            self._ours = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()

    def make_shards(
        self,
        recipe: Recipe,
        path: Path,
        numbers: list[int],
        settings: dict[str, Any],
        plan: Plan,
        on_progress: Callable[[Progress], None] | None,
        cancelled: threading.Event | None,
    ) -> None:
        """Make shards, each as a task. Raises what ends one of them; the others are stopped then."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus = min(CPUS, int(max(node.get("CPU", 0) for node in nodes)))
        most = max(node.get("memory", 0) for node in nodes)
        if not cpus or settings["memory"] > most:
            raise BudgetError(
                f"no node of the cluster has a processor and {format_size(settings['memory'])} of RAM for a task",
                remedy=f"Use less --memory: the largest node has {format_size(most)}; or add a node.",
            )
        task = self._ray.remote(_make_shard).options(
            num_cpus=cpus, memory=settings["memory"], max_retries=RETRIES, name="paramdelta-shard"
        )
        running = {task.remote(recipe, str(path), number, settings): number for number in numbers}
        made = set(range(1, len(plan.shards) + 1)) - set(numbers)
        begin = _progress(plan, made, 0)
        try:
            for number in self._finished(running, cancelled):
                made.add(number)
                if on_progress is not None:
                    on_progress(_progress(plan, made, begin.done))
        finally:
            for reference in running:
                self._ray.cancel(reference, force=True)

    def _finished(self, running: dict[Any, int], cancelled: threading.Event | None) -> Iterator[int]:
        """Yield the number of each shard when it is finished, until none is running."""
        while running:
            stop_if(cancelled)
            ready, _ = self._ray.wait([*running], num_returns=1, timeout=_POLL_SECONDS)
            for reference in ready:
                number = running.pop(reference)
                try:
                    self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    raise _cause(error, number) from error
                except self._ray.exceptions.RayError as error:
                    raise OutputError(
                        f"shard {number} could not be made: {type(error).__name__}, after {RETRIES} more tries",
                        remedy="Finished shards are kept: the same command goes on. Nodes may have too little memory.",
                    ) from error
                yield number


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what SIGTERM does here: Ray would let it end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cause(error: Any, number: int) -> ParamDeltaError:
    """Return what went wrong in the task of a shard."""
    cause = error.cause
    if isinstance(cause, ParamDeltaError):
        return cause
    return OutputError(
        f"shard {number} could not be made: {type(cause).__name__}: {cause}",
        remedy="Is the same version of paramdelta installed on every node?",
    )


def _make_shard(recipe: Recipe, output: str, number: int, settings: dict[str, Any]) -> ShardsResult:
    """Make one shard, on whichever machine this runs."""
    return merge_shards(recipe, output, [number], patience=PATIENCE, **settings)


def _progress(plan: Plan, made: set[int], resumed: int) -> Progress:
    sizes = [shard.size for shard in plan.shards]
    done = sum(sizes[number - 1] for number in made)
    return Progress(done, sum(sizes), len(made), len(sizes), resumed)
