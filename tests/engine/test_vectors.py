"""That LLVM makes vector instructions of the loops that do nearly all of the work, on processors that people have."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import llvmlite.binding as llvm
import pytest

AVX2 = ("haswell", "+avx2,+fma,+bmi,+bmi2,+f16c")
AVX512 = ("skylake-avx512", "+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl")


@pytest.mark.skipif(platform.machine().lower() not in {"x86_64", "amd64"}, reason="numba optimises for its own kind")
@pytest.mark.parametrize("processor", [AVX2, AVX512], ids=["AVX2", "AVX-512"])
def test_loops_become_vector_instructions(processor: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "tests.vectors", *processor]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.keys() == {"skim_bf16", "skim_f16", "skim_f32"}
    least = 256 if llvm.llvm_version_info >= (20,) else 128  # older ones are shy of wide registers
    for loop, of in found.items():
        assert sum(count for bits, count in of["x86"].items() if int(bits) >= least) >= 12, (loop, of)  # TwoSum twice
        assert of["aarch64"]["128"] >= 12, (loop, of)
