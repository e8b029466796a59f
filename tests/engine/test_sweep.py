"""Several coefficients in one pass: the same outputs as one by one, of inputs that are read once."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paramdelta import api
from paramdelta.checkpoint.discovery import STAGING
from paramdelta.engine import pipeline
from paramdelta.engine.budget import Budget, Shape
from paramdelta.engine.feed import Variant
from paramdelta.engine.output import DOCUMENTS, OutputDirectory
from paramdelta.engine.receipt import RECEIPT
from paramdelta.errors import (
    BudgetError,
    CancelledError,
    InputChangedError,
    MismatchError,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from paramdelta.planning import variants
from paramdelta.planning.plan import make_plan
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Delta, Recipe
from paramdelta.planning.variants import alpha_name, make_plans
from paramdelta.results import MergeResult
from paramdelta.storage.source import PositionalSource
from tests.block_scaled import CONFIG, tensors_of
from tests.make import at_odd_offsets, encode, llama_shapes, normal, skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paramdelta.engine.progress import Progress
    from paramdelta.planning.layout import OutputShard
    from paramdelta.planning.plan import Plan
    from paramdelta.results import SweepResult
    from paramdelta.storage.sink import FileSink
    from tests.make import Tensor

ALPHAS = (0.25, 0.5, 1.0)
ROLES = ("post", "base", "new_base")
SHARDS = 4


def recipe_of(root: Path, alpha: float = 1.0, **options: Any) -> Recipe:
    return Recipe.of(*(root / role for role in ROLES), alpha=alpha, **options)


def sweep(root: Path, output: Path, alphas: Sequence[float] = ALPHAS, **options: Any) -> SweepResult:
    post, base, new_base = (root / role for role in ROLES)
    return api.sweep(post, base, new_base, output, alphas, **options)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def below(root: Path, recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    return {str(root / str(number)): recipe for number, recipe in enumerate(recipes)}


def made(result: SweepResult, place: int) -> MergeResult:
    found = [*result.merges.values()][place]
    assert isinstance(found, MergeResult)
    return found


def same(one: Path, other: Path) -> None:
    """Check that two outputs are the same, but for the last digits of statistics."""
    files, others = contents(one), contents(other)
    receipt, another = (json.loads(each.pop(RECEIPT)) for each in (files, others))
    assert files == others != {}
    totals = [each.pop("statistics")["total"] for each in (receipt, another)]
    assert receipt | {"sha256": ""} == another | {"sha256": ""}
    for total, known in zip(*totals, strict=True):
        assert {name: value for name, value in total.items() if name != "mean"} == pytest.approx(
            {name: value for name, value in known.items() if name != "mean"}, rel=1e-12
        )


# -- the same outputs --------------------------------------------------------------------------------------------------


def mixed(root: Path) -> list[Recipe]:
    """Dtypes of all kinds, and tensors that are only copied, in shards that are cut differently."""
    for seed, (role, shards) in enumerate(zip(ROLES, (3, 1, 2), strict=True)):
        tensors: dict[str, Tensor] = {
            "embed": normal((117, 129), seed=seed),
            "wide": normal((3, 70_001), seed=seed),
            "scale": normal((1001,), "F32", seed=seed),
            "half": normal((33, 77), "F16", seed=seed),
            "double": normal((251,), "F64", seed=seed),
            "empty": normal((0, 16), seed=seed),
            "steps": ("I64", (3,), encode([seed, 2, 3], "I64")),
            "mask": ("BOOL", (5,), bytes([1, 0, 1, 1, seed % 2])),
        }
        write_checkpoint(root / role, at_odd_offsets(tensors), shards=shards, config={"from": role}, align=1)
        (root / role / "tokenizer.json").write_text(f'{{"from": "{role}"}}')
    return [recipe_of(root, alpha, alphas={"half": -0.75}) for alpha in ALPHAS]


def two_deltas(root: Path) -> list[Recipe]:
    for seed, role in enumerate("pbqn"):
        write_checkpoint(root / role, {"v": normal((90, 70), seed=seed), "w": normal((9,), "F32", seed=seed)}, shards=2)
    first, other = ((str(root / post), str(root / "b")) for post in "pq")
    mixes = ((1.0, 0.0), (0.6, 0.4), (1.0, -1.0))
    return [Recipe(str(root / "n"), (Delta(*first, one), Delta(*other, two))) for one, two in mixes]


def block_scaled(root: Path) -> list[Recipe]:
    for seed, role in enumerate(ROLES):
        rng = np.random.default_rng(seed)
        matrices = {name: rng.normal(0, 0.02, shape) for name, shape in {"a": (300, 500), "b": (257, 3000)}.items()}
        write_checkpoint(root / role, tensors_of(matrices, seed=seed), shards=seed + 1, config=CONFIG)
    return [recipe_of(root, alpha, policies=Policies(fp8="requantise")) for alpha in ALPHAS]


def padded(root: Path) -> list[Recipe]:
    """A head of post's own on a tied new base with fewer rows."""
    for seed, (role, vocab) in enumerate(zip(ROLES, (104, 96, 96), strict=True)):
        tied = role != "post"
        shapes = llama_shapes(vocab=vocab, tied=tied)
        config = {"model_type": "qwen2", "tie_word_embeddings": tied, "vocab_size": vocab}
        tensors = {name: normal(shape, seed=seed) for name, shape in shapes.items()}
        write_checkpoint(root / role, tensors, shards=seed + 1, config=config)
    return [recipe_of(root, alpha, policies=Policies(vocab="pad")) for alpha in ALPHAS]


KINDS = {each.__name__: each for each in (mixed, two_deltas, block_scaled, padded)}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_output_is_what_a_merge_by_itself_writes(kind: str, workers: int, tmp_path: Path) -> None:
    recipes = KINDS[kind](tmp_path)
    result = api.sweep_recipes(below(tmp_path / "all", recipes), workers=workers)
    for number, recipe in enumerate(recipes):
        alone = api.merge_recipe(recipe, tmp_path / "each" / str(number))
        same(tmp_path / "all" / str(number), tmp_path / "each" / str(number))
        assert made(result, number).bytes_read == result.bytes_read == alone.bytes_read
        assert api.verify(tmp_path / "all" / str(number), recompute=True).ok


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_depend_on_neither_backend_nor_workers_nor_windows(
    kind: str, workers: int, io: str, tmp_path: Path
) -> None:
    skip_without_direct_io(io, tmp_path)
    plans = make_plans(KINDS[kind](tmp_path))
    shape = Shape.of(plans[0].operations, len(plans))
    least = shape.least_window if kind == "block_scaled" else 4096
    budget = Budget.of(1 << 30, workers, least, shape)
    for number, (plan, files) in enumerate(zip(plans, carry_out(plans, tmp_path / "out", budget, io), strict=True)):
        api.merge_recipe(plan.recipe, tmp_path / "each" / str(number))
        wanted = contents(tmp_path / "each" / str(number))
        assert files == {name: wanted[name] for name in files} != {}


def carry_out(plans: Sequence[Plan], output: Path, budget: Budget, io: str) -> list[dict[str, bytes]]:
    directories = [OutputDirectory(output / str(n), plan, overwrite=False) for n, plan in enumerate(plans)]
    with contextlib.ExitStack() as held:
        for directory in directories:
            held.enter_context(directory)
            directory.begin()
        pipeline.run_together([*map(Variant, plans, directories)], budget, io)
        for directory in directories:
            directory.publish({}, dict.fromkeys(DOCUMENTS, b""))
    return [{file.name: file.read_bytes() for file in each.path.glob("*.safetensors*")} for each in directories]


def test_one_coefficient_is_a_sweep_too(triple: Path, tmp_path: Path) -> None:
    sweep(triple, tmp_path / "all", [0.5])
    api.merge_recipe(recipe_of(triple, 0.5), tmp_path / "each" / "alpha-0.5")
    same(tmp_path / "all" / "alpha-0.5", tmp_path / "each" / "alpha-0.5")


@pytest.mark.parametrize(
    ("alpha", "name"),
    [
        (1, "alpha-1"),
        (0.1 + 0.2, "alpha-0.30000000000000004"),
        (-0.5, "alpha--0.5"),
        (0.0, "alpha-0"),
        (100.0, "alpha-100"),
        (1e-7, "alpha-1e-07"),
        (1e22, "alpha-1e+22"),
    ],
)
def test_outputs_are_named_by_the_shortest_decimal(alpha: float, name: str) -> None:
    assert alpha_name(float(alpha)) == name
    assert float(name.removeprefix("alpha-")) == alpha


# -- one pass ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triple")
    for seed, role in enumerate(ROLES):
        tensors = {f"t{number}": normal((90, 70), seed=seed + 10 * number) for number in range(2 * SHARDS)}
        write_checkpoint(root / role, tensors, shards=SHARDS, config={"from": role})
    return root


@pytest.fixture(scope="module")
def undisturbed(triple: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    for alpha in ALPHAS:
        api.merge_recipe(recipe_of(triple, alpha), output / alpha_name(alpha))
    return contents(output)


def test_every_byte_is_read_once(triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    borrow = PositionalSource.borrow

    def counted(self: PositionalSource, offset: int, size: int, memory: memoryview) -> Any:
        sizes.append(size)
        return borrow(self, offset, size, memory)

    monkeypatch.setattr(PositionalSource, "borrow", counted)
    result = sweep(triple, tmp_path / "out", io="pread", workers=2)
    tensors = 3 * 2 * SHARDS * 90 * 70 * 2
    assert sum(sizes) == result.bytes_read == tensors


def test_progress_counts_all_outputs(triple: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    sweep(triple, tmp_path / "out", on_progress=seen.append)
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert (seen[-1].done, seen[-1].total) == (size, size)
    assert (seen[-1].shards_done, seen[-1].shards) == (3 * SHARDS, 3 * SHARDS)


def test_plans_share_what_is_the_same(triple: Path) -> None:
    first, other = make_plans([recipe_of(triple, alpha) for alpha in (0.25, 0.5)])
    assert other == make_plans([recipe_of(triple, 0.5)])[0]
    assert other.layout is first.layout
    assert other.operations[0].parts[0].operands is first.operations[0].parts[0].operands


def test_warnings_that_several_share_are_told_once(tmp_path: Path) -> None:
    recipes = padded(tmp_path)
    seen: list[str] = []
    api.sweep_recipes(below(tmp_path / "out", recipes), on_warning=lambda warning: seen.append(warning.code))
    assert seen
    assert len(set(seen)) == len(seen)


# -- interrupted, and gone on with -------------------------------------------------------------------------------------


def stop_after(triple: Path, output: Path, shards: int) -> CancelledError:
    cancelled = threading.Event()

    def look(progress: Progress) -> None:
        if progress.shards_done == shards:
            cancelled.set()

    with pytest.raises(CancelledError) as caught:
        sweep(triple, output, workers=1, on_progress=look, cancelled=cancelled)
    return caught.value


@pytest.mark.parametrize("shards", [1, 3, 5, 11])
def test_an_interrupted_sweep_goes_on_from_the_finished_shards_of_each(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes], shards: int
) -> None:
    error = stop_after(triple, tmp_path / "out", shards)
    assert re.search(rf"of {3 * SHARDS} shards are finished and kept in {STAGING}: the same command", str(error))
    staged = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob(f"{STAGING}/*.safetensors")}
    assert len(staged) >= shards
    seen: list[Progress] = []
    result = sweep(triple, tmp_path / "out", workers=3, io="pread", on_progress=seen.append)
    assert sum(made(result, place).resumed_shards for place in range(3)) == len(staged)
    assert contents(tmp_path / "out") == undisturbed
    for file, time in staged.items():
        assert (file.parents[1] / file.name).stat().st_mtime_ns == time  # not written again
    assert all(progress.resumed > 0 for progress in seen)
    assert seen[-1].done == seen[-1].total
    assert result.bytes_read == max(made(result, place).bytes_read for place in range(3))


def test_outputs_may_have_come_differently_far(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is finished, one has a shard, made by other commands; one is new."""
    api.merge_recipe(recipe_of(triple, 0.25), tmp_path / "out" / "alpha-0.25")
    cancelled = threading.Event()
    with pytest.raises(CancelledError):
        api.merge_recipe(
            recipe_of(triple, 1.0),
            tmp_path / "out" / "alpha-1",
            workers=1,
            cancelled=cancelled,
            on_progress=lambda progress: cancelled.set() if progress.shards_done else None,
        )
    created: list[str] = []
    create = OutputDirectory.create

    def noted(self: OutputDirectory, shard: OutputShard) -> FileSink:
        created.append(self.path.name)
        return create(self, shard)

    monkeypatch.setattr(OutputDirectory, "create", noted)
    result = sweep(triple, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed
    assert [made(result, place).already_complete for place in range(3)] == [True, False, False]
    resumed = made(result, 2).resumed_shards
    assert resumed >= 1
    assert (created.count("alpha-0.25"), created.count("alpha-0.5")) == (0, SHARDS)
    assert created.count("alpha-1") == SHARDS - resumed
    again = sweep(triple, tmp_path / "out")
    assert all(made(again, place).already_complete for place in range(3))
    assert again.bytes_read == 0


DIE = """
import os, pathlib, sys
from paramdelta import api
from paramdelta.engine.output import OutputDirectory
t, out, method, number = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
real, calls = getattr(OutputDirectory, method), []
def die(*arguments):
    calls.append(1)
    if len(calls) > number:
        os._exit(9)
    return real(*arguments)
setattr(OutputDirectory, method, die)
api.sweep(t / "post", t / "base", t / "new_base", out, [0.25, 0.5, 1], workers=1)
"""


@pytest.mark.parametrize(("method", "number"), [("create", 4), ("completed", 5), ("publish", 0), ("publish", 2)])
def test_a_sweep_that_was_killed_goes_on(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes], method: str, number: int
) -> None:
    run = subprocess.run([sys.executable, "-c", DIE, triple, tmp_path / "out", method, str(number)])
    assert run.returncode == 9
    result = sweep(triple, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed
    if method == "publish":
        assert [made(result, place).already_complete for place in range(3)] == [place < number for place in range(3)]
        assert result.bytes_read == 0


def test_overwrite_makes_all_of_them_anew(triple: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    sweep(triple, tmp_path / "out", workers=1)
    (tmp_path / "out" / "alpha-0.5" / "config.json").write_text("{}")
    result = sweep(triple, tmp_path / "out", overwrite=True)
    assert not any(made(result, place).already_complete for place in range(3))
    assert contents(tmp_path / "out") == undisturbed


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_infinities_in_one_output_leave_the_others_published(tmp_path: Path) -> None:
    for role, value in zip(ROLES, (3e38, 0.0, 3e38), strict=True):
        tensors = {"v": normal((9,), "F32"), "w": ("F32", (2,), encode([1.0, value], "F32"))}
        write_checkpoint(tmp_path / role, tensors, shards=2)
    result = sweep(tmp_path, tmp_path / "out", [0.1, 1.0, 0.01])
    [(path, error)] = result.failures.items()
    assert path == str(tmp_path / "out" / "alpha-1")
    assert isinstance(error, NonFiniteError)
    assert "2 of 2 shards are finished and kept" in str(error)
    assert [entry.name for entry in (tmp_path / "out" / "alpha-1").iterdir()] == [STAGING]
    for name in ("alpha-0.1", "alpha-0.01"):
        assert api.verify(tmp_path / "out" / name, recompute=True).ok
    again = sweep(tmp_path, tmp_path / "out", [0.1, 1.0, 0.01], allow_nonfinite=True)
    assert made(again, 1).nonfinite == {"w": {"infinities": 1, "nans": 0}}
    assert made(again, 1).resumed_shards == 2
    assert again.bytes_read == 0


def test_a_write_that_fails_in_one_output_ends_the_pass_and_loses_nothing(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = OutputDirectory.create

    def fail(self: OutputDirectory, shard: OutputShard) -> FileSink:
        if self.path.name == "alpha-0.5" and shard.name.startswith("model-00003"):
            raise OutputError("No space left on device", file=str(self.path))
        return create(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "create", fail)
        with pytest.raises(OutputError, match=r"alpha-0\.5: No space left") as caught:
            sweep(triple, tmp_path / "out", workers=1)
    kept = [entry.name for entry in (tmp_path / "out").rglob("*.safetensors")]
    assert f"{len(kept)} of 12 shards are finished and kept" in str(caught.value)
    assert len(kept) >= 3
    assert not list((tmp_path / "out").rglob(RECEIPT))
    result = sweep(triple, tmp_path / "out")
    assert sum(made(result, place).resumed_shards for place in range(3)) == len(kept)
    assert contents(tmp_path / "out") == undisturbed


def test_a_publication_that_fails_leaves_the_others_published(
    triple: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = OutputDirectory.publish

    def fail(self: OutputDirectory, receipt: dict[str, Any], documents: dict[str, bytes]) -> None:
        if self.path.name == "alpha-0.25":
            raise OutputError("cannot be written", file=str(self.path))
        publish(self, receipt, documents)

    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "publish", fail)
        assert [*sweep(triple, tmp_path / "out").failures] == [str(tmp_path / "out" / "alpha-0.25")]
    result = sweep(triple, tmp_path / "out")
    assert [made(result, place).already_complete for place in range(3)] == [False, True, True]
    assert contents(tmp_path / "out") == undisturbed


def test_one_output_that_may_not_be_written_keeps_all_from_being_begun(triple: Path, tmp_path: Path) -> None:
    sweep(triple, tmp_path / "out")
    (tmp_path / "out" / "alpha-1" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "alpha-1" / RECEIPT).unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="alpha-1: exists, is not empty, and was not written by paramdelta"):
        sweep(triple, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_a_file_in_the_way_of_one_is_found_before_another_is_replaced(triple: Path, tmp_path: Path) -> None:
    for name in ("alpha-0.25", "alpha-1"):
        api.merge_recipe(recipe_of(triple, 2.0), tmp_path / "out" / name)
    (tmp_path / "out" / "alpha-1" / "config.json").unlink()
    (tmp_path / "out" / "alpha-1" / "config.json").mkdir()
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="alpha-1: holds something that paramdelta did not write"):
        sweep(triple, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_space_for_all_outputs_is_there_or_nothing_is_written(
    triple: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    each = sum(file.stat().st_size for file in triple.glob("new_base/*.safetensors")) + 40_000
    monkeypatch.setattr("paramdelta.engine.output.free_space", lambda _: 2 * each)
    with pytest.raises(OutputError, match=r"the 3 outputs take .* and the disk, or your quota, has"):
        sweep(triple, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sweep(triple, tmp_path / "out", ALPHAS[:2])
    sweep(triple, tmp_path / "out")  # needs no more than the third
    assert contents(tmp_path / "out") == undisturbed


def test_too_little_memory_for_so_many_names_the_least_and_it_is_enough(triple: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="Fewer than 3 outputs at once need less") as caught:
        sweep(triple, tmp_path / "out", memory="1MB", workers=1)
    assert not (tmp_path / "out").exists()
    least = re.findall(r"least that works here is (\d+) MB", caught.value.message)[0]
    assert made(sweep(triple, tmp_path / "out", memory=f"{least}MB", workers=1), 0).workers == 1


def test_each_further_output_takes_a_window_more_of_every_worker(triple: Path) -> None:
    [plan] = make_plans([recipe_of(triple)])
    window = 1 << 20
    one, two, five = (Shape.of(plan.operations, outputs).worker(window) for outputs in (1, 2, 5))
    assert two - one >= window
    assert five - one == 4 * (two - one)
    assert Shape.of(plan.operations, 5).arena(window) == Shape.of(plan.operations).arena(window)


# -- what is no sweep --------------------------------------------------------------------------------------------------


def test_a_coefficient_is_given_once(triple: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="alpha-1 is given twice"):
        sweep(triple, tmp_path / "out", [1, 0.5, 1.0])
    with pytest.raises(RecipeError, match=r"out/b: has the same coefficients as .*out/a"):
        api.sweep_recipes({str(tmp_path / "out" / name): recipe_of(triple) for name in "ab"})
    with pytest.raises(RecipeError, match="out/b: has the same coefficients"):
        api.sweep_recipes({str(tmp_path / "out" / n): recipe_of(triple, a) for n, a in (("a", 0.0), ("b", -0.0))})
    with pytest.raises(RecipeError, match="at least one is needed"):
        sweep(triple, tmp_path / "out", [])
    with pytest.raises(RecipeError, match="must be a finite number"):
        sweep(triple, tmp_path / "out", [float("nan")])
    assert not (tmp_path / "out").exists()


def test_two_may_not_have_one_output(triple: Path, tmp_path: Path) -> None:
    outputs = (f"{tmp_path}/out", f"{tmp_path}/x/../out")
    with pytest.raises(RecipeError, match="two merges have the same output"):
        api.sweep_recipes({output: recipe_of(triple, alpha) for output, alpha in zip(outputs, ALPHAS, strict=False)})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dtype": "f32"}, "dtype"),
        ({"shard_size": "1MB"}, "shard_size"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"policies": Policies(on_missing="post")}, "on_missing"),
    ],
)
def test_what_else_differs_is_named(triple: Path, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    recipes = {str(tmp_path / "a"): recipe_of(triple), str(tmp_path / "b"): recipe_of(triple, 0.5, **changes)}
    with pytest.raises(RecipeError, match=rf"b: differs from .*a in {what}: "):
        api.sweep_recipes(recipes)


def test_other_checkpoints_are_named() -> None:
    delta = Delta("p", "b")
    one = Recipe("n", (delta, Delta("q", "b", 0.5)))
    assert variants.difference(one, Recipe("m", one.deltas)) == "new_base"
    assert variants.difference(one, Recipe("n", (delta, Delta("q", "c")))) == "base of delta 2"
    assert variants.difference(one, Recipe("n", (delta,))) == "the number of deltas"
    assert variants.difference(Recipe("n", (delta,)), Recipe("n", (Delta("q", "b"),))) == "post"
    assert variants.difference(one, Recipe("n", (Delta("p", "b", 2.0, (("x", 1.0),)), one.deltas[1]))) is None


def test_a_pattern_that_means_nothing_is_an_error_as_in_a_merge(triple: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="nothere"):
        api.sweep_recipes(below(tmp_path, [recipe_of(triple, alpha, alphas={"nothere": 0.5}) for alpha in ALPHAS]))


def test_inputs_that_change_between_two_plans_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = two_deltas(tmp_path)

    def change(recipe: Recipe) -> Plan:
        made = make_plan(recipe)
        write_checkpoint(tmp_path / "q", {"v": normal((90, 70), seed=9), "w": normal((9,), "F32")}, shards=2)
        return made

    monkeypatch.setattr(variants, "make_plan", change)
    with pytest.raises(InputChangedError, match="changed while the merges were planned"):
        make_plans(recipes)
