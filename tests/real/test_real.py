"""A merge of real weights: SmolLM2-135M-Instruct, two trained variants of it, and the installed command.

Run by `make real`, in an environment that also has torch and transformers; skipped elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.real.arithmetic import expected_bits, to_bf16

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
torch = pytest.importorskip("torch", reason="torch is not installed: `make real` has an environment of its own")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

pytestmark = pytest.mark.real

INDEX = "model.safetensors.index.json"
TRIPLE_SCRIPT = Path(__file__).with_name("triple.py")
COMMAND = Path(sys.executable).with_name("paramdelta")


@dataclass(frozen=True)
class Merged:
    """The triple and what the command made of it."""

    base: Path
    post: Path
    new_base: Path
    output: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """The output as transformers sees it."""

    model: Any
    tokenizer: Any
    loading_info: dict[str, Any]


class Weights:
    """The tensors of a sharded checkpoint, looked up through its index, as bf16 bits or as f64 values."""

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        self.weight_map: dict[str, str] = index["weight_map"]
        self.total_size: int = index["metadata"]["total_size"]
        self._directory = directory

    def tensor(self, name: str) -> Any:
        with safetensors.safe_open(self._directory / self.weight_map[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def bits(self, name: str) -> NDArray[np.uint16]:
        tensor = self.tensor(name)
        assert tensor.dtype == torch.bfloat16
        bits: NDArray[np.uint16] = tensor.view(torch.uint16).numpy()
        return bits


def run(*command: str | Path) -> str:
    """Runs a command in a process of its own; its output, or a failure that shows what it said."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{command[0]} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merged]:
    root = tmp_path_factory.mktemp("real")
    run(sys.executable, TRIPLE_SCRIPT, root)
    base, post, new_base, output = (root / name for name in ("base", "post", "new_base", "merged"))
    inputs = ("--post", post, "--base", base, "--new-base", new_base)
    report = json.loads(run(COMMAND, "merge", *inputs, "-o", output, "--json"))
    yield Merged(base, post, new_base, output, report)
    shutil.rmtree(root)  # a gigabyte, which pytest would keep for three runs


@pytest.fixture(scope="session")
def loaded(merged: Merged) -> Loaded:
    # Run in f32: in bf16 processors differ by enough to change this small model's first word.
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        merged.output, dtype=torch.float32, output_loading_info=True
    )
    return Loaded(model.eval(), transformers.AutoTokenizer.from_pretrained(merged.output), info)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (0.0, 0x0000),
        (1.0, 0x3F80),
        (-1.5, 0xBFC0),
        (1 + 2**-8, 0x3F80),  # a tie, to even
        (1 + 3 * 2**-8, 0x3F82),  # a tie, to even, upwards
        (1 + 2**-8 + 2**-40, 0x3F81),  # rounding through f32 would make it a tie
        (2 - 2**-9, 0x4000),  # a carry into the exponent
    ],
)
def test_the_oracle_rounds_directly(value: float, bits: int) -> None:
    assert to_bf16(np.array([value]))[0] == bits


def test_the_inputs_are_sharded_differently_and_trained(merged: Merged) -> None:
    weights = [Weights(path) for path in (merged.base, merged.post, merged.new_base)]
    assert len({len(set(each.weight_map.values())) for each in weights}) == 3
    name = "model.layers.12.mlp.up_proj.weight"
    base, post, new_base = (each.bits(name) for each in weights)
    assert np.mean(post != base) > 0.01
    assert np.mean(new_base != base) > 0.01


def test_every_element_is_rounded_once(merged: Merged) -> None:
    base, post, new_base, output = map(Weights, (merged.base, merged.post, merged.new_base, merged.output))
    assert output.weight_map.keys() == new_base.weight_map.keys()
    for name in output.weight_map:
        expected = expected_bits(post.bits(name), base.bits(name), new_base.bits(name))
        np.testing.assert_array_equal(output.bits(name), expected, err_msg=name)


def test_shards_follow_the_new_base(merged: Merged) -> None:
    new_base, output = Weights(merged.new_base), Weights(merged.output)
    assert output.weight_map == new_base.weight_map
    assert output.total_size == new_base.total_size == merged.report["bytes_written"]
    written = {path.name for path in merged.output.glob("*.safetensors")}
    assert written == set(new_base.weight_map.values())


def test_the_output_loads_whole(loaded: Loaded) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loaded.loading_info[problem], problem


def test_tied_embeddings_stay_tied(merged: Merged, loaded: Loaded) -> None:
    assert "lm_head.weight" not in Weights(merged.output).weight_map
    model = loaded.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_merged_model_answers(loaded: Loaded) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        tokens = loaded.model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = loaded.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


def warned(post: Path, base: Path, new_base: Path) -> list[str]:
    """Returns what an analysis warns of."""
    found = json.loads(run(COMMAND, "analyze", "--post", post, "--base", base, "--new-base", new_base, "--json"))
    return [warning["code"] for warning in found["warnings"]]


def test_relatives_give_no_alarm(merged: Merged) -> None:
    assert warned(merged.post, merged.base, merged.new_base) == []


def test_another_model_of_the_same_shape_as_base_gives_one(merged: Merged, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(merged.base)
    stranger = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stranger.save_pretrained(tmp_path / "stranger")
    assert warned(merged.post, tmp_path / "stranger", merged.new_base) == ["wrong-lineage"]


def test_an_analysis_counts_what_the_merge_has_counted(merged: Merged) -> None:
    inputs = ("--post", merged.post, "--base", merged.base, "--new-base", merged.new_base)
    total = json.loads(run(COMMAND, "analyze", *inputs, "--json"))["total"]
    [counted] = merged.report["deltas"]
    assert total.keys() == counted.keys()
    for field, value in counted.items():
        if field != "mean":
            assert total[field] == pytest.approx(value, rel=1e-12, abs=1e-12), field
    norms = [np.square(difference(merged, name)).sum() for name in Weights(merged.base).weight_map]
    assert total["delta_norm"] == pytest.approx(float(np.sqrt(np.sum(norms))), rel=1e-12)


def difference(merged: Merged, name: str) -> NDArray[np.float64]:
    """Returns a tensor of the delta."""
    post, base = (Weights(path).tensor(name).to(torch.float64).numpy() for path in (merged.post, merged.base))
    found: NDArray[np.float64] = post - base
    return found
