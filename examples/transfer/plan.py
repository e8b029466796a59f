"""What is trained, merged and scored: the four scenarios of the ParamΔ paper, as stages.

Per seed:

    base ── update ──► new-small ── more, harder ──► new-large
    base ── post-training ──► post-all, post-most, post-one       (all skills, all but one, that one)
    merges: post − base + new base                                (what ParamΔ gives)
    new base ── the same post-training ──► direct                 (what it is to replace)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from examples.transfer.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VERSION = 1  # of what stages do: raise it, and all of them are done anew


@dataclass(frozen=True)
class Training:
    """Steps, rows a step, and the highest learning rate."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Sizes:
    """How large the experiment is."""

    seeds: tuple[int, ...]
    skills: tuple[str, ...]
    one: str  # the skill of the task-specific scenario
    small: Training
    large: Training
    all_skills: Training
    one_skill: Training
    items: int
    blocks: int
    alphas: tuple[float, ...] = ()  # beside 0 and 1
    pairs: tuple[float, ...] = ()  # the coefficient of both of two deltas
    mixes: tuple[tuple[float, float], ...] = ()  # coefficients of the first and of the second
    scenarios: tuple[str, ...] = ("general", "task", "continual", "two deltas")

    @property
    def most(self) -> tuple[str, ...]:
        """Return all skills but that one."""
        return tuple(skill for skill in self.skills if skill != self.one)


@dataclass(frozen=True)
class Entry:
    """One line of the results: which checkpoint, in which scenario and role, and the stage that scores it."""

    scenario: str
    role: str
    seed: int
    stage: Stage
    about: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Makes the stages of an experiment. ``corpus`` stands for the domain's text."""

    sizes: Sizes
    corpus: str

    def entries(self) -> list[Entry]:
        """Return all that is scored, what says most first."""
        return [entry for seed in self.sizes.seeds for entry in self.of_seed(seed)]

    def of_seed(self, seed: int) -> Iterator[Entry]:
        """Yield what is scored with one seed. A scenario's updated base is the lower end, direct training the upper."""
        base, small = self.base(), self.new_small(seed)
        post, direct = self.post(base, "all", seed), self.post(small, "all", seed)
        merged = self.merge(post, base, small)
        if "general" in self.sizes.scenarios:
            yield self.scored("general", "base", seed, base)
            yield self.scored("general", "post", seed, post)
            yield self.scored("general", "new base", seed, small)
            yield self.scored("general", "merged", seed, merged)
            yield self.scored("general", "direct", seed, direct)
            yield self.compared("general", "likeness", seed, small, direct, merged)
            yield Entry("general", "decoded", seed, self.decoded(merged))
        if "continual" in self.sizes.scenarios:
            large = self.new_large(seed)
            both = self.merge(post, base, large), self.post(large, "all", seed)
            yield self.scored("continual", "new base", seed, large)
            yield self.scored("continual", "merged", seed, both[0])
            yield self.scored("continual", "direct", seed, both[1])
            yield self.compared("continual", "likeness", seed, large, both[1], both[0])
        for alpha in self.sizes.alphas:
            yield self.scored("alpha", "merged", seed, self.merge(post, base, small, alpha), alpha=alpha)
        one = self.post(base, "one", seed)
        if "task" in self.sizes.scenarios:
            yield self.scored("task", "post", seed, one)
            yield self.scored("task", "merged", seed, self.merge(one, base, small))
            yield self.scored("task", "direct", seed, self.post(small, "one", seed))
        if "two deltas" in self.sizes.scenarios:
            most = self.post(base, "most", seed)
            yield self.scored("two deltas", "merged, first alone", seed, self.merge(most, base, small))
            for alpha in self.sizes.pairs:
                pair = self.merge_two(most, one, base, small, (alpha, alpha))
                yield self.scored("two deltas", "merged", seed, pair, alpha=alpha)
                yield Entry("two deltas", "decoded", seed, self.decoded(pair), {"alpha": alpha})
            for first, second in self.sizes.mixes:
                pair = self.merge_two(most, one, base, small, (first, second))
                yield self.scored("two deltas", "mixed", seed, pair, first=first, second=second)

    def base(self) -> Stage:
        """Return the stage that writes the model that all begins with."""
        return Stage("base", "base", {"version": VERSION})

    def new_small(self, seed: int) -> Stage:
        """Return the update of the base."""
        return self._update("new-small", self.base(), self.sizes.small, seed)

    def new_large(self, seed: int) -> Stage:
        """Return the update's sequel, longer and harder."""
        return self._update("new-large", self.new_small(seed), self.sizes.large, seed + 1000)

    def post(self, start: Stage, which: str, seed: int) -> Stage:
        """Return the post-training of a checkpoint; the data depend on the seed, not on where it starts."""
        skills = {"all": self.sizes.skills, "most": self.sizes.most, "one": (self.sizes.one,)}[which]
        training = self.sizes.one_skill if which == "one" else self.sizes.all_skills
        settings = {"skills": skills, "seed": seed, **asdict(training)}
        return Stage(f"{start.name}-post-{which}-{seed}", "post-train", settings, {"start": start})

    def merge(self, post: Stage, base: Stage, new_base: Stage, alpha: float = 1.0) -> Stage:
        """Return the merge of one delta, by `paramdelta merge`."""
        inputs = {"post": post, "base": base, "new_base": new_base}
        return Stage(f"merged-{new_base.name}-{post.name}-{alpha:g}", "merge", {"alpha": alpha}, inputs)

    def merge_two(
        self, first: Stage, second: Stage, base: Stage, new_base: Stage, alphas: tuple[float, float]
    ) -> Stage:
        """Return the merge of two deltas, by `paramdelta run`."""
        inputs = {"first": first, "second": second, "base": base, "new_base": new_base}
        name = f"merged-two-{new_base.name}-{'-'.join(f'{alpha:g}' for alpha in alphas)}"
        return Stage(name, "merge-two", {"alphas": alphas}, inputs)

    def scored(self, scenario: str, role: str, seed: int, checkpoint: Stage, **about: float) -> Entry:
        """Return the entry of a checkpoint's scores."""
        settings = {"skills": self.sizes.skills, "items": self.sizes.items, "blocks": self.sizes.blocks}
        settings["corpus"] = self.corpus
        stage = Stage(f"score-{checkpoint.name}", "score", settings, {"checkpoint": checkpoint})
        return Entry(scenario, role, seed, stage, about)

    def compared(self, scenario: str, role: str, seed: int, start: Stage, one: Stage, other: Stage) -> Entry:
        """Return the entry of the angle between two ways from one checkpoint."""
        stage = Stage(f"angle-{one.name}", "angle", {}, {"start": start, "one": one, "other": other})
        return Entry(scenario, role, seed, stage)

    def decoded(self, checkpoint: Stage) -> Stage:
        """Return the check that scores are those of decoded answers."""
        settings = {"skills": self.sizes.skills, "items": min(20, self.sizes.items)}
        return Stage(f"decode-{checkpoint.name}", "decode", settings, {"checkpoint": checkpoint})

    def _update(self, name: str, start: Stage, training: Training, seed: int) -> Stage:
        settings = {"corpus": self.corpus, "seed": seed, **asdict(training)}
        return Stage(f"{name}-{seed % 1000}", "update", settings, {"start": start})
