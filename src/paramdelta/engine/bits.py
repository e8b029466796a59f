"""What numpy cannot say inside a compiled loop: memory at any address, and the bits of a float as an integer.

Tensor data may start at any byte of a file. LLVM loads and stores that promise an alignment of one byte only cost
nothing extra on current CPUs and still become vector instructions. Addresses and indices are int64.
"""

from __future__ import annotations

import contextlib
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numba
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Compile for callers in Python: release the GIL, keep the machine code beside the module or in the user's cache.

    Floating point stays strict: reassociation and contraction would break error-free sums.
    """
    # numba compares the function's own file alone with its cache: so the code is named after all files it is made of.
    function.__qualname__ += f".{_source_digest()}"
    try:
        compiled = numba.njit(function, nogil=True, fastmath=False, cache=True)
    except RuntimeError:  # no directory to keep the code in, as in a read-only container: compile every time
        compiled = numba.njit(function, nogil=True, fastmath=False)
    else:
        compiled._cache = _LenientCache(compiled._cache)
    return cast("Callable[P, R]", compiled)


class _LenientCache:
    """numba's cache of machine code, which may fail: a damaged file or a full disk costs a compilation, not the run."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, *arguments: Any) -> Any:
        """Return what was kept, or None, which means: compile."""
        try:
            return self._cache.load_overload(*arguments)
        except Exception:  # unpickling what is damaged raises anything
            with contextlib.suppress(Exception):
                self._cache.flush()  # or it would be damaged for ever
            return None

    def save_overload(self, *arguments: Any) -> None:
        """Keep the code, if that can be done."""
        with contextlib.suppress(Exception):
            self._cache.save_overload(*arguments)


def part(function: Callable[P, R]) -> Callable[P, R]:
    """Compile for use inside an `entry`, whose machine code it becomes part of."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast("Callable[P, R]", numba.njit(function, nogil=True, fastmath=False, **options))


@cache
def _source_digest() -> str:
    sources = (Path(__file__).with_name(name) for name in ("bits.py", "arithmetic.py", "shortcuts.py", "scaled.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def _loader(element: types.Type) -> Callable[[int | np.int64, int], Any]:
    def load(_context: Any, address: types.Type, index: types.Type) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.load(_element_pointer(context, builder, element, arguments), align=1)

        return element(address, index), generate

    return cast("Callable[[int | np.int64, int], Any]", intrinsic(load))


def _storer(element: types.Type) -> Callable[[int, int, Any], None]:
    def store(_context: Any, address: types.Type, index: types.Type, _value: types.Type) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            *place, value = arguments
            builder.store(value, _element_pointer(context, builder, element, place), align=1)
            return context.get_dummy_value()

        return types.void(address, index, element), generate

    return cast("Callable[[int, int, Any], None]", intrinsic(store))


def _element_pointer(context: Any, builder: Any, element: types.Type, place: Any) -> Any:
    address, index = place
    kind = context.get_value_type(element)
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def _bitcast(source: types.Type, target: types.Type) -> Callable[[Any], Any]:
    def cast_bits(_context: Any, _value: types.Type) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return cast("Callable[[Any], Any]", intrinsic(cast_bits))


load8 = _loader(types.uint8)
load16 = _loader(types.uint16)
load32 = _loader(types.uint32)
load64 = _loader(types.uint64)
store8 = _storer(types.uint8)
store16 = _storer(types.uint16)
store32 = _storer(types.uint32)
store64 = _storer(types.uint64)

bits32 = _bitcast(types.float32, types.uint32)
bits64 = _bitcast(types.float64, types.uint64)
float32 = _bitcast(types.uint32, types.float32)
float64 = _bitcast(types.uint64, types.float64)
