"""Merge post-training onto an updated base model: post - base + new_base, out of core and exactly rounded.

import paramdelta

result = paramdelta.merge("Llama-3-8B-Instruct", "Llama-3-8B", "Llama-3.1-8B", "out")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paramdelta.api import (
        analyze,
        analyze_recipe,
        estimate_memory,
        inspect,
        merge,
        merge_recipe,
        plan,
        score,
        sweep,
        sweep_recipes,
        verify,
        warnings_for,
    )
    from paramdelta.checkpoint.checkpoint import Checkpoint
    from paramdelta.cluster import merge_on_ray
    from paramdelta.engine.progress import Progress
    from paramdelta.errors import (
        BudgetError,
        CancelledError,
        CheckpointError,
        FetchError,
        HeaderError,
        InputChangedError,
        MismatchError,
        NonFiniteError,
        OutputError,
        ParamDeltaError,
        RecipeError,
        UnsupportedCheckpointError,
        VerificationError,
    )
    from paramdelta.insight.analysis import Analysis
    from paramdelta.insight.scores import Transfer, TransferReport
    from paramdelta.network import Network, network_of
    from paramdelta.planning.plan import Plan
    from paramdelta.planning.policies import Policies
    from paramdelta.planning.recipe import Delta, Recipe
    from paramdelta.planning.recipe_file import read_recipes
    from paramdelta.planning.warnings import PlanWarning
    from paramdelta.results import MergeResult, SweepResult, Verification
    from paramdelta.sharing import ShardsResult, commit, merge_shards

_HOMES = {
    "paramdelta.api": (
        "analyze",
        "analyze_recipe",
        "estimate_memory",
        "inspect",
        "merge",
        "merge_recipe",
        "plan",
        "score",
        "sweep",
        "sweep_recipes",
        "verify",
        "warnings_for",
    ),
    "paramdelta.checkpoint.checkpoint": ("Checkpoint",),
    "paramdelta.engine.progress": ("Progress",),
    "paramdelta.errors": (
        "BudgetError",
        "CancelledError",
        "CheckpointError",
        "FetchError",
        "HeaderError",
        "InputChangedError",
        "MismatchError",
        "NonFiniteError",
        "OutputError",
        "ParamDeltaError",
        "RecipeError",
        "UnsupportedCheckpointError",
        "VerificationError",
    ),
    "paramdelta.insight.analysis": ("Analysis",),
    "paramdelta.insight.scores": ("Transfer", "TransferReport"),
    "paramdelta.cluster": ("merge_on_ray",),
    "paramdelta.network": ("Network", "network_of"),
    "paramdelta.planning.plan": ("Plan",),
    "paramdelta.planning.policies": ("Policies",),
    "paramdelta.planning.recipe": ("Delta", "Recipe"),
    "paramdelta.planning.recipe_file": ("read_recipes",),
    "paramdelta.planning.warnings": ("PlanWarning",),
    "paramdelta.results": ("MergeResult", "SweepResult", "Verification"),
    "paramdelta.sharing": ("ShardsResult", "commit", "merge_shards"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Analysis",
    "BudgetError",
    "CancelledError",
    "Checkpoint",
    "CheckpointError",
    "Delta",
    "FetchError",
    "HeaderError",
    "InputChangedError",
    "MergeResult",
    "MismatchError",
    "Network",
    "NonFiniteError",
    "OutputError",
    "ParamDeltaError",
    "Plan",
    "PlanWarning",
    "Policies",
    "Progress",
    "Recipe",
    "RecipeError",
    "ShardsResult",
    "SweepResult",
    "Transfer",
    "TransferReport",
    "UnsupportedCheckpointError",
    "Verification",
    "VerificationError",
    "analyze",
    "analyze_recipe",
    "commit",
    "estimate_memory",
    "inspect",
    "merge",
    "merge_on_ray",
    "merge_recipe",
    "merge_shards",
    "network_of",
    "plan",
    "read_recipes",
    "score",
    "sweep",
    "sweep_recipes",
    "verify",
    "warnings_for",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import paramdelta` itself costs nothing."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'paramdelta' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
