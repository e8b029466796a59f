"""Analyses say what merges say, whatever does the work; and what speaks against a merge."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import paramdelta
from paramdelta.errors import CancelledError, MismatchError
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Delta, Recipe
from tests.exact import values
from tests.make import encode, skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

RELATIVE = 1e-12
EMBEDDINGS = "model.embed_tokens.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    EMBEDDINGS: (1_000, 64),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(3)
        for name, shape in {
            "input_layernorm.weight": (64,),
            "self_attn.q_proj.weight": (64, 64),
            "self_attn.o_proj.weight": (64, 64),
            "mlp.up_proj.weight": (160, 64),
        }.items()
    },
    "model.norm.weight": (64,),
    "lm_head.weight": (1_000, 64),
}
ROLES = ("post", "base", "new_base", "post2", "base2")
NORMS = ("delta_norm", "base_shift_norm", "base_norm", "relative_delta", "relative_shift")


def weights(seed: int, *, lineage: int = 0, step: float = 0.001) -> dict[str, NDArray[Any]]:
    """Return the weights of a model: a lineage's, and a step of its own away from them."""
    found = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        common = np.random.default_rng([lineage, place]).normal(0.0, 0.02, shape)
        common = 1.0 + common if len(shape) == 1 else common
        found[name] = common + np.random.default_rng([seed, place, 7]).normal(0.0, step, shape)
    return found


def write(path: Path, tensors: Mapping[str, NDArray[Any]], shards: int = 2) -> None:
    write_checkpoint(path, {n: ("BF16", a.shape, encode(a, "BF16")) for n, a in tensors.items()}, shards=shards)


def read(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return weights as a checkpoint holds them."""
    return {n: values(np.frombuffer(encode(a, "BF16"), "<u2"), "BF16") for n, a in tensors.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five relatives."""
    root = tmp_path_factory.mktemp("analysis")
    for seed, role in enumerate(ROLES):
        write(root / role, weights(seed))
    return root


def triple(root: Path) -> tuple[Path, Path, Path]:
    return root / "post", root / "base", root / "new_base"


def whole(names: list[str], seeds: tuple[int, int, int] = (0, 1, 2)) -> dict[str, float]:
    """Compute with plain numpy over whole tensors, several as one vector: post, base and new base by seed."""
    post, base, new = (np.concatenate([read(weights(seed))[name] for name in names]) for seed in seeds)
    d, v = post - base, new - base

    def dot(one: NDArray[Any], other: NDArray[Any]) -> float:
        return math.fsum((one * other).tolist())

    norms = {"delta_norm": math.sqrt(dot(d, d)), "base_shift_norm": math.sqrt(dot(v, v))}
    norms["base_norm"] = math.sqrt(dot(base, base))
    return {
        **norms,
        "relative_delta": norms["delta_norm"] / norms["base_norm"],
        "relative_shift": norms["base_shift_norm"] / norms["base_norm"],
        "cosine": dot(d, v) / (norms["delta_norm"] * norms["base_shift_norm"]),
        "base_cosine": dot(base, new) / (norms["base_norm"] * math.sqrt(dot(new, new))),
        "max_abs_delta": float(np.abs(d).max()),
        "changed": int(np.count_nonzero(d)),
        "changed_share": np.count_nonzero(d) / d.size,
        "left_out": 0,
        "elements": d.size,
        "infinities": 0,
        "nans": 0,
    }


def assert_same(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for field, value in wanted.items():
        if not isinstance(value, float | int):
            continue
        assert row[field] == pytest.approx(value, rel=RELATIVE, abs=RELATIVE), field


@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_way_to_do_the_work_finds_what_numpy_finds(root: Path, tmp_path: Path, io: str, workers: int) -> None:
    skip_without_direct_io(io, tmp_path)
    [delta] = paramdelta.analyze(*triple(root), io=io, workers=workers).deltas
    assert [row["name"] for row in delta.tensors] == list(SHAPES)
    for row in delta.tensors:
        assert_same(row, whole([row["name"]]))
        assert row["shape"] == list(SHAPES[row["name"]])
    for row in delta.groups:
        names = [r["name"] for r in delta.tensors if (r["layer"], r["module"]) == (row["layer"], row["module"])]
        assert row["tensors"] == len(names) > 0
        assert_same(row, whole(names))
    assert sum(row["elements"] for row in delta.groups) == delta.total["elements"]
    assert_same(delta.total, whole(list(SHAPES)))
    for field in NORMS:
        mean = math.fsum(row[field] for row in delta.tensors) / len(delta.tensors)
        assert delta.total["mean"][field] == pytest.approx(mean, rel=RELATIVE)


def test_groups_are_in_the_order_of_layers_and_what_is_in_none_comes_last(root: Path) -> None:
    [delta] = paramdelta.analyze(*triple(root)).deltas
    groups = [(row["layer"], row["module"]) for row in delta.groups]
    in_layers = [(layer, module) for layer in range(3) for module in ("attention", "mlp", "norm")]
    assert groups == [*in_layers, (None, "norm"), (None, "embedding"), (None, "head")]


def test_a_merge_finds_the_same(root: Path, tmp_path: Path) -> None:
    [delta] = paramdelta.analyze(*triple(root)).deltas
    paramdelta.merge(*triple(root), tmp_path / "out")
    statistics = json.loads((tmp_path / "out" / "paramdelta.json").read_text())["statistics"]
    named = ("name", "layer", "module", "dtype", "shape")
    for row in delta.tensors:
        [found] = statistics["tensors"][row["name"]]
        assert row.keys() == found.keys() | set(named)
        assert_same(row, found)
    for row, found in zip(delta.groups, statistics["groups"][0], strict=True):
        assert row.keys() == found.keys()
        assert_same(row, found)
        assert (row["layer"], row["module"]) == (found["layer"], found["module"])
        assert_same(row["mean"], found["mean"])
    assert_same(delta.total["mean"], statistics["total"][0]["mean"])


def test_angles_between_deltas(root: Path) -> None:
    deltas = (Delta(str(root / "post"), str(root / "base")), Delta(str(root / "post2"), str(root / "base2"), 0.5))
    found = paramdelta.analyze_recipe(Recipe(str(root / "new_base"), deltas))
    assert [delta.alpha for delta in found.deltas] == [1.0, 0.5]
    assert_same(found.deltas[1].total, whole(list(SHAPES), (3, 4, 2)))
    [pair] = found.pairs
    assert (pair["first"], pair["second"]) == (0, 1)
    d = [read(weights(seed)) for seed in range(5)]

    def cosine(names: list[str]) -> float:
        one = np.concatenate([d[0][name] - d[1][name] for name in names])
        other = np.concatenate([d[3][name] - d[4][name] for name in names])
        return float(one @ other / math.sqrt(one @ one) / math.sqrt(other @ other))

    assert pair["cosine"] == pytest.approx(cosine(list(SHAPES)), abs=RELATIVE)
    assert [row["layer"] for row in pair["layers"]] == [0, 1, 2, None]
    first = [name for name in SHAPES if name.startswith("model.layers.0.")]
    assert pair["layers"][0]["cosine"] == pytest.approx(cosine(first), abs=RELATIVE)


def codes(root: Path, **settings: Any) -> list[str]:
    found = paramdelta.analyze(*triple(root), **settings)
    assert "NaN" not in json.dumps(found.to_json())
    return [warning.code for warning in found.warnings]


def test_relatives_give_no_alarm(root: Path) -> None:
    assert codes(root) == []


@pytest.mark.parametrize("stranger", ROLES[:3])
def test_another_model_of_the_same_shape_gives_an_alarm(root: Path, tmp_path: Path, stranger: str) -> None:
    paths = {role: root / role for role in ROLES[:3]}
    write(tmp_path / "other", weights(9, lineage=1))
    paths[stranger] = tmp_path / "other"
    found = paramdelta.analyze(paths["post"], paths["base"], paths["new_base"])
    assert [warning.code for warning in found.warnings] == ["wrong-lineage"]
    assert "other" in found.warnings[0].message


def test_a_delta_of_nothing_and_a_base_that_stayed(root: Path) -> None:
    same = paramdelta.analyze(root / "base", root / "base", root / "new_base")
    assert [warning.code for warning in same.warnings] == ["post-equals-base"]
    stayed = paramdelta.analyze(root / "post", root / "base", root / "base")
    assert [warning.code for warning in stayed.warnings] == ["new-base-equals-base"]
    assert stayed.deltas[0].total["cosine"] is None


def test_a_layer_that_nothing_has_touched(root: Path, tmp_path: Path) -> None:
    base = weights(1)
    post = {name: base[name] if ".1." in name else array for name, array in weights(0).items()}
    write(tmp_path / "post", post)
    found = paramdelta.analyze(tmp_path / "post", root / "base", root / "new_base")
    assert [warning.code for warning in found.warnings] == ["layer-untouched"]
    assert "layer 1" in found.warnings[0].message


def test_rows_that_stand_out(root: Path, tmp_path: Path) -> None:
    post = weights(0)
    post[EMBEDDINGS][900:] += np.random.default_rng(3).normal(0.0, 0.1, (100, 64))
    write(tmp_path / "post", post)
    found = paramdelta.analyze(tmp_path / "post", root / "base", root / "new_base")
    assert [warning.code for warning in found.warnings] == ["vocabulary-rows"]
    assert "768 to 999" in found.warnings[0].message


def test_rows_that_alone_have_changed(root: Path, tmp_path: Path) -> None:
    base = weights(1)
    post = weights(0) | {name: base[name].copy() for name in (EMBEDDINGS, "lm_head.weight")}
    post[EMBEDDINGS][900:] += 1.0
    write(tmp_path / "post", post)
    found = paramdelta.analyze(tmp_path / "post", root / "base", root / "new_base")
    assert [warning.code for warning in found.warnings] == ["vocabulary-rows"]
    assert "only these rows have changed: 768 to 999" in found.warnings[0].message


def test_a_layer_that_could_not_be_measured_is_not_called_untouched(root: Path, tmp_path: Path) -> None:
    new = {name: np.full(array.shape, np.nan) if ".1." in name else array for name, array in weights(2).items()}
    write(tmp_path / "new", new)
    found = paramdelta.analyze(root / "post", root / "base", tmp_path / "new")
    assert "layer-untouched" not in [warning.code for warning in found.warnings]
    assert found.deltas[0].total["nans"] > 0


def test_numbers_that_f64_does_not_hold_are_no_crash(tmp_path: Path) -> None:
    for seed, role in enumerate(ROLES):
        array = np.random.default_rng(seed).normal(0.0, 1.4e152, (1024, 16))
        write_checkpoint(tmp_path / role, {EMBEDDINGS: ("F64", array.shape, encode(array, "F64"))})
    deltas = tuple(
        Delta(str(tmp_path / post), str(tmp_path / base)) for post, base in (("post", "base"), ("post2", "base2"))
    )
    found = paramdelta.analyze_recipe(Recipe(str(tmp_path / "new_base"), deltas)).to_json()
    assert "NaN" not in json.dumps(found)
    assert "Infinity" not in json.dumps(found)


def test_what_does_not_fit_is_an_error_and_policies_count(root: Path, tmp_path: Path) -> None:
    longer = weights(0)
    for name in (EMBEDDINGS, "lm_head.weight"):
        longer[name] = np.concatenate([longer[name], np.zeros((8, 64))])
    write(tmp_path / "post", longer)
    paths = tmp_path / "post", root / "base", root / "new_base"
    with pytest.raises(MismatchError):
        paramdelta.analyze(*paths)
    [delta] = paramdelta.analyze(*paths, policies=Policies(vocab="pad")).deltas
    row = next(row for row in delta.tensors if row["name"] == EMBEDDINGS)
    assert (row["shape"], row["elements"]) == ([1_008, 64], 1_000 * 64)


def test_nothing_is_written(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    paramdelta.analyze(*triple(root))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_it_can_be_stopped(root: Path) -> None:
    import threading

    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError):
        paramdelta.analyze(*triple(root), cancelled=cancelled)


def test_new_infinities_are_counted(tmp_path: Path) -> None:
    large = {name: np.full(shape, 3e38) for name, shape in SHAPES.items()}
    none = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for role, tensors in (("post", large), ("base", none), ("new_base", large)):
        write(tmp_path / role, tensors)
    found = paramdelta.analyze(*triple(tmp_path))
    [delta] = found.deltas
    assert delta.total["infinities"] == delta.total["elements"]
    assert "nonfinite" in [warning.code for warning in found.warnings]
    assert [row["infinities"] for row in delta.tensors] == [row["elements"] for row in delta.tensors]
