"""Casts between real floating-point dtypes, block by block, with every loss counted.

One rounding, to nearest, ties to even (IEEE 754), from the exact source value: float64 to bfloat16
does not pass through a rounded float32. Overflow gives infinity, as IEEE and torch have it. A NaN
stays a NaN: to bfloat16 it keeps its sign and leading payload bits, quiet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.tensors import DType

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

# name -> (exponent bits, mantissa bits, bias, has infinities, NaN only at 0x80)
_F8_LAYOUTS = {
    "F8_E4M3": (4, 3, 7, False, False),
    "F8_E5M2": (5, 2, 15, True, False),
    "F8_E4M3FNUZ": (4, 3, 8, False, True),
    "F8_E5M2FNUZ": (5, 2, 16, False, True),
}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(slots=True)
class CastCounts:
    """What a cast did to the values of one tensor.

    Attributes:
        elements: how many there are.
        inexact: finite values that were rounded to another finite value.
        overflowed: finite values that became infinite.
        underflowed: of the inexact ones, those that became zero.
        nan_lost: NaN values that became numbers.
    """

    elements: int = 0
    inexact: int = 0
    overflowed: int = 0
    underflowed: int = 0
    nan_lost: int = 0


def cast_block(block: memoryview, src: DType, dst: DType, counts: CastCounts) -> memoryview:
    """The bytes of `block` as `dst`, little-endian; losses are added to `counts`."""
    import numpy

    if (src.name, dst.name) == ("F32", "BF16"):
        fast = _ordinary_float32_to_bfloat16(block, counts)
        if fast is not None:
            return fast
    with numpy.errstate(over="ignore", invalid="ignore", under="ignore"):
        wide = widen(block, src.name)
        out = _narrow(wide, dst.name)
        back = widen(memoryview(out.view("u1")), dst.name)  # type: ignore[arg-type]
        _count(wide, back, counts)
    return memoryview(out.view("u1"))  # type: ignore[arg-type]


def _ordinary_float32_to_bfloat16(block: memoryview, counts: CastCounts) -> memoryview | None:
    """The common cast, counted on its bits; None where a value is lost or is not finite."""
    import numpy

    bits = numpy.frombuffer(block, dtype="<u4")
    size = bits & numpy.uint32(0x7FFFFFFF)
    # From 0x7F7F8000 on everything rounds to infinity, is one, or is a NaN; up to 0x8000 all but
    # zero rounds to zero, and zero minus one is the largest integer.
    if not size.size or size.max() >= 0x7F7F8000 or (size - numpy.uint32(1)).min() < 0x8000:
        return None
    rounded = bits >> 16
    rounded &= 1
    rounded += numpy.uint32(0x7FFF)
    rounded += bits
    counts.elements += bits.size
    counts.inexact += int(numpy.count_nonzero(bits & numpy.uint32(0xFFFF)))
    return memoryview(rounded.view("<u2")[1::2].copy().view("u1"))  # type: ignore[arg-type]


def _count(wide: Array, back: Array, counts: CastCounts) -> None:
    import numpy

    counts.elements += wide.size
    changed = wide != back  # True for every NaN as well
    if not changed.any():
        return
    if numpy.isfinite(back).all() and not numpy.isnan(wide).any():
        # Nothing but rounding, as in nearly every block: no copies are needed to count it.
        counts.inexact += int(numpy.count_nonzero(changed))
        counts.underflowed += int(numpy.count_nonzero(changed & (back == 0)))
        return
    before, after = wide[changed], back[changed]
    nan_before, nan_after = numpy.isnan(before), numpy.isnan(after)
    counts.nan_lost += int((nan_before & ~nan_after).sum())
    overflowed = int((numpy.isfinite(before) & numpy.isinf(after)).sum())
    counts.overflowed += overflowed
    counts.inexact += int((~nan_before).sum()) - overflowed
    counts.underflowed += int(((after == 0) & ~nan_before).sum())


def widen(block: memoryview, name: str) -> Array:
    """The exact values, as float64 for F64 and float32 for everything else."""
    import numpy

    if name in _F8_LAYOUTS:
        table: Array = _f8_values(name)
        return numpy.take(table, numpy.frombuffer(block, dtype="u1"))
    if name == "BF16":
        bits = numpy.frombuffer(block, dtype="<u2").astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    values = numpy.frombuffer(block, dtype=_NUMPY[name])
    return values.astype("<f4") if name == "F16" else values


def _narrow(values: Array, name: str) -> Array:
    if name != "BF16":
        return values.astype(_NUMPY[name])
    if values.dtype.itemsize == 8:
        values = _to_odd_float32(values)
    return _float32_to_bfloat16(values)


def _float32_to_bfloat16(values: Array) -> Array:
    import numpy

    bits = values.view("<u4")
    rounded = bits + (((bits >> 16) & 1) + numpy.uint32(0x7FFF))
    out: Array = (rounded >> 16).astype("<u2")
    nan = numpy.isnan(values)
    if nan.any():
        out[nan] = ((bits[nan] >> 16) | 0x40).astype("<u2")
    return out


def _to_odd_float32(values: Array) -> Array:
    """float64 to float32, rounded to odd, so that rounding once more to bfloat16 is exact."""
    import numpy

    nearest = values.astype("<f4")
    bits = nearest.view("<u4").copy()
    exact = nearest.astype("<f8")
    inexact = (exact != values) & ~numpy.isnan(values)
    bits[inexact & (numpy.abs(exact) > numpy.abs(values))] -= 1  # toward zero
    bits[inexact] |= 1
    return bits.view("<f4")


@lru_cache(maxsize=4)
def _f8_values(name: str) -> Array:
    """The 256 values of an 8-bit float, as float32. Source: OCP 8-bit floating point, rev. 1.0."""
    import numpy

    exponent_bits, mantissa_bits, bias, has_inf, nan_at_zero = _F8_LAYOUTS[name]
    values = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        mantissa = code & ((1 << mantissa_bits) - 1)
        top = exponent == (1 << exponent_bits) - 1
        if nan_at_zero and code == 0x80:
            value = float("nan")
        elif has_inf and top:
            value = sign * float("inf") if mantissa == 0 else float("nan")
        elif not has_inf and not nan_at_zero and code & 0x7F == 0x7F:
            value = float("nan")
        elif exponent == 0:
            value = sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        values.append(value)
    return numpy.array(values, dtype="<f4")
