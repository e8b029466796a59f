"""Triples with block-scaled FP8, from plan to published output."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import paramdelta
from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.cli.app import commands
from paramdelta.engine import pipeline
from paramdelta.engine.budget import Budget, Shape
from paramdelta.engine.output import DOCUMENTS, OutputDirectory
from paramdelta.errors import CheckpointError, MismatchError
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Recipe
from tests.block_scaled import CONFIG, dequantise, quantise, tensors_of
from tests.make import skip_without_direct_io, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.make import Tensor

    Tensors = dict[str, Tensor]
    Matrices = dict[str, NDArray[np.float64]]

SHAPES = {"a": (300, 500), "b": (128, 128), "c": (1, 1), "d": (1000, 700), "e": (257, 3000), "f": (7, 9_001)}
ROLES = ("post", "base", "new")
SHARDS = {"post": 2, "base": 1, "new": 3}


def matrices_of(role: str) -> Matrices:
    """Weights of a role as they were before quantisation: base is a little away from the others."""
    common, own = np.random.default_rng(0), np.random.default_rng(1 + ROLES.index(role))
    return {name: common.normal(0, 0.02, s) + own.normal(0, 0.001, s) for name, s in SHAPES.items()}


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp8")
    for role in ROLES:
        tensors = tensors_of(matrices_of(role), seed=ROLES.index(role))
        write_checkpoint(root / role, tensors, shards=SHARDS[role], config=CONFIG)
    return root


def recipe_of(root: Path, **options: Any) -> Recipe:
    policies = {name: options.pop(name) for name in list(options) if name in Policies.__dataclass_fields__}
    return Recipe.of(root / "post", root / "base", root / "new", policies=Policies(**policies), **options)


def stored(output: Path) -> dict[str, tuple[str, list[int], bytes]]:
    found = {}
    for file in sorted(output.glob("*.safetensors")):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = entry["dtype"], entry["shape"], raw[begin:end]
    return found


def wide(role: str, name: str) -> NDArray[np.float64]:
    return dequantise(*quantise(matrices_of(role)[name]))


def in_bf16(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """The nearest BF16, from f64 at once: what decides lies in 45 bits that f32 would have rounded first."""
    bits = values.view(np.uint64)
    exact = bits + np.uint64((1 << 44) - 1) + ((bits >> np.uint64(45)) & np.uint64(1))
    truncated = (exact & ~np.uint64((1 << 45) - 1)).view(np.float64)
    return truncated.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def summed(name: str) -> NDArray[np.float64]:
    post, base, new = (wide(role, name) for role in ROLES)
    total: NDArray[np.float64] = post - base + new
    assert ((total - new) - (post - base) == 0).all()  # nothing was rounded on the way
    return total


def test_by_default_weights_become_bf16_and_scales_are_gone(triple: Path, tmp_path: Path) -> None:
    warnings: list[paramdelta.PlanWarning] = []
    result = paramdelta.merge_recipe(recipe_of(triple), tmp_path / "out", on_warning=warnings.append)
    found = stored(tmp_path / "out")
    assert found.keys() == {f"{name}.{leaf}" for name in SHAPES for leaf in ("weight", "norm")}
    for name, shape in SHAPES.items():
        assert found[f"{name}.weight"][:2] == ("BF16", list(shape))
        assert found[f"{name}.weight"][2] == in_bf16(summed(name)).tobytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    assert result.requantised is None
    codes = {warning.code: warning.message for warning in warnings}
    assert "6 block-scaled FP8 weights" in codes["fp8"]
    assert "--fp8 requantise" in codes["fp8"]
    assert "quantization_config" in codes["config-corrected"]


def test_requantised_they_have_the_new_bases_form_and_config(triple: Path, tmp_path: Path) -> None:
    result = paramdelta.merge_recipe(recipe_of(triple, fp8="requantise"), tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == open_checkpoint(triple / "new").tensors.keys()
    errors = sizes = 0.0
    for name, shape in SHAPES.items():
        total = summed(name)
        codes, scales = quantise(total)
        assert found[f"{name}.weight"] == ("F8_E4M3", list(shape), codes.tobytes())
        assert found[f"{name}.weight_scale_inv"] == ("F32", list(scales.shape), scales.tobytes())
        errors += float(np.square(dequantise(codes, scales) - total).sum())
        sizes += float(np.square(total).sum())
    assert (tmp_path / "out" / "config.json").read_bytes() == (triple / "new" / "config.json").read_bytes()
    assert result.requantised is not None
    assert result.requantised["tensors"] == 6
    assert result.requantised["relative_error"] == pytest.approx((errors / sizes) ** 0.5, rel=1e-9)
    assert result.requantised["worst_relative_error"] < 0.03
    receipt = json.loads((tmp_path / "out" / "paramdelta.json").read_text())
    assert receipt["requantised"] == result.requantised
    assert receipt["exactly_rounded"] is False
    lost = f"their relative error is {result.requantised['relative_error']:.2%}."
    assert f"rounded once, but for weights in block-scaled FP8: {lost}" in (tmp_path / "out" / "README.md").read_text()
    again = paramdelta.merge_recipe(recipe_of(triple, fp8="requantise"), tmp_path / "out")
    assert again.already_complete
    assert again.requantised == result.requantised


def test_the_command_line_says_what_requantising_lost(triple: Path, tmp_path: Path) -> None:
    arguments = [f"--{option}={triple / role}" for option, role in (("post", "post"), ("base", "base"))]
    arguments += [f"--new-base={triple / 'new'}", "-o", str(tmp_path / "out"), "--fp8", "requantise"]
    result = CliRunner().invoke(commands, ["merge", *arguments])
    assert result.exit_code == 0
    assert re.search(r"; relative error of 6 weights in FP8 \d\.\d\d% \(most in '\w\.weight' ", result.stdout)


def test_each_weight_lies_just_before_its_scales(triple: Path) -> None:
    for shard_size in (None, 1, 500_000):
        plan = make_plan(recipe_of(triple, fp8="requantise", shard_size=shard_size))
        for shard in plan.shards:
            names = [plan.operations[place].name for place in shard.operations]
            for name in names:
                if name.endswith("_scale_inv"):
                    assert names[names.index(name) - 1] == name.removesuffix("_scale_inv")


def test_a_plan_with_scales_survives_json(triple: Path) -> None:
    for fp8 in ("dequantise", "requantise"):
        plan = make_plan(recipe_of(triple, fp8=fp8))
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def carry_out(plan: Plan, output: Path, budget: Budget, io: str = "auto") -> dict[str, bytes]:
    with OutputDirectory(output, plan, overwrite=False) as directory:
        directory.begin()
        pipeline.run(plan, budget, io, directory)
        directory.publish({}, dict.fromkeys(DOCUMENTS, b""))
    return {file.name: file.read_bytes() for file in output.glob("*.safetensors*")}


@pytest.mark.parametrize("fp8", ["dequantise", "requantise"])
def test_the_same_bytes_whatever_the_windows_workers_and_backends(fp8: str, triple: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(triple, fp8=fp8))
    shape = Shape.of(plan.operations)
    least = shape.least_window
    reference: dict[str, bytes] = {}
    for number, (workers, window, io) in enumerate(
        itertools.product([1, 2, 7], [least, least + 4096, 1 << 20, 8 << 20], ["mmap", "pread", "direct"])
    ):
        skip_without_direct_io(io, triple)
        budget = Budget.of(1 << 30, workers, window, shape)
        found = carry_out(plan, tmp_path / f"out{number}", budget, io)
        reference = reference or found
        assert found == reference


def test_excluded_weights_are_the_new_bases(triple: Path, tmp_path: Path) -> None:
    kept = {"exclude": ("d.*",)}
    paramdelta.merge_recipe(recipe_of(triple, **kept), tmp_path / "bf16")
    paramdelta.merge_recipe(recipe_of(triple, fp8="requantise", **kept), tmp_path / "fp8")
    own, bf16, fp8 = (stored(path) for path in (triple / "new", tmp_path / "bf16", tmp_path / "fp8"))
    assert bf16["d.weight"][2] == in_bf16(wide("new", "d") + 0.0).tobytes()  # a converted zero is +0
    assert fp8["d.weight"] == own["d.weight"]
    assert fp8["d.weight_scale_inv"] == own["d.weight_scale_inv"]
    assert fp8["a.weight"] != own["a.weight"]


def test_unmoved_bases_give_posts_bytes_and_untrained_posts_the_new_bases(triple: Path, tmp_path: Path) -> None:
    same = Recipe.of(triple / "post", triple / "base", triple / "base", policies=Policies(fp8="requantise"))
    paramdelta.merge_recipe(same, tmp_path / "post")
    assert stored(tmp_path / "post") == stored(triple / "post")
    still = Recipe.of(triple / "base", triple / "base", triple / "new", policies=Policies(fp8="requantise"))
    paramdelta.merge_recipe(still, tmp_path / "new")
    assert stored(tmp_path / "new") == stored(triple / "new")


def test_a_post_in_bf16_goes_with_a_new_base_in_fp8(triple: Path, tmp_path: Path) -> None:
    """R1-like: someone else has dequantised it already."""
    tensors = {
        f"{name}.weight": ("BF16", values.shape, in_bf16(values).tobytes())
        for name, values in matrices_of("post").items()
    }
    norms = {n: t for n, t in tensors_of(matrices_of("post"), seed=0).items() if n.endswith("norm")}
    write_checkpoint(tmp_path / "post", {**tensors, **norms}, config={"model_type": "deepseek_v3"})
    for name in ("base", "new"):
        (tmp_path / name).symlink_to(triple / name, target_is_directory=True)
    paramdelta.merge_recipe(recipe_of(tmp_path), tmp_path / "out")
    post = in_bf16(matrices_of("post")["a"]).view(ml_dtypes.bfloat16).astype(np.float64)
    wanted = in_bf16(post - wide("base", "a") + wide("new", "a"))
    assert stored(tmp_path / "out")["a.weight"][2] == wanted.tobytes()
    noise = [w.message for w in make_plan(recipe_of(tmp_path)).warnings if w.code == "fp8-noise"]
    assert len(noise) == 1
    assert "only one of post and base has 6 weights in FP8, like 'a.weight'" in noise[0]
    assert [w for w in make_plan(recipe_of(triple)).warnings if w.code == "fp8-noise"] == []


def test_a_new_base_without_fp8_has_no_form_to_requantise_to(triple: Path, tmp_path: Path) -> None:
    plain: Tensors = {f"{name}.weight": ("BF16", s, bytes(2 * s[0] * s[1])) for name, s in SHAPES.items()}
    plain |= {f"{name}.norm": ("BF16", (7,), bytes(14)) for name in SHAPES}
    write_checkpoint(tmp_path / "new", plain, config={"model_type": "deepseek_v3"})
    for name in ("base", "post"):
        (tmp_path / name).symlink_to(triple / name, target_is_directory=True)
    with pytest.raises(MismatchError, match="no block-scaled FP8 weights"):
        make_plan(recipe_of(tmp_path, fp8="requantise"))
    plan = make_plan(recipe_of(tmp_path))
    assert {operation.dtype for operation in plan.operations} == {"BF16"}


def test_new_nans_are_found_where_weights_are_scaled(tmp_path: Path) -> None:
    for role in ROLES:
        tensors = tensors_of(matrices_of(role), seed=0)
        if role == "post":
            dtype, shape, data = tensors["e.weight"]
            tensors["e.weight"] = dtype, shape, data[:-1] + b"\x7f"
        write_checkpoint(tmp_path / role, tensors, config=CONFIG)
    for fp8 in ("dequantise", "requantise"):
        with pytest.raises(paramdelta.NonFiniteError, match=r"e\.weight: 0 Inf, 1 NaN"):
            paramdelta.merge_recipe(recipe_of(tmp_path, fp8=fp8), tmp_path / fp8)


def test_a_budget_below_a_row_of_blocks_says_what_is_needed(triple: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(triple, fp8="requantise"))
    shape = Shape.of(plan.operations)
    assert shape.grain == 128 * 9_001
    assert shape.least_window >= shape.grain + 8192
    with pytest.raises(paramdelta.BudgetError, match="the least that works here is"):
        paramdelta.merge_recipe(recipe_of(triple, fp8="requantise"), tmp_path / "out", memory="64MB")


def test_a_retaken_weight_has_the_form_that_the_new_base_has(triple: Path, tmp_path: Path) -> None:
    """Post has another shape, and BF16: written in FP8 even so, as config.json makes loaders expect."""
    norms = {n: t for n, t in tensors_of(matrices_of("post"), seed=0).items() if n.endswith("norm")}
    values = {name: m if name != "a" else m[:200] for name, m in matrices_of("post").items()}
    plain: Tensors = {f"{name}.weight": ("BF16", v.shape, in_bf16(v).tobytes()) for name, v in values.items()}
    write_checkpoint(tmp_path / "post", {**plain, **norms}, config={"model_type": "deepseek_v3"})
    for name in ("base", "new"):
        (tmp_path / name).symlink_to(triple / name, target_is_directory=True)
    paramdelta.merge_recipe(recipe_of(tmp_path, fp8="requantise", on_mismatch="post"), tmp_path / "out")
    found = stored(tmp_path / "out")
    codes, scales = quantise(in_bf16(values["a"]).view(ml_dtypes.bfloat16).astype(np.float64))
    assert found["a.weight"] == ("F8_E4M3", [200, 500], codes.tobytes())
    assert found["a.weight_scale_inv"] == ("F32", list(scales.shape), scales.tobytes())
    names = {operation.op for operation in make_plan(recipe_of(triple, fp8="requantise")).operations}
    assert names == {"delta", "scales"}


def test_what_the_new_base_has_in_bf16_stays_so(triple: Path, tmp_path: Path) -> None:
    """A module that is not to be converted, in FP8 in post alone."""
    new = dict(stored(triple / "new"))
    new["b.weight"] = ("BF16", [128, 128], bytes(2 * 128 * 128))
    del new["b.weight_scale_inv"]
    write_checkpoint(tmp_path / "new", new, config=CONFIG)
    for name in ("base", "post"):
        (tmp_path / name).symlink_to(triple / name, target_is_directory=True)
    plan = make_plan(recipe_of(tmp_path, fp8="requantise"))
    dtypes = {operation.name: operation.dtype for operation in plan.operations}
    assert (dtypes["b.weight"], dtypes["a.weight"]) == ("BF16", "F8_E4M3")
    assert "b.weight_scale_inv" not in dtypes
    taken = make_plan(recipe_of(tmp_path, fp8="requantise", exclude=("b.*",)))
    assert [w.message for w in taken.warnings if "loaders may expect" in w.message] == []


def test_a_matrix_that_only_post_has_is_said_to_be_no_fp8(triple: Path, tmp_path: Path) -> None:
    for name in ("base", "new"):
        (tmp_path / name).symlink_to(triple / name, target_is_directory=True)
    plain: Tensors = {n: t for n, t in stored(triple / "post").items() if n.endswith("norm")}
    plain |= {"extra.weight": ("BF16", [2, 3], bytes(12))}
    plain |= {f"{name}.weight": ("BF16", list(s), bytes(2 * s[0] * s[1])) for name, s in SHAPES.items()}
    write_checkpoint(tmp_path / "post", plain, config={"model_type": "deepseek_v3"})
    plan = make_plan(recipe_of(tmp_path, fp8="requantise", on_missing="post"))
    (message,) = (w.message for w in plan.warnings if "loaders may expect" in w.message)
    assert message.endswith("for 'extra.weight'")


def test_a_block_is_copied_only_with_a_scale_that_the_config_allows(triple: Path, tmp_path: Path) -> None:
    """Where scales are to be powers of two, post's others are not taken over."""
    config = {**CONFIG, "quantization_config": {**CONFIG["quantization_config"], "scale_fmt": "ue8m0"}}
    for role in ("base", "new"):
        write_checkpoint(tmp_path / role, stored(triple / "base"), config=config)
    (tmp_path / "post").symlink_to(triple / "post", target_is_directory=True)
    paramdelta.merge_recipe(recipe_of(tmp_path, fp8="requantise"), tmp_path / "out")
    for name, (_, _, raw) in stored(tmp_path / "out").items():
        if name.endswith("_scale_inv"):
            assert (np.frombuffer(raw, np.uint32) & 0x7FFFFF == 0).all()


def test_budgets_hold_blocks_and_their_rows(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {**CONFIG["quantization_config"], "weight_block_size": [16, 512]}}
    for role in ROLES:
        tensors: Tensors = {"w": ("F8_E4M3", (64, 1024), bytes(64 * 1024)), "w_scale_inv": ("F32", (4, 2), bytes(32))}
        write_checkpoint(tmp_path / role, tensors, config=config)
    shape = Shape.of(make_plan(recipe_of(tmp_path, fp8="requantise")).operations)
    assert (shape.block, shape.grain) == (16 * 512, 16 * 1024)
    assert shape.worker(1 << 20) >= shape.arena(1 << 20) + (1 << 20) + 8 * 16 * 512


def with_vocabulary(root: Path, rows: dict[str, int], *, head: bool = True) -> Path:
    for role in ROLES:
        values = np.random.default_rng(ROLES.index(role)).normal(0, 0.02, (rows[role], 64))
        tensors = {}
        for name in ("model.embed_tokens.weight", *(["lm_head.weight"] if head else [])):
            codes, scales = quantise(values)
            tensors[name] = ("F8_E4M3", codes.shape, codes.tobytes())
            tensors[f"{name}_scale_inv"] = ("F32", scales.shape, scales.tobytes())
        write_checkpoint(root / role, tensors, config=CONFIG | {"tie_word_embeddings": not head})
        letter = "b" if role == "post" else "a"
        vocabulary = {f"{letter}{number}": number for number in range(rows[role])}
        (root / role / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return root


@pytest.mark.parametrize("fp8", ["dequantise", "requantise"])
@pytest.mark.parametrize("vocab", ["error", "pad"])
def test_rows_taken_from_the_new_base_have_its_tokenizer_in_fp8_too(tmp_path: Path, fp8: str, vocab: str) -> None:
    with_vocabulary(tmp_path, dict.fromkeys(ROLES, 400))
    plan = make_plan(recipe_of(tmp_path, fp8=fp8, vocab=vocab, exclude=("*embed*", "lm_head*")))
    assert {car.donor for car in plan.sidecars} == {"new base"}
    assert "400 ids mean other tokens" in next(w.message for w in plan.warnings if w.code == "tokenizer")


def test_rows_of_fp8_do_not_come_apart_and_that_is_said(tmp_path: Path) -> None:
    with_vocabulary(tmp_path, {"post": 408, "base": 400, "new": 400})
    with pytest.raises(MismatchError, match=r"shapes differ(.|\n)*lm_head.weight: new base \[400, 64\]"):
        make_plan(recipe_of(tmp_path, vocab="pad"))
    plan = make_plan(recipe_of(tmp_path, vocab="pad", on_mismatch="new-base"))
    assert {operation.shape for operation in plan.operations} == {(400, 64)}


def test_a_head_of_a_tied_fp8_new_base_is_not_written_twice(tmp_path: Path) -> None:
    with_vocabulary(tmp_path, dict.fromkeys(ROLES, 400), head=False)
    with_vocabulary(tmp_path / "untied", dict.fromkeys(ROLES, 400))
    (tmp_path / "post" / "model.safetensors").unlink()
    for file in (tmp_path / "untied" / "post").iterdir():
        file.replace(tmp_path / "post" / file.name)
    plan = make_plan(recipe_of(tmp_path, fp8="requantise", exclude=("*embed*", "lm_head*")))
    assert [operation.name for operation in plan.operations] == [
        "model.embed_tokens.weight",
        "model.embed_tokens.weight_scale_inv",
    ]


# -- what is no block-scaled checkpoint ------------------------------------------------------------------------------


def broken(root: Path, change: Any, config: dict[str, Any] = CONFIG) -> Recipe:
    for role in ROLES:
        tensors = tensors_of({"a": np.ones((200, 130))}, seed=0)
        if role == "post":
            change(tensors)
        write_checkpoint(root / role, tensors, config=config if role == "post" else CONFIG)
    return recipe_of(root)


FLAWS: dict[str, tuple[Any, str]] = {
    "no scales": (lambda t: t.pop("a.weight_scale_inv"), "'a.weight' has no scales: there is no 'a.weight_scale_inv'"),
    "no weight": (lambda t: t.pop("a.weight"), "'a.weight_scale_inv' holds scales, and there is no FP8 weight"),
    "shape": (
        lambda t: t.update({"a.weight_scale_inv": ("F32", (2, 1), bytes(8))}),
        r"needs scales of shape \[2, 2\] in F32 or BF16, and has \[2, 1\] in F32",
    ),
    "dtype": (lambda t: t.update({"a.weight_scale_inv": ("F16", (2, 2), bytes(8))}), r"has \[2, 2\] in F16"),
    "no matrix": (
        lambda t: t.update({"a.weight": ("F8_E4M3", (1, 2, 2), bytes(4))}),
        r"of shape \[1, 2, 2\], tensor 'a.weight': only matrices can be merged",
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_weights_and_scales_that_do_not_fit_are_damage(flaw: str, tmp_path: Path) -> None:
    change, message = FLAWS[flaw]
    with pytest.raises(CheckpointError, match=message) as caught:
        make_plan(broken(tmp_path, change))
    assert caught.value.file == str(tmp_path / "post" / "model.safetensors")
    assert caught.value.exit_code == 3


SETTINGS = CONFIG["quantization_config"]


@pytest.mark.parametrize(
    "settings",
    [
        {**SETTINGS, "weight_block_size": None},
        {**SETTINGS, "weight_block_size": [128]},
        {**SETTINGS, "weight_block_size": [128, 0]},
        {**SETTINGS, "weight_block_size": [1, 128]},
        {**SETTINGS, "weight_block_size": [True, 128]},
        {**SETTINGS, "activation_scheme": "static"},
        {**SETTINGS, "fmt": "e5m2"},
        {**SETTINGS, "scale_fmt": "int"},
        {**SETTINGS, "scale_fmt": {}},
        {**SETTINGS, "fmt": []},
        {**SETTINGS, "quant_method": "fbgemm_fp8"},
    ],
)
def test_other_forms_of_fp8_are_refused_by_config(settings: dict[str, Any], tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": settings}
    with pytest.raises(paramdelta.UnsupportedCheckpointError, match="cannot be merged") as caught:
        make_plan(broken(tmp_path, lambda _: None, config))
    assert caught.value.file == str(tmp_path / "post" / "config.json")


@pytest.mark.parametrize("companion", ["a.weight_scale_inv", "a.weight_scale", "a.scale", "a.scale_weight"])
def test_scales_that_config_says_nothing_of_are_refused(companion: str, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors[companion] = tensors.pop("a.weight_scale_inv")

    with pytest.raises(paramdelta.UnsupportedCheckpointError, match="FP8") as caught:
        make_plan(broken(tmp_path, rename, {"model_type": "deepseek_v3"}))
    assert "config.json describes it" in str(caught.value)


def test_plain_fp8_is_added_element_by_element(tmp_path: Path) -> None:
    codes = {role: np.random.default_rng(n).integers(0, 0x70, 1000, dtype=np.uint8) for n, role in enumerate(ROLES)}
    for role in ROLES:
        write_checkpoint(tmp_path / role, {"w": ("F8_E4M3", (1000,), codes[role].tobytes())}, config={})
    paramdelta.merge_recipe(recipe_of(tmp_path), tmp_path / "out")
    post, base, new = (codes[role].view(ml_dtypes.float8_e4m3fn).astype(np.float64) for role in ROLES)
    wanted = (post - base + new + 0.0).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert stored(tmp_path / "out")["w"] == ("F8_E4M3", [1000], wanted.tobytes())
