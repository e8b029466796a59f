"""What numpy cannot say inside a compiled loop: memory at any address, and the bits of a float as an integer.

Tensor data may start at any byte of a file. LLVM loads and stores that promise an alignment of one byte only cost
nothing extra on current CPUs and still become vector instructions. Addresses and indices are int64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import llvmlite.ir as ir
import numba
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")

LINE = 64
"""Bytes of a cache line; where they are longer, some requests are made twice."""

AHEAD = 2048
"""Bytes. More than 4 KiB do harm: what is asked for pushes out of the L1 cache what is being worked on."""

# Floating point stays strict: reassociation and contraction would break error-free sums. A division by zero gives what
# IEEE 754 says; nothing raises, so that the machine code needs nothing of Python.
OPTIONS = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a loop that `paramdelta.engine.machine_code` makes machine code of: arguments and result are int64."""
    return function


def part(function: Callable[P, R]) -> Callable[P, R]:
    """Compile for use inside an `entry`, whose machine code it becomes part of."""
    return cast("Callable[P, R]", numba.njit(function, **OPTIONS))


def reduction(function: Callable[P, R]) -> Callable[P, R]:
    """Compile as `part` does, for sums whose order does not matter: several are formed at once, with fused products."""
    free = {"fastmath": {"reassoc", "nsz", "contract"}}
    return cast("Callable[P, R]", numba.njit(function, **OPTIONS | free))


def _loader(element: types.Type) -> Callable[[int | np.int64, int], Any]:
    def load(_context: Any, address: types.Type, index: types.Type) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.load(_element_pointer(context, builder, element, arguments), align=1)

        return element(address, index), generate

    return cast("Callable[[int | np.int64, int], Any]", intrinsic(load))


def _storer(element: types.Type) -> Callable[[int | np.int64, int, Any], None]:
    def store(_context: Any, address: types.Type, index: types.Type, _value: types.Type) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            *place, value = arguments
            builder.store(value, _element_pointer(context, builder, element, place), align=1)
            return context.get_dummy_value()

        return types.void(address, index, element), generate

    return cast("Callable[[int | np.int64, int, Any], None]", intrinsic(store))


def _element_pointer(context: Any, builder: Any, element: types.Type, place: Any) -> Any:
    address, index = place
    kind = context.get_value_type(element)
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def _prefetch(_context: Any, address: types.Type) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8), ir.IntType(32)
        place = builder.inttoptr(arguments[0], byte.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(function, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(address), generate


prefetch = cast("Callable[[int | np.int64], None]", intrinsic(_prefetch))
"""Ask for the cache line at an address, which may be any, to be read soon."""


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


def _pointer(element: types.Type) -> Callable[[int], Any]:
    def to_pointer(_context: Any, address: types.Type) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(element).as_pointer())

        return types.CPointer(element)(address), generate

    return cast("Callable[[int], Any]", intrinsic(to_pointer))


_integers, _codes, _values = _pointer(types.int64), _pointer(types.uint64), _pointer(types.float64)


@part
def integer_array(address: int, rows: int, columns: int) -> NDArray[np.int64]:
    """Return the array of int64 that begins at an address."""
    array: NDArray[np.int64] = numba.carray(_integers(address), (rows, columns))
    return array


@part
def code_array(address: int, rows: int, columns: int) -> NDArray[np.uint64]:
    """Return the array of uint64 that begins at an address."""
    array: NDArray[np.uint64] = numba.carray(_codes(address), (rows, columns))
    return array


@part
def value_array(address: int, rows: int, columns: int) -> NDArray[np.float64]:
    """Return the array of float64 that begins at an address."""
    array: NDArray[np.float64] = numba.carray(_values(address), (rows, columns))
    return array


@part
def get(address: int | np.int64, index: int) -> float:
    """Return an f64 in memory. For what is used once a block, an address is cheaper than an array, which is counted."""
    value: float = float64(load64(address, index))
    return value


@part
def put(address: int | np.int64, index: int, value: float) -> None:
    """Write an f64 to memory."""
    store64(address, index, bits64(value))


@part
def fetch_ahead(address: int | np.int64, size: int) -> None:
    """Ask for as many bytes of a stream as will be read from `AHEAD` bytes on.

    One processor has the requests of several pages under way then; by itself it stops at the end of each page.
    """
    for line in range(AHEAD, AHEAD + size, LINE):
        prefetch(address + line)
