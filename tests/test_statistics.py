"""What a merge says of its deltas, against plain numpy over whole tensors; the same however the work is done."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import paramdelta
from paramdelta.engine.sums import DeltaSums
from paramdelta.errors import CancelledError
from paramdelta.insight.norms import describe, total
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Delta, Recipe
from tests.exact import values
from tests.make import Tensors, encode, normal, skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from paramdelta.engine.progress import Progress

RELATIVE = 1e-12
SHAPES = {"a": (701, 601), "b": (3,), "c": (129, 512), "d": (1_000, 333), "e": (), "f": (0, 7), "g": (50_000,)}
DTYPES = {"a": "BF16", "b": "F32", "c": "F16", "d": "F32", "e": "F64", "f": "BF16", "g": "BF16"}
ROLES = ("new_base", "post", "base", "post2", "base2")


def tensors_of(seed: int) -> dict[str, Any]:
    """Return tensors that share most of their weights, as checkpoints of one family do."""
    made = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        common = np.random.default_rng(place).normal(0.0, 0.02, shape)
        own = np.random.default_rng([seed, place]).normal(0.0, 0.002, shape)
        made[name] = common + own * (np.random.default_rng([seed, place, 1]).random(shape) < 0.7)
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five checkpoints of several dtypes and shards."""
    root = tmp_path_factory.mktemp("statistics")
    for seed, role in enumerate(ROLES):
        tensors = {
            name: (DTYPES[name], SHAPES[name], encode(array, DTYPES[name])) for name, array in tensors_of(seed).items()
        }
        write_checkpoint(root / role, tensors, shards=2)
    return root


def expected(deltas: int) -> dict[str, list[DeltaSums]]:
    """Compute in f64, from whole tensors."""
    found: dict[str, list[DeltaSums]] = {}
    whole = [tensors_of(seed) for seed in range(len(ROLES))]
    for name, dtype in DTYPES.items():
        kind = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "F64": "<u8"}[dtype]
        new, *rest = (values(np.frombuffer(encode(tensors[name], dtype), kind), dtype) for tensors in whole)
        found[name] = []
        for post, base in list(zip(rest[::2], rest[1::2], strict=True))[:deltas]:
            d, v = post - base, new - base
            largest = float(np.abs(d).max(initial=0.0))
            pairs = ((d, d), (v, v), (d, v), (base, base), (base, v))
            products = [math.fsum((one * two).tolist()) for one, two in pairs]
            found[name].append(DeltaSums.parse((*products, largest, np.count_nonzero(d), 0)))
    return found


def assert_right(output: Path, deltas: int = 1) -> None:
    statistics = json.loads((output / "paramdelta.json").read_text())["statistics"]
    wanted = expected(deltas)
    assert set(statistics["tensors"]) == set(SHAPES) - {"f"}
    elements = {name: math.prod(shape) for name, shape in SHAPES.items()}
    for name, found in statistics["tensors"].items():
        for one, sums in zip(found, wanted[name], strict=True):
            assert_same(one, describe(sums, elements[name]))
    for k, found in enumerate(statistics["total"]):
        assert_same(found, describe(total(rows[k] for rows in wanted.values()), sum(elements.values())))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() >= wanted.keys()
    for field, value in wanted.items():
        assert found[field] == (value if value is None else pytest.approx(value, rel=RELATIVE, abs=RELATIVE)), field


def triple(root: Path) -> tuple[Path, Path, Path]:
    return root / "post", root / "base", root / "new_base"


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_every_way_to_do_the_work_finds_the_same(
    root: Path, tmp_path: Path, io: str, workers: int, alpha: float
) -> None:
    skip_without_direct_io(io, tmp_path)
    result = paramdelta.merge(*triple(root), tmp_path / "out", io=io, workers=workers, alpha=alpha)
    assert_right(tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "paramdelta.json").read_text())
    assert result.deltas == receipt["statistics"]["total"]
    again = paramdelta.merge(*triple(root), tmp_path / "out", io=io, alpha=alpha)
    assert again.already_complete
    assert again.deltas == result.deltas


@pytest.mark.parametrize("window", [61_440, 249_856, 1 << 20])
def test_windows_do_not_matter(root: Path, tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramdelta.merging.largest_window", lambda *_: window)
    result = paramdelta.merge(*triple(root), tmp_path / "out")
    assert result.window_bytes == window
    assert_right(tmp_path / "out")


def test_several_deltas(root: Path, tmp_path: Path) -> None:
    deltas = (Delta(str(root / "post"), str(root / "base"), 0.5), Delta(str(root / "post2"), str(root / "base2"), 0.25))
    recipe = Recipe(new_base=str(root / "new_base"), deltas=deltas)
    result = paramdelta.merge_recipe(recipe, tmp_path / "out")
    assert len(result.deltas) == 2
    assert_right(tmp_path / "out", 2)


def test_a_merge_that_goes_on_remembers_what_its_finished_shards_came_to(root: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.shards_done:
            raise CancelledError("stop")

    with pytest.raises(CancelledError):
        paramdelta.merge(*triple(root), tmp_path / "out", on_progress=stop, workers=1)
    result = paramdelta.merge(*triple(root), tmp_path / "out")
    assert result.resumed_shards == 1
    assert_right(tmp_path / "out")


def test_converted_and_copied_tensors_have_no_deltas(tmp_path: Path) -> None:
    shared: Tensors = {"w": normal((40, 30)), "i": ("I32", (3,), bytes(12))}
    for seed, role in enumerate(("post", "base", "new_base")):
        write_checkpoint(tmp_path / role, {**shared, "w": normal((40, 30), seed=seed)})
    paramdelta.merge(*triple(tmp_path), tmp_path / "out")
    statistics = json.loads((tmp_path / "out" / "paramdelta.json").read_text())["statistics"]
    assert list(statistics["tensors"]) == ["w"]


def test_numbers_that_nothing_holds_are_none_and_never_nan() -> None:
    huge = DeltaSums(math.inf, math.nan, math.nan, math.inf, math.nan, 1e300, 3, 0)
    numbers = (
        "delta_norm",
        "base_shift_norm",
        "base_norm",
        "relative_delta",
        "relative_shift",
        "cosine",
        "base_cosine",
    )
    assert [describe(huge, 3)[name] for name in numbers] == [None] * 7
    wide = DeltaSums(1.0, 1e308, 1e308, 1e308, 1e308, 1.0, 1, 0)
    both = total([huge, wide._replace(squares=-math.inf), wide])
    assert [describe(both, 5)[name] for name in numbers] == [None] * 7
    still = describe(DeltaSums(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0, 0), 5)
    assert (still["cosine"], still["base_cosine"], still["relative_shift"]) == (None, None, None)
    assert describe(total([]), 0)["changed_share"] == 0.0
    same = describe(DeltaSums(2.0, 8.0, 4.0 * (1 + 2**-52), 1.0, 0.0, 1.0, 1, 0), 1)
    assert same["cosine"] == 1.0, "rounding never leads beyond"


def test_bases_of_which_one_is_the_opposite_of_the_other_have_a_cosine_of_minus_one() -> None:
    turned = describe(DeltaSums(0.0, 4.0, 0.0, 1.0, -2.0, 0.0, 0, 0), 1)
    assert turned["base_cosine"] == -1.0
    assert turned["relative_shift"] == 2.0
    gone = describe(DeltaSums(0.0, 1.0, 0.0, 1.0, -1.0, 0.0, 0, 0), 1)
    assert gone["base_cosine"] is None, "the new base is zero"


@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize("window", [61_440, 1 << 20])
def test_rows_that_a_post_lacks_are_in_no_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: int, window: int
) -> None:
    monkeypatch.setattr("paramdelta.merging.largest_window", lambda *_: window)
    whole: dict[str, Any] = {}
    for seed, role in enumerate(ROLES):
        rows = 1_000 if role.startswith(("post", "base")) and role.endswith("2") == bool(lacking) else 1_200
        whole[role] = normal((rows, 64), seed=seed)
        write_checkpoint(
            tmp_path / role,
            {"model.embed_tokens.weight": whole[role], "w": normal((8, 8), seed=seed)},
            config={"model_type": "llama", "vocab_size": rows, "hidden_size": 64, "tie_word_embeddings": True},
        )
    recipe = Recipe(
        new_base=str(tmp_path / "new_base"),
        deltas=tuple(
            Delta(str(tmp_path / post), str(tmp_path / base), 0.5)
            for post, base in (("post", "base"), ("post2", "base2"))
        ),
        policies=Policies(vocab="pad"),
    )
    paramdelta.merge_recipe(recipe, tmp_path / "out")
    statistics = json.loads((tmp_path / "out" / "paramdelta.json").read_text())["statistics"]
    found = statistics["tensors"]["model.embed_tokens.weight"]
    arrays = [values(np.frombuffer(whole[role][2], "<u2"), "BF16")[: 1_000 * 64] for role in ROLES]
    for delta, post, base in zip(found, arrays[1::2], arrays[2::2], strict=True):
        assert delta["delta_norm"] == pytest.approx(float(np.linalg.norm(post - base)), rel=RELATIVE)
        assert delta["changed_share"] == np.count_nonzero(post - base) / 64_000
    assert paramdelta.verify(tmp_path / "out", recompute=True).ok
