"""What is kept of compiled loops: found again, never trusted when damaged, and never in the way."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from paramdelta.engine import kernels, machine_code

PROGRAM = """
import sys
from paramdelta.engine import kernels
assert kernels.floats_are_strict()
print("numba" in sys.modules, "llvmlite" in sys.modules)
"""


def start(directory: Path) -> subprocess.Popen[str]:
    environment = os.environ | {machine_code.CACHE_VARIABLE: str(directory)}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def compiles(directory: Path) -> bool:
    """Use a loop in a new process; return whether it had to be compiled."""
    process = start(directory)
    said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    return said.startswith("True")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for what is kept, with one loop in it."""
    monkeypatch.setenv(machine_code.CACHE_VARIABLE, str(tmp_path / "kept"))
    assert compiles(tmp_path / "kept")
    return tmp_path / "kept"


def the_file(directory: Path) -> Path:
    [file] = directory.iterdir()
    return file


def test_numba_is_needed_once(directory: Path) -> None:
    assert not compiles(directory)
    assert not compiles(directory)


def cut(code: bytes) -> bytes:
    return code[:-1]


def flip(code: bytes) -> bytes:
    return code[:500] + bytes([code[500] ^ 1]) + code[501:]


DAMAGE = {"empty": lambda _: b"", "garbage": lambda _: b"not machine code" * 9, "cut": cut, "one bit": flip}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_code_is_never_run_and_is_mended(directory: Path, damage: str) -> None:
    file = the_file(directory)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert compiles(directory)
    assert the_file(directory).read_bytes() == whole
    assert not compiles(directory)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system knows no other users' rights")
@pytest.mark.parametrize("right", [stat.S_IWGRP, stat.S_IWOTH])
def test_code_that_others_can_write_is_never_run(directory: Path, right: int) -> None:
    file = the_file(directory)
    file.chmod(file.stat().st_mode | right)
    assert compiles(directory)
    assert not the_file(directory).stat().st_mode & right
    assert not compiles(directory)


def test_what_stands_in_the_way_costs_a_compilation_each_time_and_nothing_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = the_file(directory)
    file.unlink()
    file.mkdir()
    (file / "x").touch()
    monkeypatch.setattr(machine_code, "_directories", lambda: iter([directory, file / "x"]))
    machine_code.loop.cache_clear()
    try:
        assert kernels.floats_are_strict()
    finally:
        machine_code.loop.cache_clear()
    assert [entry.name for entry in directory.iterdir()] == [file.name]


def test_without_a_writable_directory_code_is_kept_beside_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home(*_: object, **__: object) -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv(machine_code.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", no_home)
    assert list(machine_code._directories()) == [Path(machine_code.__file__).parent / "loops" / "__pycache__"]
    (tmp_path / "file").touch()
    assert not machine_code._keep(tmp_path / "file" / "sub", "name", b"code")
    assert not machine_code._keep(tmp_path / "file", "name", b"code")


def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(4)]
    ends = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ends
    the_file(tmp_path)  # and no leftovers
    assert not compiles(tmp_path)


def test_what_is_kept_is_named_after_all_that_it_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key() -> str:
        machine_code._key.cache_clear()
        return machine_code._key()

    before = key()
    assert key() == before
    for name in machine_code._MODULES:
        sources = tmp_path / name / "loops"
        shutil.copytree(machine_code._SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
        for beside in ("scratch.py", "compiling.py"):
            shutil.copy(machine_code._SOURCES.parent / beside, sources.parent)
        with (sources / f"{name}.py").open("a") as file:
            file.write("\n")
        with monkeypatch.context() as patch:
            patch.setattr(machine_code, "_SOURCES", sources)
            assert key() != before
    with monkeypatch.context() as patch:
        patch.setattr(machine_code, "_processor", lambda: b"another")
        assert key() != before
    for package in ("numba", "llvmlite"):
        with monkeypatch.context() as patch:
            version = machine_code._version_of
            patch.setattr(
                machine_code, "_version_of", lambda name, it=package, v=version: v(name) + b"!" * (name == it)
            )
            assert key() != before
    assert key() == before


def test_the_modules_that_are_digested_are_all_there_are() -> None:
    there = {file.stem for file in machine_code._SOURCES.glob("*.py")} - {"__init__"}
    assert there == set(machine_code._MODULES)


def test_a_loop_that_fails_says_which() -> None:
    failing = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: 1)

    address = ctypes.cast(failing, ctypes.c_void_p).value or 0
    with pytest.raises(RuntimeError, match="skim ended with status 1"):
        machine_code.Loop("skim", address, failing)()
