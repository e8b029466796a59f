"""Files from elsewhere that are not what they should be: a typed error or an answer, never anything else.

Headers have tests of their own, against the safetensors library: `tests/checkpoint/test_header_differential.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paramdelta
from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.checkpoint.index import parse_index
from paramdelta.cli.display import verify_json, verify_line
from paramdelta.engine.journal import JOURNAL, read_journal
from paramdelta.engine.receipt import RECEIPT, listed_files, read_receipt, sealed
from paramdelta.errors import CheckpointError, MismatchError, ParamDeltaError, RecipeError
from paramdelta.planning.identity import differences, identity_of
from paramdelta.planning.plan import make_plan
from paramdelta.planning.recipe import Recipe
from paramdelta.planning.recipe_file import parse_recipes
from tests.fuzz import FUZZ_EXAMPLES
from tests.make import normal, write_checkpoint

hostile = settings(
    max_examples=FUZZ_EXAMPLES or 150,
    derandomize=not FUZZ_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["..", "/etc/passwd", "C:\\x", "CON", "a/b", "\x1b[2J", "x" * 5000, "model.safetensors", "\ud800"]
    )
)
keys = st.text(max_size=8) | st.sampled_from(["\x1b[2J", "a\nb", "\r", "\u202e", "[red]", "sha256", "xxh3", "x" * 5000])
trees: st.SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def changed(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes with a few of them changed, moved, doubled or gone."""
    text = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(text) - 1)))
        match draw(st.sampled_from(["flip", "drop", "double", "insert", "cut"])):
            case "flip" if text:
                text[at] ^= 1 << draw(st.integers(0, 7))
            case "drop":
                del text[at : at + draw(st.integers(1, 20))]
            case "double":
                text[at:at] = text[at : at + draw(st.integers(1, 40))]
            case "insert":
                text[at:at] = draw(
                    st.binary(max_size=6) | st.sampled_from([b"NaN", b"1e999", b"{", b"[" * 2000, b"\0"])
                )
            case "cut":
                del text[at:]
    return bytes(text)


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with anything in the place of one of its parts, or beside it."""
    if isinstance(tree, dict) and tree and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(tree)))
        return {**tree, key: draw(changed_tree(tree[key]))}
    if isinstance(tree, list) and tree and draw(st.booleans()):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], draw(changed_tree(tree[at])), *tree[at + 1 :]]
    if isinstance(tree, dict) and draw(st.booleans()):
        return {**tree, draw(keys): draw(trees)}
    return draw(trees)


def told(error: ParamDeltaError) -> None:
    """Check that a message may be shown on a terminal, and is one that can be read."""
    text = str(error)
    assert all(line.isprintable() for line in text.split("\n"))
    assert len(text) < 50_000


INDEX = {"metadata": {"total_size": 5}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@hostile
@given(changed(json.dumps(INDEX).encode()) | changed_tree(INDEX).map(lambda tree: json.dumps(tree).encode()))
def test_an_index_names_plain_files_or_is_refused(raw: bytes) -> None:
    try:
        names = parse_index(raw, "index")
    except CheckpointError as error:
        told(error)
    else:
        for name in names.values():
            assert name == Path(name).name
            assert name.endswith(".safetensors")
            assert not set(name) & set("/\\:\0")


RECIPE = b"""
merges:
  - new_base: n
    deltas:
      - {post: p, base: b, alpha: 0.5, alphas: {'*x*': 2}}
    vocab: pad
    include: ['a*', "b?"]
    dtype: bf16
    shard_size: 5GB
    output: out
"""


ONE_MERGE = {"new_base": "n", "post": "p", "base": "b"}
recipes = (
    trees
    | st.dictionaries(keys, leaves, max_size=4).map(lambda entries: {**ONE_MERGE, **entries})
    | st.dictionaries(keys, leaves, max_size=4).map(lambda alphas: {**ONE_MERGE, "alphas": alphas})
    | st.lists(leaves, max_size=4).map(lambda patterns: {**ONE_MERGE, "include": patterns})
)


@hostile
@given(changed(RECIPE) | recipes.map(lambda tree: json.dumps(tree).encode()))
def test_a_recipe_parses_or_is_refused(raw: bytes) -> None:
    try:
        jobs = parse_recipes(raw.decode("utf-8", "replace"), Path("recipes/r.yaml"))
    except RecipeError as error:
        told(error)
    else:
        assert jobs


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "tie_word_embeddings": False,
    "vocab_size": 4,
    "eos_token_id": [1, 2],
    "torch_dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1.0},
    "text_config": {"eos_token_id": 1},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<c>"}]}
SHAPES = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2)}


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triple")
    for seed, role in enumerate(("post", "base", "new")):
        write_checkpoint(
            root / role, {n: normal(s, seed=seed) for n, s in SHAPES.items()}, config={"model_type": "llama"}
        )
        (root / role / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return root


@hostile
@given(
    role=st.sampled_from(["post", "base", "new"]),
    config=changed_tree(CONFIG).map(lambda tree: json.dumps(tree).encode()) | changed(json.dumps(CONFIG).encode()),
    tokenizer=changed_tree(TOKENIZER).map(lambda tree: json.dumps(tree).encode()) | st.just(b"{}"),
)
def test_sidecars_of_any_content_are_planned_with_or_refused(
    triple: Path, role: str, config: bytes, tokenizer: bytes
) -> None:
    before = {name: (triple / role / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    (triple / role / "config.json").write_bytes(config)
    (triple / role / "tokenizer.json").write_bytes(tokenizer)
    try:
        plan = make_plan(Recipe.of(triple / "post", triple / "base", triple / "new", dtype="f32"))
    except (CheckpointError, MismatchError) as error:
        told(error)
    else:
        assert all(len(warning.message) < 50_000 for warning in plan.warnings)
        json.dumps(plan.to_json())
    finally:
        for name, raw in before.items():
            (triple / role / name).write_bytes(raw)


@pytest.fixture(scope="module")
def finished(triple: Path) -> Path:
    paramdelta.merge(triple / "post", triple / "base", triple / "new", triple / "out")
    return triple / "out"


@hostile
@given(data=st.data())
def test_a_receipt_lists_plain_files_or_none(finished: Path, tmp_path: Path, data: st.DataObject) -> None:
    receipt = json.loads((finished / RECEIPT).read_text())
    raw = data.draw(changed_tree(receipt).map(lambda t: json.dumps(t).encode()) | changed(json.dumps(receipt).encode()))
    (tmp_path / RECEIPT).write_bytes(raw)
    names = listed_files(read_receipt(tmp_path))
    assert all(name == Path(name).name and name not in {RECEIPT, ".paramdelta"} for name in names)


digests = st.sampled_from([*(digit * n for digit in "0gA-" for n in (16, 32, 64)), ["0" * 16], "-" + "0" * 15, ""])


@hostile
@given(data=st.data())
def test_what_a_receipt_says_is_verified_or_refused(finished: Path, data: st.DataObject) -> None:
    good = (finished / RECEIPT).read_bytes()
    receipt = json.loads(good)
    entry = data.draw(st.sampled_from(receipt["files"]))
    entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(digests | trees)
    receipts, whole = st.just(receipt) | changed_tree(receipt), b"".join(sealed(receipt))
    raw = data.draw(changed(good) | receipts.map(lambda tree: json.dumps(tree).encode()) | st.just(whole))
    (finished / RECEIPT).write_bytes(raw)
    try:
        result = paramdelta.verify(finished, workers=1, recompute=data.draw(st.integers(0, 9)) == 0)
    except CheckpointError as error:
        told(error)
    else:
        for line in verify_line(result).split("\n"):
            assert line.isprintable()
            assert len(line) < 5_000
        json.dumps(verify_json(result))
    finally:
        (finished / RECEIPT).write_bytes(good)


@hostile
@given(data=st.data())
def test_a_journal_is_read_as_far_as_it_makes_sense(triple: Path, tmp_path: Path, data: st.DataObject) -> None:
    plan = make_plan(Recipe.of(triple / "post", triple / "base", triple / "new"))
    record = {"shard": "model.safetensors", "bytes": plan.shards[0].size, "xxh3": "0", "regions": "1" * 16}
    lines: list[Any] = [{"identity": identity_of(plan)}, record | {"nonfinite": {"w": [1, 2]}, "requantised": []}]
    raw = b"".join(json.dumps(data.draw(st.just(line) | changed_tree(line))).encode() + b"\n" for line in lines)
    (tmp_path / JOURNAL).write_bytes(data.draw(st.just(raw) | changed(raw)))
    journal = read_journal(tmp_path, plan)
    if journal is not None:
        assert set(journal.shards) <= {"model.safetensors"}
        for line in differences(journal.identity, identity_of(plan)):
            assert line.isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    for role in ("post", "base", "new"):
        write_checkpoint(tmp_path / role, {n: normal(s) for n, s in SHAPES.items()}, config={"model_type": "llama"})
        (tmp_path / role / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    place = tmp_path / "post" / name
    place.unlink()
    match kind:
        case "fifo":
            os.mkfifo(place)
        case "directory":
            place.mkdir()
        case "loop":
            place.symlink_to(place)
        case "device":
            place.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError) as caught:
        paramdelta.merge(tmp_path / "post", tmp_path / "base", tmp_path / "new", tmp_path / "out")
    told(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [17 << 20, 1 << 30])
def test_a_gigantic_config_is_refused_unread(tmp_path: Path, size: int) -> None:
    write_checkpoint(tmp_path, {"w": normal((2,))}, config={})
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=r"config.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_deep_nesting_is_no_bug(tmp_path: Path, name: str) -> None:
    for role in ("post", "base", "new"):
        write_checkpoint(tmp_path / role, {n: normal(s) for n, s in SHAPES.items()}, config={"model_type": "llama"})
        (tmp_path / role / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "post" / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    try:
        make_plan(Recipe.of(tmp_path / "post", tmp_path / "base", tmp_path / "new"))
    except CheckpointError as error:
        told(error)
