"""What released checkpoints look like: each trap of the families that people merge, small in hidden size only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import paramdelta
from paramdelta.errors import MismatchError
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Recipe
from tests.make import Tensor, llama_shapes, normal, sparse_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROLES = ("post", "base", "new")
LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
QWEN: dict[str, Any] = {"model_type": "qwen2", "tie_word_embeddings": True}


def plan_of(root: Path, **options: Any) -> Plan:
    policies = {name: options.pop(name) for name in list(options) if name in Policies.__dataclass_fields__}
    post, base, new = (root / role for role in ROLES)
    return make_plan(Recipe.of(post, base, new, policies=Policies(**policies), **options))


def small(root: Path, role: str, config: dict[str, Any] | None, *, vocab: int = 24, tied: bool = False) -> Path:
    """Write a Llama-shaped checkpoint with other weights in each role."""
    shapes = llama_shapes(hidden=8, layers=1, vocab=vocab, intermediate=8, kv=8, tied=tied)
    tensors = {name: normal(shape, seed=ROLES.index(role)) for name, shape in shapes.items()}
    return write_checkpoint(root / role, tensors, config=config)


def merged(root: Path, **options: Any) -> Path:
    policies = {name: options.pop(name) for name in list(options) if name in Policies.__dataclass_fields__}
    post, base, new = (root / role for role in ROLES)
    paramdelta.merge(post, base, new, root / "out", policies=Policies(**policies), **options)
    return root / "out"


def matrix(path: Path, name: str) -> Any:
    """Return a BF16 tensor's codes, read by nothing but the format's definition."""
    raw = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    return np.frombuffer(raw[begin:end], np.uint16).reshape(entry["shape"])


def added(post: Any, base: Any, new: Any) -> Any:
    """Return post - base + new in bf16: weights of this size are exact in f64, and round once through f32."""

    def wide(codes: Any) -> Any:
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    bits = (wide(post) - wide(base) + wide(new)).astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


# -- tied embeddings -------------------------------------------------------------------------------------------------


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    """R1-Distill-Qwen-1.5B, Qwen2.5-Math-1.5B, Qwen2.5-1.5B: untied, tied, tied; 28 layers, 151936 rows."""
    for role, tied in (("post", False), ("base", True), ("new", True)):
        shapes = llama_shapes(hidden=2, layers=28, vocab=151936, intermediate=4, kv=2, tied=tied)
        tensors = {name: normal(shape, seed=ROLES.index(role)) for name, shape in shapes.items()}
        config = {"model_type": "qwen2", "tie_word_embeddings": tied, "vocab_size": 151936}
        write_checkpoint(tmp_path / role, tensors, config=config)
    return tmp_path


def test_a_head_of_its_own_in_post_unties_the_output_of_a_tied_new_base(distilled: Path) -> None:
    plan = plan_of(distilled)
    head = plan.operations[-1]
    assert (head.name, head.op, head.shape) == (HEAD, "untie", (151936, 2))
    assert "untied" in [warning.code for warning in plan.warnings]
    out = merged(distilled)
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
    post, base, new = (matrix(distilled / role, EMBED) for role in ROLES)
    assert np.array_equal(matrix(out, HEAD), added(matrix(distilled / "post", HEAD), base, new))
    assert np.array_equal(matrix(out, EMBED), added(post, base, new))


def test_tied_in_all_stays_tied_and_the_config_is_kept_byte_for_byte(tmp_path: Path) -> None:
    for role in ROLES:
        small(tmp_path, role, QWEN, tied=True)
    (tmp_path / "new/config.json").write_text('{ "tie_word_embeddings":true,\t"model_type" : "qwen2"}')
    plan = plan_of(tmp_path)
    assert HEAD not in [operation.name for operation in plan.operations]
    assert plan.warnings == ()
    assert (merged(tmp_path) / "config.json").read_bytes() == (tmp_path / "new/config.json").read_bytes()


def test_an_untied_new_base_takes_a_tied_delta_for_its_head(tmp_path: Path) -> None:
    small(tmp_path, "post", QWEN, tied=True)
    small(tmp_path, "base", QWEN, tied=True)
    small(tmp_path, "new", QWEN | {"tie_word_embeddings": False})
    out = merged(tmp_path)
    expected = added(matrix(tmp_path / "post", EMBED), matrix(tmp_path / "base", EMBED), matrix(tmp_path / "new", HEAD))
    assert np.array_equal(matrix(out, HEAD), expected)


@pytest.mark.parametrize(("model_type", "ties"), [("gemma2", True), ("llama", False), ("qwen2", False)])
def test_what_a_config_does_not_say_is_the_model_types_default_checked_against_the_weights(
    tmp_path: Path, model_type: str, ties: bool
) -> None:
    for role in ROLES:
        small(tmp_path, role, {"model_type": model_type}, tied=True)
    codes = [warning.code for warning in plan_of(tmp_path).warnings]
    assert codes == ([] if ties else ["tie-contradiction"] * 3 + ["config-corrected"])
    assert json.loads((merged(tmp_path) / "config.json").read_text()).get("tie_word_embeddings", ties) is True


def test_a_head_that_a_config_says_is_tied_is_taken_as_weights_of_its_own(tmp_path: Path) -> None:
    for role in ROLES:
        small(tmp_path, role, QWEN)
    plan = plan_of(tmp_path)
    assert [warning.code for warning in plan.warnings] == ["tie-contradiction"] * 3 + ["config-corrected"]
    assert json.loads((merged(tmp_path) / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_missing_although_the_config_unties_it_is_missing(tmp_path: Path) -> None:
    small(tmp_path, "post", LLAMA)
    small(tmp_path, "base", LLAMA, tied=True)
    small(tmp_path, "new", LLAMA)
    with pytest.raises(MismatchError, match=r"missing from base.*\n.*lm_head"):
        plan_of(tmp_path)


def test_the_language_models_part_of_a_config_decides_where_the_whole_is_silent(tmp_path: Path) -> None:
    for role in ROLES:
        small(
            tmp_path,
            role,
            {"model_type": "gemma3", "text_config": {"tie_word_embeddings": role != "post"}},
            tied=role != "post",
        )
    out = merged(tmp_path)
    assert json.loads((out / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False
    assert matrix(out, HEAD).shape == (24, 8)


def test_a_lone_head_is_tied_the_other_way(tmp_path: Path) -> None:
    for role in ROLES:
        path = small(tmp_path, role, QWEN, tied=True)
        if role == "base":
            tensors: dict[str, Tensor] = {
                name.replace(EMBED, HEAD): normal(shape, seed=1)
                for name, shape in llama_shapes(hidden=8, layers=1, vocab=24, intermediate=8, kv=8, tied=True).items()
            }
            write_checkpoint(path, tensors, config=QWEN)
    out = merged(tmp_path)
    expected = added(matrix(tmp_path / "post", EMBED), matrix(tmp_path / "base", HEAD), matrix(tmp_path / "new", EMBED))
    assert np.array_equal(matrix(out, EMBED), expected)


# -- vocabularies ----------------------------------------------------------------------------------------------------

LLAMA_TULU = {"post": 128264, "base": 128256, "new": 128256}  # 8 tokens added, as in Tülu 3
QWEN_PADDING = {"post": 151665, "base": 151936, "new": 152064}


def vocabularies(root: Path, rows: dict[str, int]) -> Path:
    for role, vocab in rows.items():
        tensors = {
            EMBED: normal((vocab, 2), seed=ROLES.index(role)),
            HEAD: normal((vocab, 2), seed=10 + ROLES.index(role)),
            "model.norm.weight": normal((2,), seed=ROLES.index(role)),
        }
        write_checkpoint(root / role, tensors, config=LLAMA | {"vocab_size": vocab})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (root / role / name).write_text(json.dumps({"model": {"vocab": {"a": 0}}, "of": role}))
    return root


@pytest.mark.parametrize("rows", [LLAMA_TULU, QWEN_PADDING], ids=["Llama", "Qwen"])
def test_vocabularies_of_different_size_are_an_error_that_explains_the_choice(
    tmp_path: Path, rows: dict[str, int]
) -> None:
    with pytest.raises(MismatchError) as caught:
        plan_of(vocabularies(tmp_path, rows))
    for word in ("vocabularies differ in size (2)", EMBED, f"[{rows['post']}, 2]", "--vocab pad", "truncate"):
        assert word in str(caught.value)


@pytest.mark.parametrize("rows", [LLAMA_TULU, QWEN_PADDING], ids=["Llama", "Qwen"])
@pytest.mark.parametrize("vocab", ["pad", "truncate", "new-base", "post"])
def test_rows_are_made_as_the_policy_says(tmp_path: Path, rows: dict[str, int], vocab: str) -> None:
    out = merged(vocabularies(tmp_path, rows), vocab=vocab)
    wanted = {
        "pad": max(rows["post"], rows["new"]),
        "truncate": min(rows.values()),
        "new-base": rows["new"],
        "post": rows["post"],
    }[vocab]
    common = min(*rows.values(), wanted)
    for name in (EMBED, HEAD):
        found = matrix(out, name)
        post, base, new = (matrix(tmp_path / role, name) for role in ROLES)
        assert len(found) == wanted
        assert np.array_equal(found[:common], added(post[:common], base[:common], new[:common]))
        rest = new[common:wanted] if rows["new"] >= wanted else np.concatenate([new[common:], post[len(new) : wanted]])
        assert np.array_equal(found[common:], rest)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == wanted
    donor = json.loads((out / "tokenizer.json").read_text())["of"]
    assert donor == ("post" if rows["post"] <= wanted and vocab != "new-base" else "new")
    assert json.loads((out / "tokenizer_config.json").read_text())["of"] == donor


def test_padding_reads_every_row_once_and_the_plan_survives_json(tmp_path: Path) -> None:
    plan = plan_of(vocabularies(tmp_path, LLAMA_TULU), vocab="pad")
    embed = plan.operations[0]
    assert embed.op == "pad"
    assert [part.elements for part in embed.parts] == [128256 * 2, 8 * 2]
    assert plan.bytes_read == sum(2 * 2 * 2 * rows for rows in LLAMA_TULU.values()) + 3 * 2 * 2
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_ids_that_stand_for_other_tokens_are_named(tmp_path: Path) -> None:
    vocabularies(tmp_path, {"post": 6, "base": 6, "new": 6})
    for role, last in (("post", "<eom>"), ("base", "<reserved>"), ("new", "<eom>")):
        vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 5, "content": last}]}
        (tmp_path / role / "tokenizer.json").write_text(json.dumps(vocabulary))
    (warning,) = (warning for warning in plan_of(tmp_path).warnings if warning.code == "tokens-differ")
    assert "5 (new base '<eom>', post '<eom>', base '<reserved>')" in warning.message


def test_tokenizers_that_have_little_in_common_are_an_error(tmp_path: Path) -> None:
    vocabularies(tmp_path, {"post": 600, "base": 600, "new": 600})
    for role in ROLES:
        vocabulary = {f"{'x' if role == 'new' else 'y'}{number}": number for number in range(600)}
        (tmp_path / role / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(MismatchError, match="600 ids stand for other tokens"):
        plan_of(tmp_path)
    assert plan_of(tmp_path, vocab="new-base").operations
    assert plan_of(tmp_path, exclude=(EMBED, HEAD)).operations


# -- settings that shapes do not show --------------------------------------------------------------------------------


def test_settings_that_matter_and_differ_are_said(tmp_path: Path) -> None:
    """Llama 3 to 3.1: the new base's rope scaling and context length are the output's."""
    scaling = {"rope_type": "llama3", "factor": 8.0}
    for role in ROLES:
        config = LLAMA | {"rope_theta": 5e5, "max_position_embeddings": 8192, "eos_token_id": 128001}
        if role == "new":
            config |= {"rope_scaling": scaling, "max_position_embeddings": 131072}
        if role == "post":
            config |= {"eos_token_id": [128001, 128009]}
        small(tmp_path, role, config)
        (tmp_path / role / "tokenizer.json").write_text("{}")
    messages = [warning.message for warning in plan_of(tmp_path).warnings if warning.code == "config-differs"]
    assert [message.split()[0] for message in messages] == ["rope_scaling", "max_position_embeddings"]
    assert "new base 131072, post 8192, base 8192" in messages[1]
    config = json.loads((merged(tmp_path) / "config.json").read_text())
    assert config["rope_scaling"] == scaling
    assert config["max_position_embeddings"] == 131072
    assert config["eos_token_id"] == [128001, 128009]


def test_python_files_go_along_only_for_those_who_trust_them(tmp_path: Path) -> None:
    for role in ROLES:
        small(tmp_path, role, LLAMA | ({"auto_map": {"AutoModel": "modeling.M"}} if role == "new" else {}))
    (tmp_path / "new/modeling.py").write_text("print()")
    (tmp_path / "new/pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "new/original").mkdir()
    plan = plan_of(tmp_path)
    assert "modeling.py" not in [car.name for car in plan.sidecars]
    assert any("--trust-remote-code" in warning.message for warning in plan.warnings)
    out = merged(tmp_path, trust_remote_code=True)
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "config.json",
        "modeling.py",
        "model.safetensors",
        "paramdelta.json",
        "recipe.yaml",
    }


# -- layouts of the real families ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "shards", "tensors", "total"),
    [
        (llama_shapes(4096, 32, 128256, 14336, kv=1024), (4, 4, 4), 291, 16_060_522_496),
        (llama_shapes(8192, 80, 128256, 28672, kv=1024), (30, 30, 30), 723, 141_107_412_992),
    ],
    ids=["Llama-3-8B", "Llama-3-70B"],
)
def test_layouts_of_released_models(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], shards: tuple[int, int, int], tensors: int, total: int
) -> None:
    for role, count in zip(ROLES, shards, strict=True):
        sparse_checkpoint(tmp_path / role, shapes, count)
    plan = plan_of(tmp_path)
    assert (len(plan.operations), len(plan.shards), plan.bytes_written) == (tensors, shards[2], total)
    assert plan.layout.index is not None
    assert json.loads(plan.layout.index)["metadata"]["total_size"] == total


def test_the_layout_of_qwen_7b_with_its_biases_and_shards_of_two_kinds(tmp_path: Path) -> None:
    """Qwen2.5-7B, Qwen2.5-Math-7B in 4 files, R1-Distill-Qwen-7B in 2."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in llama_shapes(3584, 28, 152064, 18944, kv=512).items():
        shapes[name] = shape
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            shapes[name.replace("weight", "bias")] = shape[:1]
    for role, count in (("post", 2), ("base", 4), ("new", 4)):
        sparse_checkpoint(tmp_path / role, shapes, count)
    plan = plan_of(tmp_path)
    assert (len(plan.operations), len(plan.shards), plan.bytes_written) == (339, 4, 15_231_233_024)


def test_a_config_that_is_corrected_can_be_written_whatever_text_it_holds(tmp_path: Path) -> None:
    for role in ROLES:
        small(tmp_path, role, {"model_type": "qwen2"}, tied=True)
    raw = '{"model_type": "qwen2", "note": "\\ud800 \u00e9", "rope_scaling": "' + "x" * 100_000 + '"}'
    (tmp_path / "new/config.json").write_text(raw, encoding="utf-8")
    assert all(len(warning.message) < 2_000 for warning in plan_of(tmp_path).warnings)
    config = json.loads((merged(tmp_path) / "config.json").read_bytes())
    assert config == json.loads(raw) | {"tie_word_embeddings": True}
