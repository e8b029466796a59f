"""Code that is linked here does what LLVM would have made of the same file; what cannot be linked is left to LLVM."""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys

import llvmlite.binding as llvm
import pytest

from paramdelta.engine import compiling, kernels, linking, machine_code

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="only this system's files are linked"
)

SOURCE = """
@table = {linkage} constant [4 x i64] [i64 11, i64 22, i64 33, i64 44]
@other = internal constant [2 x double] [double 0.5, double 0.25], align 64
{more}
define internal i64 @look_up(i64 %place) noinline {{
  %at = getelementptr [4 x i64], {pointer} @table, i64 0, i64 %place
  %found = load i64, {element} %at
  ret i64 %found
}}
define i64 @main(i64 %place) {{
  %found = call i64 @look_up(i64 %place)
  %again = call i64 @look_up(i64 %place)
  %sum = add i64 %found, %again
  {call}
  ret i64 %sum
}}
"""


def made(reloc: str, codemodel: str, **parts: str) -> bytes:
    """Return an object file of a function that calls another one, which reads a table."""
    opaque = llvm.llvm_version_info[0] >= 16
    names = {"pointer": "ptr" if opaque else "[4 x i64]*", "element": "ptr" if opaque else "i64*"}
    source = SOURCE.format(**{"linkage": "internal", "more": "", "call": ""} | names | parts)
    compiling._initialise()
    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(opt=0, reloc=reloc, codemodel=codemodel)
    module = llvm.parse_assembly(source)
    module.triple = triple
    return bytes(machine.emit_object(module))


@pytest.mark.parametrize(("reloc", "codemodel"), [("static", "large"), ("pic", "small"), ("pic", "large")])
def test_functions_and_tables_are_found(reloc: str, codemodel: str) -> None:
    code = linking.link(made(reloc, codemodel))
    if code is None:  # it wanted a table of addresses
        assert (reloc, codemodel) == ("pic", "large")
        return
    main = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(code.addresses["main"])
    assert [main(place) for place in range(4)] == [22, 44, 66, 88]


def test_what_it_cannot_do_is_refused() -> None:
    declared, called = "declare i64 @elsewhere(i64)", "call i64 @elsewhere(i64 1)"
    assert linking.link(made("static", "large", more=declared, call=called)) is None
    assert linking.link(made("static", "small")) is None, "addresses of 32 bits"
    written = "@count = global i64 7\ndefine void @write() { store i64 8, {} @count ret void }"
    pointer = "ptr" if llvm.llvm_version_info[0] >= 16 else "i64*"
    assert linking.link(made("static", "large", more=written.replace("{}", pointer))) is None


def test_files_of_other_kinds_are_refused() -> None:
    file = made("static", "large")
    assert linking.link(b"") is None
    assert linking.link(b"MZ" + file[2:]) is None
    assert linking.link(file[:4] + b"\x01" + file[5:]) is None, "32 bits"
    assert linking.link(file[:16] + struct.pack("<H", 3) + file[18:]) is None, "a library"
    assert linking.link(file[:18] + struct.pack("<H", 183) + file[20:]) is None, "aarch64"


def test_nothing_is_linked_where_memory_cannot_be_made_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    file = made("static", "large")
    monkeypatch.setattr(linking, "_mprotect", lambda *_: -1)
    assert linking.link(file) is None
    monkeypatch.setattr(linking, "_mprotect", None)
    assert linking.link(file) is None
    monkeypatch.undo()
    monkeypatch.delattr(mmap, "PROT_EXEC")
    assert linking.link(file) is None


def test_every_loop_is_linked_without_llvm_and_does_what_llvm_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = struct.unpack("<2q", struct.pack("<2d", kernels._TINY, kernels._ULP))
    for module, name in (
        ("arithmetic", "floats_are_strict"),
        ("arithmetic", "fuse_exact"),
        ("arithmetic", "fuse_weighted"),
        ("shortcuts", "skim_bf16"),
        ("shortcuts", "skim_f16"),
        ("shortcuts", "skim_f32"),
        ("scaled", "fuse_scaled"),
        ("scaled", "requantise"),
        ("statistics", "measure"),
    ):
        assert isinstance(machine_code.loop(module, name)._owner, linking.Code)
    machine_code.loop.cache_clear()
    try:
        monkeypatch.setattr(linking, "link", lambda _: None)
        again = machine_code.loop("arithmetic", "floats_are_strict")
        assert not isinstance(again._owner, linking.Code)
        assert again(*arguments) == 1
        assert again(0, arguments[1]) == 0
    finally:
        machine_code.loop.cache_clear()
    assert kernels.floats_are_strict()
