"""The element types of the safetensors format: their widths, and what numpy calls them.

Names are spelled as headers spell them. numpy itself is not imported: `DType.numpy` is a string for
``numpy.dtype``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    `bits` is the width of an element; types below 8 bits are packed. `is_float` tells real floating-point
    types from integers, booleans and complex numbers. `numpy` names the little-endian numpy dtype with the
    same bytes, or is None where numpy has none.
    """

    name: str
    bits: int
    is_float: bool
    numpy: str | None


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            DType("BOOL", 8, is_float=False, numpy="|b1"),
            DType("F4", 4, is_float=True, numpy=None),
            DType("F6_E2M3", 6, is_float=True, numpy=None),
            DType("F6_E3M2", 6, is_float=True, numpy=None),
            DType("U8", 8, is_float=False, numpy="|u1"),
            DType("I8", 8, is_float=False, numpy="|i1"),
            DType("F8_E5M2", 8, is_float=True, numpy=None),
            DType("F8_E4M3", 8, is_float=True, numpy=None),
            DType("F8_E8M0", 8, is_float=True, numpy=None),
            DType("F8_E4M3FNUZ", 8, is_float=True, numpy=None),
            DType("F8_E5M2FNUZ", 8, is_float=True, numpy=None),
            DType("I16", 16, is_float=False, numpy="<i2"),
            DType("U16", 16, is_float=False, numpy="<u2"),
            DType("F16", 16, is_float=True, numpy="<f2"),
            DType("BF16", 16, is_float=True, numpy=None),
            DType("I32", 32, is_float=False, numpy="<i4"),
            DType("U32", 32, is_float=False, numpy="<u4"),
            DType("F32", 32, is_float=True, numpy="<f4"),
            DType("C64", 64, is_float=False, numpy="<c8"),
            DType("F64", 64, is_float=True, numpy="<f8"),
            DType("I64", 64, is_float=False, numpy="<i8"),
            DType("U64", 64, is_float=False, numpy="<u8"),
        )
    }
)
"""Every dtype that safetensors 0.8 reads, by name."""

WHOLE_FLOATS = frozenset(dtype.name for dtype in DTYPES.values() if dtype.is_float and dtype.bits >= 16)
"""Names of the floating-point types that weights have as they are: BF16, F16, F32, F64."""

ADDABLE = WHOLE_FLOATS | {"F8_E4M3", "F8_E5M2"}
"""Names of the floating-point types that can be added element by element; FP8 with its scales, where it has some."""

INTEGERS = frozenset(dtype.name for dtype in DTYPES.values() if not dtype.is_float and dtype.name != "C64")
"""Names of the integer types, BOOL included."""
