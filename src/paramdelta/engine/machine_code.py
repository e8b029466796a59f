"""Machine code of the loops: compiled by numba once for a processor, then kept as object files and linked.

To import numba takes longer than to fuse a gigabyte, and LLVM's library a tenth of a second from a disk. An object file
is what LLVM makes of a loop. What is kept is named after the sources it was made of, the compiler's versions and the
processor, and has a digest, since damaged code would end the process. Where nothing can be kept, loops are compiled
every time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import stat
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paramdelta.engine import linking

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE_VARIABLE: Final = "PARAMDELTA_CACHE_DIR"
"""Environment variable: where machine code is kept instead of the user's cache directory."""

_SOURCES: Final = Path(__file__).with_name("loops")
_MODULES: Final = ("bits", "arithmetic", "shortcuts", "scaled", "statistics")
_DIGEST_BYTES: Final = 32
_PROCESSOR: Final = Path("/proc/cpuinfo")
_DECIDES: Final = frozenset({b"vendor_id", b"cpu family", b"model", b"stepping", b"flags"})
"""What of it an x86-64 processor's code depends on."""


class Loop:
    """A loop of `paramdelta.engine.loops`, linked into this process. Any thread may call it; calls release the GIL."""

    def __init__(self, name: str, address: int, owner: object) -> None:
        """Call what is at an address, as long as its owner lives."""
        self._name, self._address, self._owner = name, address, owner

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
    file = f"{name}-{_key()}.o"
    for directory in _directories():
        code = _read(directory / file)
        if code is not None:
            return _link(name, code)
    from paramdelta.engine.compiling import compile_loop

    code = compile_loop(module, name)
    for directory in _directories():
        if _keep(directory, file, code):
            break
    return _link(name, code)


def _link(name: str, code: bytes) -> Loop:
    linked = linking.link(code)
    if linked is not None:
        return Loop(name, linked.addresses[name], linked)
    from paramdelta.engine import compiling

    engine = compiling.link(code)
    return Loop(name, engine.get_function_address(name), engine)


@cache
def _key() -> str:
    """Return what machine code depends on, digested: sources, compiler, processor."""
    digest = hashlib.sha256()
    for name in _MODULES:
        digest.update((_SOURCES / f"{name}.py").read_bytes())
    digest.update((_SOURCES.parent / "scratch.py").read_bytes())
    digest.update((_SOURCES.parent / "compiling.py").read_bytes())
    digest.update(_version_of("numba") + _version_of("llvmlite"))
    digest.update(f"{sys.platform} {platform.machine()} {sys.maxsize}".encode())
    digest.update(os.environ.get("NUMBA_CPU_FEATURES", "").encode())
    digest.update(_processor())
    return digest.hexdigest()[:24]


def _version_of(package: str) -> bytes:
    """Return what tells one version from another, without importing it or the machinery of package metadata."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return b""
    version = Path(found.origin).with_name("_version.py")
    return version.read_bytes() if version.exists() else Path(found.origin).read_bytes()


def _processor() -> bytes:
    """Return what tells processors apart that could not run each other's code: as the system says, or as LLVM does."""
    try:
        with _PROCESSOR.open("rb", buffering=0) as file:
            described, end, _ = file.read(8192).partition(b"\n\n")  # the first one; to describe all can take long
    except OSError:
        described = end = b""
    found = [line for line in described.splitlines() if line.partition(b":")[0].strip() in _DECIDES]
    if end and len(found) == len(_DECIDES):
        return b"\n".join(found)
    from paramdelta.engine import compiling

    return compiling.processor().encode()


def _directories() -> Iterator[Path]:
    """Yield where machine code may be kept, the best place first."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        yield Path(chosen)
    else:
        with contextlib.suppress(Exception):  # a user without a home
            import platformdirs

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
    import tempfile

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
