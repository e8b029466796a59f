"""What released checkpoints look like: each trap of the families that people merge, small in hidden size only."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import paramdelta
from paramdelta.errors import CheckpointError, MismatchError
from paramdelta.planning.plan import Plan, make_plan
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Recipe
from tests import oracle
from tests.make import Tensor, encode, llama_shapes, normal, sparse_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROLES = ("post", "base", "new")
LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
QWEN: dict[str, Any] = {"model_type": "qwen2", "tie_word_embeddings": True}
CODES: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
INDEX = "model.safetensors.index.json"


def plan_of(root: Path, **options: Any) -> Plan:
    policies = {name: options.pop(name) for name in list(options) if name in Policies.__dataclass_fields__}
    post, base, new = (root / role for role in ROLES)
    return make_plan(Recipe.of(post, base, new, policies=Policies(**policies), **options))


def small(root: Path, role: str, config: dict[str, Any] | None, *, vocab: int = 24, tied: bool = False) -> Path:
    """Write a Llama-shaped checkpoint with other weights in each role."""
    shapes = llama_shapes(hidden=8, layers=1, vocab=vocab, intermediate=8, kv=8, tied=tied)
    return write_checkpoint(root / role, weights(role, shapes), config=config)


def weights(role: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return other weights for each role and each tensor: a head must not be taken for the embeddings unnoticed."""
    return {name: normal(shape, seed=3 * n + ROLES.index(role)) for n, (name, shape) in enumerate(shapes.items())}


def merged(root: Path, **options: Any) -> Path:
    policies = {name: options.pop(name) for name in list(options) if name in Policies.__dataclass_fields__}
    post, base, new = (root / role for role in ROLES)
    paramdelta.merge(post, base, new, root / "out", policies=Policies(**policies), **options)
    return root / "out"


def stored(path: Path) -> dict[str, tuple[str, Any]]:
    """Return dtype and codes of the tensors of all shards, read by nothing but the format's definition."""
    found = {}
    for file in path.glob("model*.safetensors"):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                codes = np.frombuffer(raw[begin:end], CODES[entry["dtype"]]).reshape(entry["shape"])
                found[name] = entry["dtype"], codes
    return found


def matrix(path: Path, name: str) -> Any:
    """Return a tensor's codes."""
    return stored(path)[name][1]


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
        config = {"model_type": "qwen2", "tie_word_embeddings": tied, "vocab_size": 151936}
        write_checkpoint(tmp_path / role, weights(role, shapes), config=config)
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


@pytest.mark.parametrize("ties", [*itertools.product((True, False), repeat=3)], ids=str)
def test_the_head_of_a_tied_checkpoint_is_its_embeddings_whichever_are_tied(
    tmp_path: Path, ties: tuple[bool, bool, bool]
) -> None:
    for role, tied in zip(ROLES, ties, strict=True):
        small(tmp_path, role, QWEN | {"tie_word_embeddings": tied}, tied=tied)
    out = merged(tmp_path)
    assert (HEAD in stored(out)) == (not all(ties))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == all(ties)
    heads = (matrix(tmp_path / role, EMBED if tied else HEAD) for role, tied in zip(ROLES, ties, strict=True))
    assert np.array_equal(matrix(out, EMBED if all(ties) else HEAD), added(*heads))
    assert np.array_equal(matrix(out, EMBED), added(*(matrix(tmp_path / role, EMBED) for role in ROLES)))


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


def test_a_language_model_inside_another_says_itself_that_it_is_tied(tmp_path: Path) -> None:
    """A part of type llama would not be tied by default."""
    for role in ROLES:
        small(tmp_path, role, {"model_type": "llava", "text_config": LLAMA | {"tie_word_embeddings": True}}, tied=True)
    assert plan_of(tmp_path).warnings == ()
    assert (merged(tmp_path) / "config.json").read_bytes() == (tmp_path / "new/config.json").read_bytes()


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
QWEN_SMALL_BASE = {"post": 152064, "base": 151936, "new": 152064}
SIZES = pytest.mark.parametrize(
    "rows", [LLAMA_TULU, QWEN_PADDING, QWEN_SMALL_BASE], ids=["Llama", "Qwen", "Qwen, base smallest"]
)


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


@SIZES
def test_vocabularies_of_different_size_are_an_error_that_explains_the_choice(
    tmp_path: Path, rows: dict[str, int]
) -> None:
    with pytest.raises(MismatchError) as caught:
        plan_of(vocabularies(tmp_path, rows))
    for word in ("vocabularies differ in size (2)", EMBED, f"[{rows['post']}, 2]", "--vocab pad", "truncate"):
        assert word in str(caught.value)


@SIZES
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
    too_many = rows["post"] > wanted >= rows["new"]  # where both have too many rows the tokens decide
    assert donor == ("new" if too_many or vocab == "new-base" else "post")
    assert json.loads((out / "tokenizer_config.json").read_text())["of"] == donor


def test_padding_reads_every_row_once_and_the_plan_survives_json(tmp_path: Path) -> None:
    plan = plan_of(vocabularies(tmp_path, LLAMA_TULU), vocab="pad")
    embed = plan.operations[0]
    assert embed.op == "pad"
    assert [part.elements for part in embed.parts] == [128256 * 2, 8 * 2]
    assert plan.bytes_read == sum(2 * 2 * 2 * rows for rows in LLAMA_TULU.values()) + 3 * 2 * 2
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("vocab", ["pad", "truncate", "new-base", "post"])
@pytest.mark.parametrize("posts", [22, 26])
def test_rows_of_an_untied_post_on_a_tied_new_base(tmp_path: Path, vocab: str, posts: int) -> None:
    """A derivative like R1-Distill-Qwen-1.5B whose vocabulary was resized, too."""
    small(tmp_path, "post", QWEN | {"tie_word_embeddings": False, "vocab_size": posts}, vocab=posts)
    for role in ("base", "new"):
        small(tmp_path, role, QWEN | {"vocab_size": 24}, tied=True)
    plan = plan_of(tmp_path, vocab=vocab)
    rows = {"pad": max(posts, 24), "truncate": min(posts, 24), "new-base": 24, "post": posts}[vocab]
    assert (plan.operations[-1].name, plan.operations[-1].op) == (HEAD, "untie")
    (warning,) = (warning for warning in plan.warnings if warning.code == "vocab")
    assert f"{EMBED}: new base [24, 8], post [{posts}, 8], base [24, 8]; {rows} rows in the output" in warning.message
    out = merged(tmp_path, vocab=vocab)
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "vocab_size": rows,
    }
    base, new = (matrix(tmp_path / role, EMBED) for role in ("base", "new"))
    common = min(rows, posts, 24)
    for name in (EMBED, HEAD):
        post = matrix(tmp_path / "post", name)
        rest = (post if posts > 24 else new)[common:rows]
        expected = np.concatenate([added(post[:common], base[:common], new[:common]), rest])
        assert np.array_equal(matrix(out, name), expected)


def test_a_bias_of_the_head_gets_as_many_rows_as_the_head(tmp_path: Path) -> None:
    for role, rows in (("post", 26), ("base", 24), ("new", 24)):
        shapes: dict[str, tuple[int, ...]] = {EMBED: (rows, 2), HEAD: (rows, 2), "lm_head.bias": (rows,)}
        write_checkpoint(tmp_path / role, weights(role, shapes), config=LLAMA)
    out = merged(tmp_path, vocab="pad")
    post, base, new = (matrix(tmp_path / role, "lm_head.bias") for role in ROLES)
    assert np.array_equal(matrix(out, "lm_head.bias"), np.concatenate([added(post[:24], base, new), post[24:]]))


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


def tokenizer_of(path: Path, tokens: int, *, begin: str = "t") -> None:
    vocabulary = {f"{begin}{number}": number for number in range(tokens)}
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (path / "chat_template.jinja").write_text(path.name)


@pytest.mark.parametrize(
    ("posts", "news", "donor"), [(24, 26, "post"), (26, 24, "new"), (24, 24, "post"), (25, 25, None)]
)
def test_no_tokenizer_has_more_ids_than_a_truncated_output_has_rows(
    tmp_path: Path, posts: int, news: int, donor: str | None
) -> None:
    vocabularies(tmp_path, {"post": 26, "base": 24, "new": 26})
    tokenizer_of(tmp_path / "post", posts)
    tokenizer_of(tmp_path / "new", news)
    if donor is None:
        with pytest.raises(MismatchError, match="24 rows, and the tokenizers of post and new base have more ids"):
            plan_of(tmp_path, vocab="truncate")
        return
    warnings = {warning.code: warning.message for warning in plan_of(tmp_path, vocab="truncate").warnings}
    assert (merged(tmp_path, vocab="truncate") / "chat_template.jinja").read_text() == donor
    assert ("post has 26 rows, the output 24" in warnings.get("tokenizer", "")) == (donor == "new")


@pytest.mark.parametrize("vocab", ["error", "pad", "new-base"])
def test_that_post_does_not_give_its_tokenizer_is_said(tmp_path: Path, vocab: str) -> None:
    """The rows of embeddings and head are the new base's: with them go a tokenizer and what speaks of its tokens."""
    vocabularies(tmp_path, {"post": 600, "base": 600, "new": 600})
    for role in ROLES:
        tokenizer_of(tmp_path / role, 600, begin="x" if role == "new" else "y")
    plan = plan_of(tmp_path, vocab=vocab, exclude=(EMBED, HEAD))
    (warning,) = (warning.message for warning in plan.warnings if warning.code == "tokenizer")
    assert {car.donor for car in plan.sidecars} == {"new base"}
    assert ("600 ids mean other tokens in post" in warning) == (vocab != "new-base")
    assert ("--vocab new-base was chosen" in warning) == (vocab == "new-base")


def test_rows_of_the_new_base_with_posts_tokens_have_posts_tokenizer(tmp_path: Path) -> None:
    vocabularies(tmp_path, {"post": 6, "base": 6, "new": 6})
    for role in ROLES:
        tokenizer_of(tmp_path / role, 6)
    plan = plan_of(tmp_path, exclude=(EMBED, HEAD))
    assert {car.donor for car in plan.sidecars if car.name != "config.json"} == {"post"}
    assert plan.warnings == ()


def plain_tokenizer(path: Path, tokens: list[str], *, kind: str) -> None:
    """Write a tokenizer in one of the other forms."""
    if kind == "vocab.json":
        (path / kind).write_text(json.dumps({token: number for number, token in enumerate(tokens[:-1])}))
        (path / "added_tokens.json").write_text(json.dumps({tokens[-1]: len(tokens) - 1}))
    else:
        (path / kind).write_bytes("\n".join(tokens).encode())
    (path / "tokenizer.json").unlink(missing_ok=True)


def test_tokens_are_compared_in_whatever_form_they_are(tmp_path: Path) -> None:
    vocabularies(tmp_path, {"post": 6, "base": 6, "new": 6})
    for role in ROLES:
        plain_tokenizer(tmp_path / role, [*"abcde", "<chat>" if role == "post" else "<pad>"], kind="vocab.json")
    (warning,) = (w.message for w in plan_of(tmp_path).warnings if w.code == "tokens-differ")
    assert "5 (new base '<pad>', post '<chat>', base '<pad>')" in warning
    for role in ROLES:
        plain_tokenizer(tmp_path / role, [*"abcde", role], kind="tokenizer.model")
        (tmp_path / role / "vocab.json").unlink()
    (warning,) = (w.message for w in plan_of(tmp_path).warnings if w.code == "tokens-unknown")
    assert "tokenizer.model differs" in warning
    plain_tokenizer(tmp_path / "new", list("abcdef"), kind="vocab.json")
    (tmp_path / "new" / "tokenizer.model").unlink()
    (warning,) = (w.message for w in plan_of(tmp_path).warnings if w.code == "tokens-unknown")
    assert "different kinds (new base vocab.json, post tokenizer.model, base tokenizer.model)" in warning
    for role in ROLES:
        plain_tokenizer(tmp_path / role, list("abcdef"), kind="tokenizer.model")
        (tmp_path / role / "vocab.json").unlink(missing_ok=True)
    assert plan_of(tmp_path).warnings == ()


def test_ids_of_a_vocab_json_count_too_where_rows_are_cut_off(tmp_path: Path) -> None:
    vocabularies(tmp_path, {"post": 8, "base": 6, "new": 8})
    for role in ROLES:
        plain_tokenizer(tmp_path / role, list("abcdefgh")[: 6 if role == "base" else 8], kind="vocab.json")
    with pytest.raises(MismatchError, match="6 rows, and the tokenizers of post and new base have more ids"):
        plan_of(tmp_path, vocab="truncate")


def test_posts_tokens_on_the_new_bases_rows_are_named(tmp_path: Path) -> None:
    """As in Chat Vector: embeddings and head stay the new base's."""
    vocabularies(tmp_path, {"post": 8, "base": 8, "new": 8})
    for role in ROLES:
        tokenizer_of(tmp_path / role, 8 if role == "post" else 6)
    vocabulary = json.loads((tmp_path / "post" / "tokenizer.json").read_text())
    vocabulary["added_tokens"] = [{"id": 5, "content": "<chat>"}]
    (tmp_path / "post" / "tokenizer.json").write_text(json.dumps(vocabulary))
    plan = plan_of(tmp_path, exclude=(EMBED, HEAD))
    (warning,) = (w.message for w in plan.warnings if w.code == "tokens-differ")
    assert "1 ids mean other tokens there: 5 (new base 't5', post '<chat>')" in warning
    assert "2 of its tokens have no meaning there" in warning


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_a_post_without_tokens_has_the_new_bases_tokenizer_and_that_is_said(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    vocabularies(tmp_path, {"post": 6, "base": 6, "new": 6})
    (tmp_path / "post" / "chat_template.jinja").write_text("post")
    for name in {"tokenizer.json", "tokenizer_config.json"} - set(left):
        (tmp_path / "post" / name).unlink()
    plan = plan_of(tmp_path)
    donors = {car.name: car.donor for car in plan.sidecars}
    assert donors["tokenizer.json"] == donors["tokenizer_config.json"] == "new base"
    assert donors["chat_template.jinja"] == "post"
    (warning,) = (w.message for w in plan.warnings if w.code == "tokenizer")
    assert "post has no tokenizer" in warning
    assert "chat_template.jinja, ids of special tokens" in warning


def test_an_id_that_is_null_says_nothing(tmp_path: Path) -> None:
    ids = {"post": {"eos_token_id": None, "text_config": LLAMA | {"eos_token_id": 5}, "pad_token_id": None}}
    for role in ROLES:
        small(tmp_path, role, {"model_type": "llava", "eos_token_id": 1, "pad_token_id": 3} | ids.get(role, {}))
    config = json.loads((merged(tmp_path) / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (5, 3)


def test_embeddings_of_a_layer_are_not_the_models(tmp_path: Path) -> None:
    """The layer for further tokens of DeepSeek-V3 has embeddings, too."""
    deep = {"model_type": "deepseek_v3"}
    for role in ROLES:
        shapes: dict[str, tuple[int, ...]] = {
            EMBED: (6, 2),
            "model.layers.61.embed_tokens.weight": (6, 2),
            HEAD: (6, 2),
        }
        write_checkpoint(tmp_path / role, weights(role, shapes), config=deep)
    plan = plan_of(tmp_path)
    assert plan.warnings == ()
    assert {operation.name for operation in plan.operations} == set(shapes)


def test_special_tokens_are_posts_even_where_its_tokenizer_files_are_missing(tmp_path: Path) -> None:
    for role, eos in (("post", 128009), ("base", 128001), ("new", 128001)):
        path = small(tmp_path, role, LLAMA | {"eos_token_id": eos})
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    out = merged(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == 128009


def test_what_is_taken_from_a_tied_new_base_is_not_written_twice(tmp_path: Path) -> None:
    small(tmp_path, "post", QWEN | {"tie_word_embeddings": False})
    for role in ("base", "new"):
        small(tmp_path, role, QWEN, tied=True)
    plan = plan_of(tmp_path, exclude=("lm_head*", "*embed*"))
    assert [operation.name for operation in plan.operations].count(HEAD) == 0
    assert [warning.code for warning in plan.warnings] == []
    head_only = plan_of(tmp_path, exclude=("lm_head*",))
    assert head_only.operations[-1].op == "copy"
    assert {warning.code for warning in head_only.warnings} == {"untied", "config-corrected"}
    embeddings_only = plan_of(tmp_path, exclude=("*embed*",))
    assert embeddings_only.operations[-1].op == "untie"


@pytest.mark.parametrize(("vocab", "exclude"), [("pad", "lm_head*"), ("post", "*embed*"), ("post", "lm_head*")])
def test_embeddings_and_head_have_rows_for_the_same_tokens(tmp_path: Path, vocab: str, exclude: str) -> None:
    vocabularies(tmp_path, {"post": 26, "base": 24, "new": 24})
    with pytest.raises(
        MismatchError, match=r"different numbers of rows: 'model.embed_tokens.weight' 2., 'lm_head.weight' 2"
    ):
        plan_of(tmp_path, vocab=vocab, exclude=(exclude,))
    assert plan_of(tmp_path, vocab=vocab, exclude=("lm_head*", "*embed*")).operations[0].shape == (24, 2)


def test_a_head_that_is_left_out_ties_the_output(tmp_path: Path) -> None:
    for role in ROLES:
        small(tmp_path, role, LLAMA, tied=role == "base")
    out = merged(tmp_path, on_missing="skip")
    assert HEAD not in stored(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


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


QWEN_EPS, LLAMA_EPS = 1e-06, 1e-05
LLAMA_3 = {"rope_type": "default", "rope_theta": 5e5}
LLAMA_31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("inside", [False, True], ids=["", "text_config"])
@pytest.mark.parametrize("other", ROLES)
@pytest.mark.parametrize(
    ("key", "usual", "unusual"),
    [
        ("rms_norm_eps", QWEN_EPS, LLAMA_EPS),
        ("rope_theta", 1e6, 1e4),
        ("rope_scaling", None, LLAMA_31),
        ("rope_parameters", LLAMA_3, LLAMA_31),
        ("max_position_embeddings", 131072, 4096),
        ("sliding_window", None, 4096),
    ],
)
def test_a_setting_that_one_of_them_has_otherwise_is_shown_and_stays_the_new_bases(
    tmp_path: Path, key: str, usual: Any, unusual: Any, other: str, inside: bool
) -> None:
    """Qwen2.5 and its Math models differ in theta and length, some bases and their Instruct in epsilon."""
    values = {role: unusual if role == other else usual for role in ROLES}
    for role, value in values.items():
        config = LLAMA | {key: value}
        small(tmp_path, role, {"model_type": "llava", "text_config": config} if inside else config)
        (tmp_path / role / "tokenizer.json").write_text("{}")
    (warning,) = plan_of(tmp_path).warnings
    shown = ", ".join(f"{name} {json.dumps(values[name.split()[0]])}" for name in ("new base", "post", "base"))
    assert warning.code == "config-differs"
    assert warning.message.startswith(f"{key} differs")
    assert warning.message.endswith(f": {shown}")
    assert (merged(tmp_path) / "config.json").read_bytes() == (tmp_path / "new/config.json").read_bytes()


EOS = {"Llama 3": 128001, "Llama 3 Instruct": 128009, "Llama 3.1 Instruct": [128001, 128008, 128009]}


@pytest.mark.parametrize("inside", [False, True], ids=["", "text_config"])
@pytest.mark.parametrize(("post", "new"), [*itertools.permutations(EOS, 2)])
def test_special_tokens_are_posts_in_the_config_and_for_generation(
    tmp_path: Path, post: str, new: str, inside: bool
) -> None:
    pads = {"post": 128004, "base": None, "new": None}
    begins = {"post": 128006, "base": 128000, "new": 128000}
    for role, model in (("post", post), ("base", "Llama 3"), ("new", new)):
        ids = {"bos_token_id": begins[role], "eos_token_id": EOS[model], "pad_token_id": pads[role]}
        config = LLAMA | ids | {"rope_theta": 5e5}
        small(tmp_path, role, {"model_type": "llava", "text_config": config} if inside else config)
        (tmp_path / role / "tokenizer.json").write_text("{}")
        (tmp_path / role / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS[model], "of": role}))
        (tmp_path / role / "chat_template.jinja").write_text(role)
    out = merged(tmp_path)
    config = json.loads((out / "config.json").read_text())
    posts, news = (json.loads((tmp_path / role / "config.json").read_text()) for role in ("post", "new"))
    assert posts != news
    assert config == posts
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": EOS[post], "of": "post"}
    assert (out / "chat_template.jinja").read_text() == "post"
    corrected = [warning.message for warning in plan_of(tmp_path).warnings if warning.code == "config-corrected"]
    assert len(corrected) == 1
    assert f"eos_token_id {json.dumps(EOS[new])} → {json.dumps(EOS[post])}" in corrected[0]


def test_special_tokens_stay_the_new_bases_with_its_tokenizer(tmp_path: Path) -> None:
    for role, rows in LLAMA_TULU.items():
        vocabularies(tmp_path, {role: rows})
        config = LLAMA | {"vocab_size": rows, "eos_token_id": 128263 if role == "post" else 128001}
        (tmp_path / role / "config.json").write_text(json.dumps(config))
        (tmp_path / role / "generation_config.json").write_text(role)
    out = merged(tmp_path, vocab="truncate")
    assert (out / "config.json").read_bytes() == (tmp_path / "new/config.json").read_bytes()
    assert (out / "generation_config.json").read_text() == "new"


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


# -- files beside the weights, and their names ---------------------------------------------------------------------


def renamed(root: Path, names: dict[str, str]) -> Path:
    """Give shards other names, in the index too."""
    index = (root / INDEX).read_text()
    for old, new in names.items():
        (root / old).rename(root / new)
        index = index.replace(old, new)
    (root / INDEX).write_text(index)
    return root


def in_shards(root: Path, role: str, names: Sequence[str]) -> Path:
    """Write a small checkpoint in shards of these names."""
    count = len(names)
    shapes = llama_shapes(hidden=8, layers=1, vocab=24, intermediate=8, kv=8)
    write_checkpoint(root / role, weights(role, shapes), shards=count, config=LLAMA)
    return renamed(root / role, {f"model-{n:05}-of-{count:05}.safetensors": name for n, name in enumerate(names, 1)})


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"),
        ("model-000001-of-000002.safetensors", "model-000002-of-000002.safetensors"),
        ("model-00001-of-00002.safetensors", "model-00002-of-000002.safetensors"),
    ],
    ids=["R1-Distill", "six digits", "mixed"],
)
def test_shard_names_of_any_number_of_digits_are_read_and_kept(tmp_path: Path, names: tuple[str, str]) -> None:
    in_shards(tmp_path, "post", [f"model-{n:05}-of-000003.safetensors" for n in (1, 2, 3)])
    in_shards(tmp_path, "base", [f"model-{n:05}-of-00004.safetensors" for n in (1, 2, 3, 4)])
    in_shards(tmp_path, "new", names)
    out = merged(tmp_path)
    assert {file.name for file in out.glob("*.safetensors")} == set(names)
    maps = [json.loads((root / INDEX).read_text())["weight_map"] for root in (out, tmp_path / "new")]
    assert maps[0] == maps[1]
    triple = [stored(tmp_path / role) for role in ROLES]
    for name, (_, codes) in stored(out).items():
        assert np.array_equal(codes, added(*(tensors[name][1] for tensors in triple)))
    post, base, new = (tmp_path / role for role in ROLES)
    assert paramdelta.merge(post, base, new, out).already_complete


def test_shards_with_six_digits_and_no_index_are_no_model_even_beside_one(tmp_path: Path) -> None:
    for role in ROLES:
        in_shards(tmp_path, role, [f"model-{n:05}-of-000002.safetensors" for n in (1, 2)])
    (tmp_path / "post" / INDEX).unlink()
    write_checkpoint(tmp_path / "post", {"w": normal((2,))})
    with pytest.raises(CheckpointError, match=r"3 \.safetensors files and no index.*'model-00001-of-000002\."):
        plan_of(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("code", [False, True])
def test_other_copies_of_the_weights_are_neither_read_nor_copied(tmp_path: Path, shards: int, code: bool) -> None:
    """As Meta and Mistral have them: original/consolidated.00.pth and its tokenizer, consolidated.safetensors."""
    shapes = llama_shapes(hidden=8, layers=1, vocab=24, intermediate=8, kv=8)
    for role in ROLES:
        root = write_checkpoint(tmp_path / role, weights(role, shapes), shards=shards, config=LLAMA)
        (root / "original").mkdir()
        for name in (
            *("consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model", "modeling.py"),
            *("generation_config.json", "model.safetensors", "x.safetensors", "y.safetensors.index.json"),
        ):
            (root / "original" / name).write_bytes(b"junk")
        for name in (
            *("consolidated.safetensors", "consolidated.safetensors.index.json", "consolidated.00.pth"),
            *("pytorch_model.bin", "params.json", "optimizer.pt", "README.md", "recipe.yaml"),
        ):
            (root / name).write_bytes(b"junk")
        (root / "tokenizer.json").write_text("{}")
    out = merged(tmp_path, trust_remote_code=code)
    documents = {"README.md", "paramdelta.json", "recipe.yaml", "config.json", "tokenizer.json"}
    weight_files = {file.name for file in (tmp_path / "new").glob("model*")}
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == documents | weight_files
    assert b"junk" not in b"".join((out / name).read_bytes() for name in documents)
    triple = [stored(tmp_path / role) for role in ROLES]
    for name, (_, codes) in stored(out).items():
        assert np.array_equal(codes, added(*(tensors[name][1] for tensors in triple)))


def test_a_lone_numbered_file_is_the_model_beside_a_consolidated_copy(tmp_path: Path) -> None:
    for role in ROLES:
        root = small(tmp_path, role, LLAMA)
        (root / "model.safetensors").rename(root / "model-00001-of-000001.safetensors")
        (root / "consolidated.safetensors").write_bytes(b"junk")
    assert {Path(file.path).name for file in plan_of(tmp_path).files} == {"model-00001-of-000001.safetensors"}


# -- checkpoints saved in other dtypes -----------------------------------------------------------------------------

FLOATS = ("BF16", "F16", "F32")
MIXED = [dtypes for dtypes in itertools.product(FLOATS, repeat=3) if len({*dtypes}) > 1]


def saved_in(root: Path, role: str, dtype: str, *, vocab: int = 24, tied: bool = False) -> Path:
    """Write weights of several magnitudes; some norms have the same bits in all roles, others sums just off a tie."""
    shapes = llama_shapes(hidden=8, layers=1, vocab=vocab, intermediate=8, kv=8, tied=tied)
    tensors: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        scale = (0.02, 1.0, 1e-6, 30.0)[number % 4]  # F16 has only subnormals near 1e-6
        tensors[name] = normal(shape, dtype, seed=3 * number + ROLES.index(role), scale=scale)
    same = np.arange(0x3C00, 0x3C08) << (16 if dtype == "F32" else 0)
    tensors["model.norm.weight"] = dtype, (8,), same.astype(CODES[dtype]).tobytes()
    near = {"post": [1 + 2**-8, 1 + 2**-11] * 4, "base": [0.0] * 8, "new": [2.0**-24] * 8}[role]
    tensors["model.layers.0.input_layernorm.weight"] = dtype, (8,), encode(near, dtype)
    return write_checkpoint(root / role, tensors, config={"tie_word_embeddings": tied, "vocab_size": vocab})


def exact(operands: Iterable[tuple[str, Any]], out: str) -> list[int]:
    """Return the codes of post - base + new in whole numbers, rounded once."""
    (post_dtype, post), (base_dtype, base), (new_dtype, new) = operands
    rows = zip(new.ravel().tolist(), post.ravel().tolist(), base.ravel().tolist(), strict=True)
    return [oracle.fuse(n, p, b, (new_dtype, post_dtype, base_dtype), out)[0] for n, p, b in rows]


@pytest.mark.parametrize("dtypes", MIXED, ids="-".join)
def test_every_element_of_a_triple_saved_in_several_dtypes_is_exact(
    tmp_path: Path, dtypes: tuple[str, str, str]
) -> None:
    for role, dtype in zip(ROLES, dtypes, strict=True):
        saved_in(tmp_path, role, dtype)
    found = stored(merged(tmp_path))
    triple = [stored(tmp_path / role) for role in ROLES]
    assert found.keys() == triple[2].keys()
    for name, (dtype, codes) in found.items():
        assert dtype == dtypes[2]
        assert codes.ravel().tolist() == exact([tensors[name] for tensors in triple], dtype), name


@pytest.mark.parametrize(("option", "out", "said"), [("f16", "F16", "float16"), ("f32", "F32", "float32")])
def test_a_dtype_that_is_asked_for_is_the_whole_outputs_and_its_configs(
    tmp_path: Path, option: str, out: str, said: str
) -> None:
    for role, dtype in zip(ROLES, ("F32", "F16", "BF16"), strict=True):
        saved_in(tmp_path, role, dtype)
    (tmp_path / "new/config.json").write_text(json.dumps(LLAMA | {"torch_dtype": "bfloat16"}))
    path = merged(tmp_path, dtype=option)
    triple = [stored(tmp_path / role) for role in ROLES]
    for name, (dtype, codes) in stored(path).items():
        assert dtype == out
        assert codes.ravel().tolist() == exact([tensors[name] for tensors in triple], out), name
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == said


@pytest.mark.parametrize("dtypes", MIXED, ids="-".join)
def test_rows_and_heads_of_other_dtypes_are_exact_too(tmp_path: Path, dtypes: tuple[str, str, str]) -> None:
    """An untied post with more tokens on a tied new base: new rows are post's, rounded to the new base's dtype."""
    for role, dtype in zip(ROLES, dtypes, strict=True):
        saved_in(tmp_path, role, dtype, vocab=26 if role == "post" else 24, tied=role != "post")
    found = stored(merged(tmp_path, vocab="pad"))
    base, new = (stored(tmp_path / role)[EMBED] for role in ("base", "new"))
    for name in (EMBED, HEAD):
        kind, post = stored(tmp_path / "post")[name]
        common = exact([(kind, post[:24]), base, new], dtypes[2])
        rest = [oracle.round_once(oracle.decode(code, kind), dtypes[2]) for code in post[24:].ravel().tolist()]
        assert found[name][0] == dtypes[2]
        assert found[name][1].ravel().tolist() == common + rest, name


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


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scaled", [False, True])
def test_rope_as_transformers_5_writes_it_is_the_same_rope(tmp_path: Path, role: str, scaled: bool) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0}
    for each in ROLES:
        old = {"rope_theta": 5e5, "rope_scaling": scaling if scaled else None}
        new = {"rope_parameters": {"rope_theta": 5e5, **(scaling if scaled else {"rope_type": "default"})}}
        small(tmp_path, each, LLAMA | (new if each == role else old))
    assert plan_of(tmp_path).warnings == ()


def test_a_dtype_that_only_the_language_models_part_of_a_config_says_is_corrected(tmp_path: Path) -> None:
    for role in ROLES:
        small(tmp_path, role, {"model_type": "llava", "text_config": LLAMA | {"torch_dtype": "float16"}})
    config = json.loads((merged(tmp_path, dtype="f32") / "config.json").read_text())
    assert config["text_config"]["torch_dtype"] == "float32"
    assert "torch_dtype" not in config


def test_other_dtypes_than_the_outputs_are_said(tmp_path: Path) -> None:
    for role in ROLES:
        dtype = "F32" if role == "post" else "BF16"
        write_checkpoint(tmp_path / role, {"w": normal((4,), dtype), "v": normal((4,))}, config=LLAMA)
    (warning,) = plan_of(tmp_path).warnings
    assert warning.message == (
        "1 tensor is rounded once to BF16 (new base BF16, post F32, base BF16); --dtype chooses another one"
    )


def test_messages_say_where_to_look(tmp_path: Path) -> None:
    small(tmp_path, "post", LLAMA)
    small(tmp_path, "base", LLAMA, tied=True)
    small(tmp_path, "new", LLAMA)
    with pytest.raises(MismatchError) as caught:
        plan_of(tmp_path)
    for role, path in (("new base", "new"), ("post", "post"), ("base", "base")):
        assert f"  {role}: {tmp_path / path}\n" in caught.value.message
    assert f"tie_word_embeddings is false in {tmp_path / 'base' / 'config.json'}" in caught.value.message
    for role in ROLES:
        small(tmp_path, role, QWEN, tied=True)
    with pytest.raises(MismatchError, match=f"The head is not stored here: it is tied to '{EMBED}'"):
        plan_of(tmp_path, exclude=("lm_head*",))
    for role in ROLES:
        small(tmp_path, role, QWEN)
    contradictions = [w.message for w in plan_of(tmp_path).warnings if w.code == "tie-contradiction"]
    assert f"if that is wrong, set tie_word_embeddings in {tmp_path / 'new' / 'config.json'}" in contradictions[0]


def test_too_large_for_a_narrow_dtype_the_remedy_is_a_wider_one(tmp_path: Path) -> None:
    large = ("F16", (1,), (0x7BFF).to_bytes(2, "little"))
    for role in ROLES:
        write_checkpoint(tmp_path / role, {"w": large if role != "base" else ("F16", (1,), bytes(2))}, config=LLAMA)
    with pytest.raises(paramdelta.NonFiniteError, match="--dtype bf16 holds them"):
        merged(tmp_path)
