"""Work in stages: each is done once, kept under a digest of what it depends on, and redone if it was interrupted.

A stage's directory appears complete or not at all. Checkpoints that no later stage reads are removed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

UNFINISHED = ".part"
OURS = re.compile(r".+-[0-9a-f]{12}(\.part)?")  # what may be removed


@dataclass(frozen=True)
class Stage:
    """One piece of work: an action, what it is told, and the stages whose directories it reads."""

    name: str
    action: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Stage] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Return what tells this work from other work; names do not count."""
        depends_on = [self.action, self.settings, {role: stage.key for role, stage in self.inputs.items()}]
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Workshop:
    """A directory in which stages are done.

    An action is called with the settings, the inputs' directories by role, and the directory to fill.
    """

    directory: Path
    actions: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Path], Path], None]]

    def place(self, stage: Stage) -> Path:
        """Return where a stage's files are once it is done."""
        return self.directory / f"{stage.name}-{stage.key}"

    def is_done(self, stage: Stage) -> bool:
        """Tell whether it is."""
        return self.place(stage).is_dir()

    def todo(self, stage: Stage) -> list[Stage]:
        """Return what is to be done for a stage, itself included, in order."""
        if self.is_done(stage):
            return []
        before = [each for source in stage.inputs.values() for each in self.todo(source)]
        return list({each.key: each for each in [*before, stage]}.values())

    def do(self, stage: Stage) -> Path:
        """Do a stage whose inputs are there."""
        place = self.place(stage)
        unfinished = place.with_name(place.name + UNFINISHED)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        inputs = {role: self.place(source) for role, source in stage.inputs.items()}
        self.actions[stage.action](stage.settings, inputs, unfinished)
        unfinished.rename(place)
        return place

    def tidy(self, wanted: Iterable[Stage]) -> None:
        """Remove what is neither wanted nor read by work that is still to be done for what is wanted."""
        keep = {self.place(stage) for each in wanted for stage in self._kept(each)}
        for place in self.directory.iterdir():
            if OURS.fullmatch(place.name) and place not in keep:
                shutil.rmtree(place)

    def _kept(self, stage: Stage) -> list[Stage]:
        if self.is_done(stage):
            return [stage]
        return [kept for source in stage.inputs.values() for kept in self._kept(source)]
