"""The command line as a process: exit codes, what goes to which stream, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.make import encode, llama_shapes, normal, skip_without_direct_io, sparse_checkpoint, write_checkpoint

Run = subprocess.CompletedProcess[str]


def paramdelta(*arguments: str | Path, **options: Any) -> Run:
    command = [sys.executable, "-m", "paramdelta", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def of(triple: Path) -> list[str]:
    return ["--post", f"{triple}/post", "--base", f"{triple}/base", "--new-base", f"{triple}/new_base"]


@pytest.fixture
def triple(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for seed, role in enumerate(("post", "base", "new_base")):
        tensors = {name: normal(shape, seed=seed) for name, shape in llama_shapes().items()}
        write_checkpoint(root / role, tensors, shards=seed + 1, config={"model_type": "llama"})
    return root


def failed(run: Run, code: int, *words: str) -> None:
    """Check an error: its exit code, one message on standard error that has these words, and no traceback."""
    assert run.returncode == code, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr


def test_merge_prints_a_line_of_result_and_one_of_its_delta(triple: Path, tmp_path: Path) -> None:
    run = paramdelta("merge", *of(triple), "-o", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    result, delta = run.stdout.splitlines()
    assert "21 tensors" in result
    assert delta.startswith("delta: ")
    again = paramdelta("merge", *of(triple), "-o", tmp_path / "out")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_merge_json_is_one_object_with_the_documented_fields(triple: Path, tmp_path: Path) -> None:
    run = paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--json", "--memory", "1GB", "--workers", "2")
    result = json.loads(run.stdout)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert result["output"] == str(tmp_path / "out")
    assert result["tensors"] == len(llama_shapes())
    assert result["shards"] == 3
    assert result["bytes_written"] == index["metadata"]["total_size"]
    assert result["bytes_read"] == 3 * result["bytes_written"]
    assert result["workers"] == 2
    assert result["window_bytes"] % 4096 == 0
    assert result["io"] in {"mmap", "direct", "pread", "direct, mmap"}
    assert result["resumed_shards"] == 0
    assert result["nonfinite"] == {}
    assert 0 < result["peak_rss_bytes"] < 1e9
    assert result["seconds"] > 0


def test_a_backend_that_cannot_serve_is_an_error_before_the_old_output_goes(triple: Path, tmp_path: Path) -> None:
    assert paramdelta("merge", *of(triple), "-o", tmp_path / "out").returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    program = (
        "import errno, sys\n"
        "from paramdelta.cli import main\n"
        "from paramdelta.storage import process, source\n"
        "def refuse(path, size):\n"
        "    raise OSError(errno.EINVAL, 'Invalid argument', path)\n"
        "source._OPENERS['direct'] = refuse\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "merge", *of(triple), "-o", str(tmp_path / "out")]
    options = ["--overwrite", "--alpha", "2", "--io", "direct"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    failed(run, 3, "direct", "--io auto")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_merge_without_config_warns_and_merges(triple: Path, tmp_path: Path) -> None:
    (triple / "new_base/config.json").unlink()
    run = paramdelta("merge", *of(triple), "-o", tmp_path / "out")
    assert run.returncode == 0
    assert run.stderr.startswith("warning: new base has no config.json")
    assert paramdelta("merge", *of(triple), "-o", tmp_path / "quiet", "--quiet").stderr == ""


def test_plan_json_has_the_documented_fields(triple: Path) -> None:
    plan = json.loads(paramdelta("plan", *of(triple), "--json").stdout)
    assert {"name", "op", "dtype", "shape", "sources"} <= plan["tensors"][0].keys()
    assert {"name", "bytes"} <= plan["shards"][0].keys()
    assert plan["bytes_read"] == 3 * plan["bytes_written"] > 0
    assert plan["memory_bytes"] > 0
    assert plan["warnings"] == []


def test_plan_says_what_a_merge_would_do(triple: Path) -> None:
    run = paramdelta("plan", *of(triple))
    assert run.returncode == 0, run.stderr
    assert "21 tensors" in run.stdout
    assert "config.json from new base" in run.stdout


def test_a_plan_shows_names_of_files_as_they_are(triple: Path) -> None:
    for name in ("[red].py", "a\x1b[2J.py"):
        (triple / "post" / name).write_text("")
    run = paramdelta("plan", *of(triple), "--trust-remote-code")
    assert run.returncode == 0, run.stderr
    assert "[red].py from post\n" in run.stdout
    assert "'a\\x1b[2J.py' from post\n" in run.stdout
    assert "\x1b" not in run.stdout


def test_a_plan_that_needs_more_disk_than_there_is_warns(tmp_path: Path) -> None:
    for role in ("post", "base", "new_base"):
        sparse_checkpoint(tmp_path / role, {"w": (1 << 20, 1 << 20)})
    run = paramdelta("plan", *of(tmp_path), "--json", "-o", tmp_path / "out")
    assert {"disk", "no-config"} <= {warning["code"] for warning in json.loads(run.stdout)["warnings"]}
    failed(paramdelta("merge", *of(tmp_path), "-o", tmp_path / "out", "--quiet"), 5, "free")


@pytest.mark.parametrize("arguments", [["--help"], ["plan"], ["inspect"]])
def test_what_needs_no_arithmetic_imports_no_numba(triple: Path, arguments: list[str]) -> None:
    arguments = arguments + {"plan": of(triple), "inspect": [f"{triple}/post"]}.get(arguments[0], [])
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "paramdelta", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in imported
    assert not {"numba", "numpy", "torch"} & imported


def test_inspect_lists_tensors(triple: Path) -> None:
    run = paramdelta("inspect", triple / "new_base")
    assert "model.embed_tokens.weight" in run.stdout
    assert "in 3 files" in run.stdout
    described = json.loads(paramdelta("inspect", triple / "new_base", "--json").stdout)
    assert len(described["tensors"]) == len(llama_shapes())
    assert described["config"] == {"model_type": "llama"}


def test_inspect_prints_json_where_a_config_holds_what_json_does_not(triple: Path) -> None:
    (triple / "post/config.json").write_text('{"a": [NaN, 1.5], "b": {"c": -Infinity}}')
    described = json.loads(paramdelta("inspect", triple / "post", "--json").stdout, parse_constant=pytest.fail)
    assert described["config"] == {"a": [None, 1.5], "b": {"c": None}}


def test_an_unset_variable_is_not_the_current_directory(triple: Path, tmp_path: Path) -> None:
    failed(paramdelta("merge", *of(triple), "-o", "", cwd=tmp_path), 2, "output", "empty")
    failed(paramdelta("plan", *of(triple)[2:], "--post", "", cwd=tmp_path), 2, "post", "empty")


def test_demo_checks_its_own_result(tmp_path: Path) -> None:
    run = paramdelta("demo", "-o", tmp_path / "demo")
    assert run.returncode == 0, run.stderr
    assert "all equal, bit for bit" in run.stdout
    assert (tmp_path / "demo/merged/model.safetensors").exists()


def test_json_failures_are_one_object_on_standard_output(triple: Path, tmp_path: Path) -> None:
    run = paramdelta("merge", *of(triple)[2:], "--post", tmp_path / "nowhere", "-o", tmp_path / "out", "--json")
    assert run.returncode == 3
    error = json.loads(run.stdout)["error"]
    assert error["code"] == 3
    assert str(tmp_path / "nowhere") in error["file"]
    assert error["tensor"] is None
    assert error["type"] == "CheckpointError"
    assert error["message"]


def test_usage_errors_exit_2(triple: Path, tmp_path: Path) -> None:
    assert paramdelta("merge").returncode == 2
    assert paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--io", "magic").returncode == 2
    failed(paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--memory", "lots"), 2, "memory", "lots")
    failed(paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--dtype", "int8"), 2, "dtype", "int8")
    failed(paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--alpha", "nan"), 2, "alpha")


def replace_post(triple: Path) -> Path:
    post = triple / "post"
    for file in post.iterdir():
        file.unlink()
    return post


def test_inputs_that_cannot_be_read_exit_3(triple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def merge() -> Run:
        return paramdelta("merge", *of(triple), "-o", out)

    shard = triple / "new_base" / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    failed(merge(), 3, shard.name)
    shard.write_bytes(content[:-1])
    failed(merge(), 3, str(shard))
    shard.write_bytes(content[:8] + b"[" + content[9:])
    failed(merge(), 3, str(shard))
    shard.write_bytes(content)
    index = triple / "base" / "model.safetensors.index.json"
    index.write_text("{nonsense")
    failed(merge(), 3, str(index))
    assert not out.exists()


def test_forms_of_weights_that_users_try_have_each_their_message(triple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def merge() -> Run:
        return paramdelta("merge", *of(triple), "-o", out)

    post = replace_post(triple)
    (post / "pytorch_model.bin").write_bytes(b"PK\3\4")
    failed(merge(), 3, "safetensors", str(post))
    replace_post(triple)
    (post / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_checkpoint(post, {"base_model.model.q.lora_A.weight": normal((8, 8))})
    (post / "model.safetensors").rename(post / "adapter_model.safetensors")
    failed(merge(), 3, "adapter", "merge_and_unload")
    replace_post(triple)
    (post / "model-q4.gguf").write_bytes(b"GGUF" + bytes(100))
    failed(merge(), 3, "GGUF")
    replace_post(triple)
    write_checkpoint(post, {"a": normal((4,))}, shards=1)
    (post / "model.safetensors").rename(post / "one.safetensors")
    write_checkpoint(post, {"b": normal((4,))}, shards=1)
    (post / "model.safetensors").rename(post / "two.safetensors")
    failed(merge(), 3, "index")
    replace_post(triple)
    packed = {"q.qweight": ("I32", (4, 4), bytes(64)), "q.scales": normal((4,))}
    write_checkpoint(post, packed, config={"quantization_config": {"quant_method": "gptq"}})
    failed(merge(), 3, "quanti")
    assert not out.exists()


def test_checkpoints_that_do_not_fit_exit_4_with_all_differences_at_once(triple: Path, tmp_path: Path) -> None:
    replace_post(triple)
    tensors = {name: normal(shape) for name, shape in llama_shapes(layers=3, vocab=104).items()}
    tensors["model.norm.weight"] = ("I16", (64,), encode(range(64), "I16"))
    write_checkpoint(triple / "post", tensors)
    run = paramdelta("merge", *of(triple), "-o", tmp_path / "out")
    failed(
        run,
        4,
        "missing from",
        "model.layers.2.self_attn.q_proj.weight",
        "vocabularies differ in size",
        "[104, 64]",
        "I16",
    )
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written_exit_5(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    failed(paramdelta("merge", *of(triple), "-o", tmp_path / "full"), 5, "not empty")
    failed(paramdelta("merge", *of(triple), "-o", triple / "post"), 5, "input")
    failed(paramdelta("merge", *of(triple), "-o", tmp_path / "full/file/out"), 5, str(tmp_path / "full/file/out"))


def test_results_that_are_not_finite_exit_8(tmp_path: Path) -> None:
    for role, value in (("post", 3e38), ("base", -3e38), ("new_base", 3e38)):
        write_checkpoint(tmp_path / role, {"w": ("F32", (1,), encode([value], "F32"))})
    run = paramdelta("merge", *of(tmp_path), "-o", tmp_path / "out", "--quiet")
    failed(run, 8, "w: 1 Inf", "--allow-nonfinite", "1 of 1 shards are finished and kept")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [".paramdelta"]
    run = paramdelta("merge", *of(tmp_path), "-o", tmp_path / "out", "--quiet", "--allow-nonfinite", "--json")
    assert json.loads(run.stdout)["resumed_shards"] == 1


def test_results_that_are_not_finite_are_told_of_however_often_they_are_asked_for(tmp_path: Path) -> None:
    for role, value in (("post", 3e38), ("base", -3e38), ("new_base", 3e38)):
        write_checkpoint(tmp_path / role, {"w": ("F32", (1,), encode([value], "F32"))}, config={})
    counts = {"w": {"infinities": 1, "nans": 0}}
    merge = ["merge", *of(tmp_path), "-o", str(tmp_path / "out")]
    for complete, options in ((False, ["--allow-nonfinite"]), (True, []), (True, ["--allow-nonfinite"])):
        run = paramdelta(*merge, "--json", *options)
        result = json.loads(run.stdout)
        assert result["nonfinite"] == counts
        assert result["already_complete"] == complete
        assert result["bytes_written"] == 4
        assert run.stderr == "warning: elements became infinite or NaN in 'w' (1 Inf, 0 NaN) (nonfinite)\n"
    assert paramdelta(*merge, "--quiet").stderr == ""


def test_a_budget_too_small_exits_9_and_names_the_least_that_works(triple: Path, tmp_path: Path) -> None:
    run = paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--memory", "20MB")
    failed(run, 9, "20 MB", "--memory")
    assert not (tmp_path / "out").exists()
    least = run.stderr.split("Use --memory ")[1].split()[0]
    again = paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--memory", least, "--json")
    assert again.returncode == 0, again.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_a_merge_cleanly(tmp_path: Path, number: int, code: int) -> None:
    for role in ("post", "base", "new_base"):
        sparse_checkpoint(tmp_path / role, {f"w{n}": (1 << 14, 1 << 14) for n in range(3)})
    command = [sys.executable, "-m", "paramdelta", "merge", *of(tmp_path), "-o", str(tmp_path / "out")]
    with subprocess.Popen([*command, "--io", "pread", "--workers", "1"], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.paramdelta/*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopped" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_names_with_control_characters_never_reach_the_terminal_raw(tmp_path: Path) -> None:
    for role, name in (("post", "a\x1b[31m"), ("base", "b\x1b[31m"), ("new_base", "c\x1b[31m")):
        write_checkpoint(tmp_path / role, {name: normal((2,)), f"w\x1b{role[0]}": normal((2,))})
    for run in (
        paramdelta("merge", *of(tmp_path), "-o", tmp_path / "out"),
        paramdelta("inspect", tmp_path / "post"),
    ):
        assert "\x1b" not in run.stdout + run.stderr


OWN_PEAK = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="elsewhere peaks are not told apart by process"
)


@OWN_PEAK
@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_tensors_that_lie_scattered_in_the_inputs_stay_within_the_budget_too(tmp_path: Path, io: str) -> None:
    """A window full of small tensors, each beside a large one in post and base, all of it in the page cache."""
    skip_without_direct_io(io, tmp_path)
    small: dict[str, tuple[int, ...]] = {f"s{n}": (4096,) for n in range(300)}
    large: dict[str, tuple[int, ...]] = {f"l{n}": (512, 1024) for n in range(300)}
    sparse_checkpoint(tmp_path / "new_base", small | large)
    for role in ("post", "base"):
        pairs = zip(small.items(), large.items(), strict=True)
        sparse_checkpoint(tmp_path / role, dict(item for pair in pairs for item in pair))
    for file in tmp_path.rglob("*.safetensors"):
        file.read_bytes()
    run = paramdelta("merge", *of(tmp_path), "-o", tmp_path / "out", "--json", "--memory", "256MB", "--io", io)
    assert json.loads(run.stdout)["peak_rss_bytes"] <= 256_000_000


@OWN_PEAK
@pytest.mark.parametrize("io", ["mmap", "pread", "direct"])
def test_the_whole_process_stays_within_its_memory_budget(tmp_path: Path, io: str) -> None:
    """On 3 × 840 MB of holes, with tensors of 134 MB, some of them behind odd offsets."""
    skip_without_direct_io(io, tmp_path)
    shapes = {"odd": (1, 2049), **{f"w{number}": (1 << 13, 1 << 13) for number in range(6)}, "norm": (8193,)}
    for role in ("post", "base", "new_base"):
        sparse_checkpoint(tmp_path / role, shapes, shards=2 if role == "post" else 1)
    run = paramdelta("merge", *of(tmp_path), "-o", tmp_path / "out", "--json", "--memory", "256MB", "--io", io)
    result = json.loads(run.stdout)
    assert result["peak_rss_bytes"] <= 256_000_000
    assert result["io"] == io
    assert result["bytes_written"] > 800_000_000


def test_usage_errors_are_json_too_where_json_is_asked_for(triple: Path) -> None:
    run = paramdelta("merge", *of(triple), "--json")
    assert run.returncode == 2
    assert json.loads(run.stdout)["error"]["code"] == 2
    assert "--output" in json.loads(run.stdout)["error"]["message"]


def test_errors_name_a_relative_output(triple: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    run = paramdelta("merge", *of(triple), "-o", "out", cwd=tmp_path)
    failed(run, 5)
    assert run.stderr.startswith("error: out: ")


def test_a_demo_never_writes_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/config.json").write_text("mine")
    failed(paramdelta("demo", "-o", tmp_path / "models"), 5, "not empty")
    assert (tmp_path / "models/config.json").read_text() == "mine"


@pytest.mark.parametrize("place", ["n" * 300, "loop/out"])
def test_outputs_that_cannot_even_be_looked_at_exit_5(triple: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    failed(paramdelta("merge", *of(triple), "-o", tmp_path / place), 5)


def test_a_budget_too_small_leaves_the_old_output_where_it_was(triple: Path, tmp_path: Path) -> None:
    assert paramdelta("merge", *of(triple), "-o", tmp_path / "out").returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    run = paramdelta("merge", *of(triple), "-o", tmp_path / "out", "--overwrite", "--memory", "20MB", "--alpha", "2")
    failed(run, 9)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_a_second_signal_waits_for_no_worker(triple: Path, tmp_path: Path) -> None:
    """With a device that hangs: every write of a window waits for much longer than the test does."""
    program = (
        "import os, sys, threading\n"
        "from paramdelta.cli import main\n"
        "from paramdelta.storage.sink import FileSink\n"
        "def hang(*_):\n"
        "    os.write(1, b'writing\\n')\n"  # in one piece, whatever other threads do
        "    threading.Event().wait(600)\n"
        "FileSink.write = hang\n"
        "sys.argv[0] = 'paramdelta'\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "merge", *of(triple), "-o", str(tmp_path / "out"), "--io", "mmap"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)  # the first one waits for the windows in hand
            process.send_signal(signal.SIGINT)
            _, message = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "stopped at once" in message
    assert "Traceback" not in message


def test_readers_that_have_had_enough_are_no_bug(tmp_path: Path) -> None:
    """The output is far larger than a pipe holds, so that writing it fails."""
    sparse_checkpoint(tmp_path / "many", {f"model.layers.{n}.weight": (8,) for n in range(20_000)})
    command = f"{sys.executable} -m paramdelta inspect {tmp_path}/many --json | head -c 10"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout == '{"path": "'
    assert run.stderr == ""


def test_a_pattern_has_one_coefficient(tmp_path: Path) -> None:
    for role in ("post", "base", "new_base"):
        write_checkpoint(tmp_path / role, {"w": normal((2,))}, config={})
    run = paramdelta("plan", *of(tmp_path), "--alpha", "*w*=0.5", "--alpha", "w=0.7", "--alpha", "*w*=0.3")
    failed(run, 2, "a pattern is given twice")
