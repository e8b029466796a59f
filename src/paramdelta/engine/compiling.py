"""Makes object files of loops with numba and LLVM, and links by LLVM what `paramdelta.engine.linking` does not."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import llvmlite.binding as llvm

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUMBA_FEATURES: Final = "NUMBA_CPU_FEATURES"

# Of arrays that own no memory none is ever freed, but the code that would do so is there.
_FREE: Final = re.compile(r"declare void @NRT_MemInfo_call_dtor\(([^)]*)\)[^\n]*")
_FREE_NOTHING: Final = r"define internal void @NRT_MemInfo_call_dtor(\1) { ret void }"


def compile_loop(module: str, name: str) -> bytes:
    """Return an object file with one symbol that others may use, the loop's name, and nothing that it wants of others.

    Args:
        module: of `paramdelta.engine.loops`.
        name: of an ``entry`` there.
    """
    with _wide_registers():
        import numba

    from paramdelta.engine.loops.bits import OPTIONS

    function = getattr(importlib.import_module(f"paramdelta.engine.loops.{module}"), name)
    signature = (numba.types.int64,) * function.__code__.co_argcount
    compiled = numba.njit(function, **OPTIONS)
    compiled.compile(signature)
    _initialise()
    code = llvm.parse_assembly(_FREE.sub(_FREE_NOTHING, compiled.inspect_llvm(signature)))
    [main] = [each for each in code.functions if not each.is_declaration and each.linkage == llvm.Linkage.external]
    main.name = name
    return bytes(_machine(code.triple).emit_object(code))


def link(code: bytes) -> Any:
    """Return LLVM's engine with the code of an object file in it."""
    _initialise()
    machine = _machine(llvm.get_process_triple())
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def processor() -> str:
    """Return the processor's name and features, as LLVM sees them."""
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


@contextlib.contextmanager
def _wide_registers() -> Iterator[None]:
    """Let numba, if it is imported here for the first time in this process, use the processor's widest registers."""
    if _NUMBA_FEATURES in os.environ:
        yield
        return
    os.environ[_NUMBA_FEATURES] = _features()
    try:
        yield
    finally:
        del os.environ[_NUMBA_FEATURES]


def _features() -> str:
    """Return the processor's features; where it has registers of 512 bits, LLVM would rather use half of them."""
    features = llvm.get_host_cpu_features().flatten()
    return f"{features},-prefer-256-bit" if "+avx512f" in features else str(features)


@cache
def _initialise() -> None:
    with contextlib.suppress(RuntimeError):  # newer versions need no call, and say so
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine(triple: str) -> Any:
    target = llvm.Target.from_triple(triple)
    is_x86 = target.name.startswith("x86")
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_features(),
        opt=3,
        reloc="static" if is_x86 else "default",  # as numba has it
        codemodel="jitdefault",
        jit=True,
    )
