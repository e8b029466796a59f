"""Machine code of the loops: compiled by numba once for a processor, then kept as object files and linked by LLVM.

To import numba takes longer than to fuse a gigabyte. An object file is what LLVM makes of a loop; llvmlite, which comes
with numba, links it into a process within milliseconds. What is kept is named after the sources it was made of, the
compiler's versions and the processor, and has a digest, since damaged code would end the process. Where nothing can be
kept, loops are compiled every time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import os
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import llvmlite
import llvmlite.binding as llvm
import platformdirs

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE_VARIABLE: Final = "PARAMDELTA_CACHE_DIR"
"""Environment variable: where machine code is kept instead of the user's cache directory."""

_SOURCES: Final = Path(__file__).with_name("loops")
_MODULES: Final = ("bits", "arithmetic", "shortcuts", "scaled")
_DIGEST_BYTES: Final = 32
_NEVER_CALLED: Final = "paramdelta_never_called"


class Loop:
    """A loop of `paramdelta.engine.loops`, linked into this process. Any thread may call it; calls release the GIL."""

    def __init__(self, name: str, engine: Any) -> None:
        self._name = name
        self._engine = engine  # owns the code
        self._address = engine.get_function_address(name)

    def __call__(self, *arguments: int) -> int:
        """Call it; return its result, 0 where it has none."""
        result, raised = ctypes.c_int64(), ctypes.c_void_p()
        status = _prototype(len(arguments))(self._address)(ctypes.byref(result), ctypes.byref(raised), *arguments)
        if status != 0:
            raise RuntimeError(f"{self._name} ended with status {status}")
        return result.value


@cache
def _prototype(count: int) -> Any:
    """Return the type of loops with so many arguments, in numba's calling convention.

    A status is returned; the result, and an exception, which there never is, go to the first two places.
    """
    return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * count)


@cache
def loop(module: str, name: str) -> Loop:
    """Return a loop, from what is kept of it, or compiled.

    Args:
        module: of `paramdelta.engine.loops`.
        name: of an ``entry`` there.
    """
    _initialise()
    file = f"{name}-{_key()}.o"
    for directory in _directories():
        code = _read(directory / file)
        if code is not None:
            return Loop(name, _link(code))
    code = _compile(module, name)
    for directory in _directories():
        if _keep(directory, file, code):
            break
    return Loop(name, _link(code))


@cache
def _initialise() -> Any:
    """Make LLVM ready; return what it knows the address of, which the cache keeps alive."""
    with contextlib.suppress(RuntimeError):  # newer versions need no call, and say so
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    never: Any = ctypes.CFUNCTYPE(None)(lambda: None)
    llvm.add_symbol(_NEVER_CALLED, ctypes.cast(never, ctypes.c_void_p).value)
    return never


@cache
def _key() -> str:
    """Return what machine code depends on, digested: sources, compiler, processor."""
    digest = hashlib.sha256()
    for name in _MODULES:
        digest.update((_SOURCES / f"{name}.py").read_bytes())
    digest.update((_SOURCES.parent / "scratch.py").read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(_version_of_numba())
    processor = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    digest.update(repr((llvmlite.__version__, llvm.get_process_triple(), processor)).encode())
    return digest.hexdigest()[:24]


def _version_of_numba() -> bytes:
    """Return what tells one version from another, without importing it or the machinery of package metadata."""
    found = importlib.util.find_spec("numba")
    if found is None or found.origin is None:
        return b""
    version = Path(found.origin).with_name("_version.py")
    return version.read_bytes() if version.exists() else Path(found.origin).read_bytes()


def _directories() -> Iterator[Path]:
    """Yield where machine code may be kept, the best place first."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        yield Path(chosen)
    else:
        with contextlib.suppress(Exception):  # a user without a home
            yield platformdirs.user_cache_path("paramdelta", appauthor=False)
    yield _SOURCES / "__pycache__"


def _read(path: Path) -> bytes | None:
    """Return the code in a file; None where there is none, it is damaged, or others might have written it."""
    try:
        with path.open("rb") as file:
            if not _is_trusted(os.fstat(file.fileno())):
                return None
            digest, code = file.read(_DIGEST_BYTES), file.read()
    except OSError:
        return None
    return code if hashlib.sha256(code).digest() == digest else None


def _is_trusted(status: os.stat_result) -> bool:
    """Return whether nobody but this user and the administrator can write a file."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in {0, os.geteuid()} and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _keep(directory: Path, name: str, code: bytes) -> bool:
    """Write a file that others find complete or not at all; return whether that could be done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f"{name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(temporary).replace(directory / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        return False
    return True


def _compile(module: str, name: str) -> bytes:
    """Return an object file with one symbol, the loop's name."""
    import numba

    from paramdelta.engine.loops.bits import OPTIONS

    function = getattr(importlib.import_module(f"paramdelta.engine.loops.{module}"), name)
    signature = (numba.types.int64,) * function.__code__.co_argcount
    compiled = numba.njit(function, **OPTIONS)
    compiled.compile(signature)
    text: str = compiled.inspect_llvm(signature)
    # Of arrays that own no memory none is ever freed, but the code that would do so is there, and wants a symbol.
    code = llvm.parse_assembly(text.replace("@NRT_MemInfo_call_dtor(", f"@{_NEVER_CALLED}("))
    [main] = [each for each in code.functions if not each.is_declaration and each.linkage == llvm.Linkage.external]
    main.name = name
    return bytes(_machine(code.triple).emit_object(code))


def _machine(triple: str) -> Any:
    target = llvm.Target.from_triple(triple)
    is_x86 = target.name.startswith("x86")
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if is_x86 else "default",  # as numba has it
        codemodel="jitdefault",
        jit=True,
    )


def _link(code: bytes) -> Any:
    machine = _machine(llvm.get_process_triple())
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
