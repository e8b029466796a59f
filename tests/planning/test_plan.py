from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from paramdelta.engine.budget import Shape
from paramdelta.errors import CheckpointError, MismatchError, UnsupportedCheckpointError
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.recipe import Delta, Recipe
from tests.make import Tensors, llama_shapes, normal, sparse_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TENSORS: Tensors = {
    "embed": normal((6, 4)),
    "norm": normal((4,), "F32"),
    "scalar": normal((), "F16"),
    "nothing": ("BF16", (0, 3), b""),
    "positions": ("I64", (2,), bytes(16)),
}
SIDECARS = {
    "new": ("tokenizer.json", "generation_config.json"),
    "post": ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "base": ("tokenizer.json",),
}


@pytest.fixture
def triple(tmp_path: Path) -> Path:
    """Three checkpoints with sidecars, the new base in two shards; return the directory that holds them."""
    for role, shards in (("new", 2), ("post", 1), ("base", 3)):
        root = write_checkpoint(tmp_path / role, TENSORS, shards=shards, config={"model_type": "llama"})
        for name in SIDECARS[role]:
            (root / name).write_text(f"{name} of {role}")
    return tmp_path


def plan_of(root: Path, **options: Any) -> Plan:
    return make_plan(Recipe.of(root / "post", root / "base", root / "new", **options))


def later(path: Path) -> None:
    """Give a file another time of change, and leave all else as it is."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def rewrite(path: Path, content: bytes) -> None:
    """Give a file other content of the same time."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# -- what is planned -----------------------------------------------------------------------------------------


def test_a_plan_cannot_be_changed(triple: Path) -> None:
    plan = plan_of(triple)
    for field in dataclasses.fields(plan):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(plan, field.name, None)
    for frozen in (plan.layout, plan.shards[0], plan.inputs[0], plan.sidecars[0], plan.files[0].identity):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, dataclasses.fields(frozen)[0].name, None)


def test_the_same_request_makes_the_same_plan(triple: Path) -> None:
    assert plan_of(triple) == plan_of(triple)
    assert plan_of(triple).fingerprint == plan_of(triple).fingerprint


def test_bytes_read_and_written_count_tensor_data_alone(triple: Path) -> None:
    # embed 24 × 2, norm 4 × 4, scalar 2; positions are copied: read once.
    plan = plan_of(triple)
    assert plan.bytes_written == 48 + 16 + 2 + 16
    assert plan.bytes_read == 3 * (48 + 16 + 2) + 16
    assert plan_of(triple, dtype="f64").bytes_written == 24 * 8 + 4 * 8 + 8 + 16
    assert plan_of(triple, dtype="f64").bytes_read == plan.bytes_read


def test_bytes_written_are_the_total_size_of_the_index(triple: Path) -> None:
    plan = plan_of(triple)
    assert plan.layout.index is not None
    assert json.loads(plan.layout.index)["metadata"]["total_size"] == plan.bytes_written


def test_every_file_of_every_input_is_known_by_its_place(triple: Path) -> None:
    plan = plan_of(triple)
    found = {source.role: [os.path.relpath(plan.files[n].path, triple) for n in source.files] for source in plan.inputs}
    assert found == {
        "new base": [f"new/model-0000{n}-of-00002.safetensors" for n in (1, 2)],
        "post": ["post/model.safetensors"],
        "base": [f"base/model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)],
    }
    for file in plan.files:
        status = os.stat(file.path)  # noqa: PTH116
        assert (file.identity.ino, file.identity.size) == (status.st_ino, status.st_size)


def test_a_checkpoint_in_two_roles_is_opened_once(triple: Path) -> None:
    plan = make_plan(Recipe.of(triple / "post", triple / "base", triple / "base"))
    assert len(plan.files) == 4
    assert plan.inputs[0].files == plan.inputs[2].files == range(3)


def test_several_deltas_have_numbered_roles(triple: Path) -> None:
    deltas = (Delta(str(triple / "post"), str(triple / "base")), Delta(str(triple / "base"), str(triple / "post"), 0.5))
    plan = make_plan(Recipe(str(triple / "new"), deltas))
    assert [source.role for source in plan.inputs] == ["new base", "post 1", "base 1", "post 2", "base 2"]
    assert plan.operations[0].parts[0].alphas == (1.0, 0.5)
    assert len(plan.files) == 6
    assert plan.bytes_read == 5 * 66 + 16


def test_a_shard_size_splits_the_output_anew_and_a_large_one_makes_one_file(triple: Path) -> None:
    split = plan_of(triple, shard_size=48)
    assert [shard.data_bytes for shard in split.shards] == [48, 34]
    assert [shard.name for shard in split.shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    single = plan_of(triple, shard_size="1GB")
    assert [shard.name for shard in single.shards] == ["model.safetensors"]
    assert single.layout.index is None


def test_sidecars_come_from_the_checkpoint_that_ought_to_give_them(triple: Path) -> None:
    assert {(car.name, car.donor) for car in plan_of(triple).sidecars} == {
        ("config.json", "new base"),
        ("tokenizer.json", "post"),
        ("tokenizer_config.json", "post"),
        ("chat_template.jinja", "post"),
    }


def test_a_post_without_a_config_gives_its_sidecars_all_the_same(triple: Path) -> None:
    (triple / "post/config.json").unlink()
    plan = plan_of(triple)
    assert ("chat_template.jinja", "post") in {(car.name, car.donor) for car in plan.sidecars}
    assert plan.warnings[0].code == "no-config"
    assert plan.warnings[0].message.startswith("post has no config.json")


def test_a_post_without_sidecars_leaves_all_of_them_to_the_new_base(triple: Path) -> None:
    for name in SIDECARS["post"]:
        (triple / "post" / name).unlink()
    assert {car.donor for car in plan_of(triple).sidecars} == {"new base"}


def test_a_template_file_of_the_new_base_does_not_displace_the_one_in_posts_tokenizer_config(triple: Path) -> None:
    (triple / "post/chat_template.jinja").unlink()
    (triple / "new/chat_template.jinja").write_text("another one")
    assert "chat_template.jinja" not in {car.name for car in plan_of(triple).sidecars}


def test_one_file_among_others_gives_no_sidecars(triple: Path) -> None:
    shutil.copy(triple / "post/model.safetensors", triple / "post/other.safetensors")
    plan = make_plan(Recipe.of(triple / "post/other.safetensors", triple / "base", triple / "new"))
    assert {car.donor for car in plan.sidecars} == {"new base"}


def test_a_config_that_tells_loaders_another_dtype_is_corrected(triple: Path) -> None:
    (triple / "new/config.json").write_text('{"torch_dtype": "bfloat16"}')
    plan = plan_of(triple, dtype="f32")
    assert plan.sidecars[0].text == '{\n  "torch_dtype": "float32"\n}\n'
    assert any('torch_dtype "bfloat16" → "float32"' in warning.message for warning in plan.warnings)
    for dtype in (None, "bf16"):
        assert plan_of(triple, dtype=dtype).sidecars[0].text is None


@pytest.mark.parametrize("role", ["new", "post", "base"])
def test_a_checkpoint_without_a_config_is_merged_with_a_warning(triple: Path, role: str) -> None:
    (triple / role / "config.json").unlink()
    assert [warning.code for warning in plan_of(triple).warnings] == ["no-config", "integers-copied"]


@pytest.mark.parametrize(
    ("roles", "named"),
    [
        (("post", "base", "base"), "new base and base"),
        (("base", "base", "new"), "post and base"),
        (("new", "base", "new"), "new base and post"),
    ],
)
def test_one_checkpoint_in_two_roles_is_asked_about(triple: Path, roles: tuple[str, str, str], named: str) -> None:
    post, base, new = (triple / role for role in roles)
    messages = [w.message for w in make_plan(Recipe.of(post, base, new)).warnings if w.code == "same-inputs"]
    assert messages == [f"{named} are the same checkpoint: is that meant?"]


def test_integers_that_are_copied_are_said_to_be(triple: Path) -> None:
    (warning,) = plan_of(triple).warnings
    assert warning.code == "integers-copied"
    assert "I64" in warning.message
    assert "positions" in warning.message


def test_control_characters_of_names_do_not_reach_the_terminal_with_a_warning(tmp_path: Path) -> None:
    for role in ("new", "post", "base"):
        write_checkpoint(tmp_path / role, {"evil\x1b[2J": ("I64", (1,), bytes(8))}, config={})
    (warning,) = plan_of(tmp_path).warnings
    assert warning.message.isprintable()


def test_what_does_not_fit_is_refused(triple: Path) -> None:
    write_checkpoint(triple / "post", {**TENSORS, "extra": normal((1,))})
    with pytest.raises(MismatchError, match="missing from new base, base"):
        plan_of(triple)


def test_quantised_weights_are_refused_in_any_role(triple: Path) -> None:
    for role in ("new", "post", "base"):
        config = triple / role / "config.json"
        before = config.read_bytes()
        config.write_text('{"quantization_config": {"quant_method": "gptq"}}')
        with pytest.raises(UnsupportedCheckpointError, match="gptq"):
            plan_of(triple)
        config.write_bytes(before)


def test_a_missing_checkpoint_is_refused(triple: Path) -> None:
    shutil.rmtree(triple / "base")
    with pytest.raises(CheckpointError, match="base"):
        plan_of(triple)


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    # Data of 4 TiB: had anybody read it, this test would not end.
    shapes = {"huge": (1 << 21, 1 << 20)}
    root = sparse_checkpoint(tmp_path / "m", shapes)
    assert make_plan(Recipe.of(root, root, root)).bytes_written == 1 << 42


def test_the_widest_operation_decides_what_a_worker_needs(triple: Path) -> None:
    assert Shape.of(plan_of(triple).operations) == Shape(3, 3)
    assert Shape.of(plan_of(triple, dtype="bf16").operations) == Shape(3, 6)  # norm: three times F32 for one BF16
    assert Shape.of(plan_of(triple, dtype="f64").operations) == Shape(3, 2)
    assert Shape.of([]) == Shape(1, 1)


# -- the fingerprint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.5}, {"alpha": -1.0}, {"dtype": "f32"}, {"dtype": "bf16"}, {"shard_size": 48}, {"shard_size": "1GB"}],
    ids=str,
)
def test_the_fingerprint_changes_with_the_request(options: dict[str, Any], triple: Path) -> None:
    assert plan_of(triple, **options).fingerprint != plan_of(triple).fingerprint


def test_the_fingerprint_changes_with_the_roles(triple: Path) -> None:
    swapped = make_plan(Recipe.of(triple / "base", triple / "post", triple / "new"))
    assert swapped.fingerprint != plan_of(triple).fingerprint


def test_the_fingerprint_does_not_depend_on_how_a_coefficient_is_spelled(triple: Path) -> None:
    paths = str(triple / "post"), str(triple / "base")
    whole, real = (make_plan(Recipe(str(triple / "new"), (Delta(*paths, alpha),))) for alpha in (2, 2.0))
    assert whole.fingerprint == real.fingerprint


TOUCHED = [
    *(f"new/model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    "post/model.safetensors",
    *(f"base/model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
    "new/config.json",
    "post/tokenizer.json",
    "post/tokenizer_config.json",
    "post/chat_template.jinja",
]


@pytest.mark.parametrize("name", TOUCHED)
def test_the_fingerprint_changes_with_the_time_of_change_of_whatever_reaches_the_output(
    name: str, triple: Path
) -> None:
    before = plan_of(triple).fingerprint
    later(triple / name)
    assert plan_of(triple).fingerprint != before


@pytest.mark.parametrize("role", ["new", "post", "base"])
def test_the_fingerprint_changes_with_the_content_of_every_config(role: str, triple: Path) -> None:
    before = plan_of(triple).fingerprint
    rewrite(triple / role / "config.json", json.dumps({"model_type": "other"}).encode())
    assert plan_of(triple).fingerprint != before


def test_the_fingerprint_changes_with_a_header_even_at_the_same_size_and_time(triple: Path) -> None:
    before = plan_of(triple).fingerprint
    path = triple / "post/model.safetensors"
    raw = path.read_bytes()
    rewrite(path, raw.replace(b'"format":"pt"', b'"format":"xx"', 1))
    assert path.stat().st_size == len(raw)
    assert plan_of(triple).fingerprint != before


def test_the_fingerprint_changes_with_an_index_even_where_the_shards_are_the_same(triple: Path) -> None:
    before = plan_of(triple).fingerprint
    index = triple / "base/model.safetensors.index.json"
    rewrite(index, index.read_bytes() + b"\n")
    assert plan_of(triple).fingerprint != before


def test_the_fingerprint_changes_with_a_sidecar_that_comes_or_goes(triple: Path) -> None:
    before = plan_of(triple).fingerprint
    (triple / "post/chat_template.jinja").unlink()
    without = plan_of(triple).fingerprint
    (triple / "post/special_tokens_map.json").write_text("{}")
    assert len({before, without, plan_of(triple).fingerprint}) == 3


def test_the_fingerprint_changes_with_a_sidecars_size_and_donor(triple: Path) -> None:
    before = plan_of(triple)
    car = before.sidecars[0]
    replace = dataclasses.replace
    others = [
        replace(car, donor="somebody"),
        replace(car, identity=replace(car.identity, size=car.identity.size + 1)),
        replace(car, identity=replace(car.identity, mtime_ns=car.identity.mtime_ns + 1)),
    ]
    plans = [replace(before, sidecars=(other, *before.sidecars[1:])) for other in others]
    assert len({before.fingerprint, *(plan.fingerprint for plan in plans)}) == 4


def test_the_fingerprint_changes_with_the_version_of_the_arithmetic(
    triple: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan_of(triple).fingerprint
    monkeypatch.setattr("paramdelta.planning.identity.ARITHMETIC", 1_000)
    assert plan_of(triple).fingerprint != before


def test_the_fingerprint_does_not_change_where_inputs_are_moved_or_read(triple: Path) -> None:
    before = plan_of(triple).fingerprint
    (triple / "elsewhere").mkdir()
    for role in ("new", "post", "base"):
        (triple / role).rename(triple / "elsewhere" / role)
    assert plan_of(triple / "elsewhere").fingerprint == before
    (triple / "elsewhere/post/model.safetensors").read_bytes()
    assert plan_of(triple / "elsewhere").fingerprint == before


def test_the_fingerprint_does_not_change_with_files_that_nobody_copies(triple: Path) -> None:
    before = plan_of(triple).fingerprint
    (triple / "post/README.md").write_text("hello")
    later(triple / "base/tokenizer.json")
    later(triple / "new/tokenizer.json")
    assert plan_of(triple).fingerprint == before


def test_the_fingerprint_does_not_change_with_the_way_a_path_is_spelled(
    triple: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan_of(triple).fingerprint
    monkeypatch.chdir(triple)
    assert make_plan(Recipe.of("post/", "./base", "post/../new")).fingerprint == before


# -- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"alpha": 0.1}, {"dtype": "f32", "shard_size": 48}, {"shard_size": "1GB"}])
def test_a_plan_survives_json(options: dict[str, Any], triple: Path) -> None:
    plan = plan_of(triple, **options)
    back = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.fingerprint == plan.fingerprint
    assert back.shards[0].header == plan.shards[0].header
    assert back.to_json() == plan.to_json()


def test_scripts_find_the_fields_that_they_are_promised(triple: Path) -> None:
    (triple / "new/config.json").unlink()
    plan = plan_of(triple)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["bytes_read"] == plan.bytes_read
    assert data["bytes_written"] == plan.bytes_written
    assert [shard.keys() >= {"name", "bytes"} for shard in data["shards"]] == [True, True]
    assert sum(shard["bytes"] for shard in data["shards"]) == plan.bytes_written
    assert [set(warning) for warning in data["warnings"]] == [{"code", "message"}] * 2
    tensors = {tensor["name"]: tensor for tensor in data["tensors"]}
    assert list(tensors) == [operation.name for operation in plan.operations]
    assert all(tensor.keys() >= {"name", "op", "dtype", "shape", "sources"} for tensor in data["tensors"])
    assert (tensors["embed"]["op"], tensors["positions"]["op"]) == ("delta", "copy")
    assert (tensors["embed"]["dtype"], tensors["embed"]["shape"]) == ("BF16", [6, 4])
    assert [source["file"].split("/")[-2] for source in tensors["embed"]["sources"]] == ["new", "post", "base"]


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets the entry at a path like ``files.0.size`` to another value."""

    def apply(data: Any) -> None:
        *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in parents:
            data = data[step]
        assert data[last] != value
        data[last] = value

    apply.__name__ = path
    return apply


ALTERATIONS = [
    change("fingerprint", "0" * 64),
    change("recipe.deltas.0.alpha", 0.5),
    change("recipe.dtype", "F32"),
    change("recipe.shard_size", 1000),
    change("files.0.size", 1),
    change("files.1.mtime_ns", 1),
    change("files.2.header_digest", "0" * 64),
    change("inputs.0.config_digest", None),
    change("sidecars.0.mtime_ns", 1),
    change("sidecars.0.donor", "base"),
    change("tensors.0.name", "other"),
    change("tensors.0.op", "copy"),
    change("tensors.0.dtype", "F16"),
    change("tensors.0.shape", [3, 8]),
    change("tensors.0.parts.0.alphas", [0.5]),
    change("recipe.policies.vocab", "pad"),
    change("sidecars.0.text", "{}"),
    change("tensors.0.sources.0.offset", 0),
    change("tensors.0.sources.0.place", 1),
    change("shards.0.name", "evil.safetensors"),
    change("shards.0.bytes", 1),
]


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
def test_a_plan_that_was_altered_is_refused(alter: Callable[[dict[str, Any]], None], triple: Path) -> None:
    data = json.loads(json.dumps(plan_of(triple).to_json()))
    alter(data)
    with pytest.raises(ValueError, match="changed"):
        Plan.from_json(data)


# -- cost and size -------------------------------------------------------------------------------------------


def test_planning_needs_neither_numba_nor_numpy_nor_a_command_line(triple: Path) -> None:
    program = (
        "import sys\n"
        "from paramdelta.planning.plan import make_plan\n"
        "from paramdelta.planning.recipe import Recipe\n"
        f"print(make_plan(Recipe.of('{triple}/post', '{triple}/base', '{triple}/new')).fingerprint)\n"
        "heavy = {'numba', 'llvmlite', 'numpy', 'click', 'rich', 'safetensors', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Another process, with other hash seeds, comes to the same fingerprint.
    assert done.stdout.strip() == plan_of(triple).fingerprint


def test_a_merge_needs_neither_numba_nor_llvm_nor_numpy_once_its_loops_are_kept(triple: Path, tmp_path: Path) -> None:
    arguments = [f"{triple}/post", f"{triple}/base", f"{triple}/new"]
    program = (
        "import sys\n"
        "import paramdelta\n"
        f"paramdelta.merge(*{arguments!r}, sys.argv[1])\n"
        "print(sorted({'numba', 'llvmlite', 'numpy', 'click', 'safetensors'} & set(sys.modules)))\n"
    )
    outputs = [tmp_path / "once", tmp_path / "again"]
    runs = [
        subprocess.run([sys.executable, "-c", program, out], capture_output=True, text=True, check=True)
        for out in outputs
    ]
    if sys.platform.startswith("linux") and platform.machine() == "x86_64":  # elsewhere LLVM links
        assert runs[1].stdout.strip() == "[]"


def llama(root: Path, shards: int, *, hidden: int, layers: int, intermediate: int) -> Recipe:
    """Write a Llama 3 of holes as new base, and return the recipe that has it in every role."""
    model = sparse_checkpoint(root, llama_shapes(hidden, layers, 128_256, intermediate, kv=1_024), shards)
    return Recipe.of(model, model, model)


def test_llama_3_70b_is_planned_to_the_byte(tmp_path: Path) -> None:
    recipe = llama(tmp_path, 30, hidden=8_192, layers=80, intermediate=28_672)
    plan = make_plan(recipe)
    assert len(plan.operations) == 723
    assert plan.bytes_written == 141_107_412_992
    assert plan.bytes_read == 3 * 141_107_412_992
    assert len(plan.shards) == 30
    assert json.loads(plan.layout.index or b"")["metadata"]["total_size"] == 141_107_412_992


def test_llama_3_8b_is_planned_to_the_byte(tmp_path: Path) -> None:
    plan = make_plan(llama(tmp_path, 4, hidden=4_096, layers=32, intermediate=14_336))
    assert len(plan.operations) == 291
    assert plan.bytes_written == 16_060_522_496
    assert len(plan.shards) == 4


def test_shards_of_5_gb_hold_no_more_and_all_of_it(tmp_path: Path) -> None:
    recipe = llama(tmp_path, 30, hidden=8_192, layers=80, intermediate=28_672)
    plan = make_plan(dataclasses.replace(recipe, shard_size=5_000_000_000))
    assert max(shard.data_bytes for shard in plan.shards) <= 5_000_000_000
    assert plan.bytes_written == 141_107_412_992
    assert len(plan.shards) == 30
