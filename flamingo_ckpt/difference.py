"""How two tensors of one dtype and shape differ, counted block by block.

Only blocks that differ are looked at, and of those only the elements that do: what is equal costs
nothing. Memory is that of a few blocks, whatever the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.formats.cast import CastCounts, cast_block, widen
from flamingo_ckpt.tensors import DTYPES, DType

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

#: (least distance, greatest distance, elements)
Bucket = tuple[int, int, int]
# A dtype of wider elements has no unsigned integers of numpy's.
_MAX_COUNTED_BITS = 64
_NARROWER = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where two tensors of the same dtype and shape differ, and how.

    Attributes:
        dtype: of both.
        num_different: elements whose bits differ.
        index: of the first, in row-major order, as a tuple.
        expected: its bits in the derived tensor, hexadecimal, most significant digit first.
        found: its bits in the destination.
        bits_flipped: how many elements differ in each bit, the least significant first; empty
            where an element is no whole number of bytes, or wider than 64 bits.
        max_abs: largest absolute difference of a float dtype, over elements that are finite on
            both sides; None where there is none.
        max_ulp: the same in units in the last place: how many values of the dtype lie between.
        ulp_histogram: such distances, by powers of two; +0 and -0 are 0 apart.
        num_not_finite: elements that differ and are NaN or infinite on a side.
        conclusion: what is true of every element that differs, in words with places for
            `{ours}` and `{theirs}`; "" where nothing is.
    """

    dtype: str
    num_different: int
    index: tuple[int, ...]
    expected: str
    found: str
    bits_flipped: tuple[int, ...] = ()
    max_abs: float | None = None
    max_ulp: int | None = None
    ulp_histogram: tuple[Bucket, ...] = ()
    num_not_finite: int = 0
    conclusion: str = ""


class Tally:
    """Counts what differs between two tensors, as their blocks go by."""

    def __init__(self, dtype: DType, shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._shape = shape
        self._width = max(dtype.bits // 8, 1)
        self._num_different = 0
        self._first: tuple[tuple[int, ...], str, str] | None = None
        countable = dtype.bits % 8 == 0 and dtype.bits <= _MAX_COUNTED_BITS
        self._flipped = [0] * (dtype.bits if countable else 0)
        self._ulps = [0] * (dtype.bits + 1)
        self._max_abs: float | None = None
        self._max_ulp: int | None = None
        self._num_not_finite = 0
        self._possible = dict(_explanations(dtype)) if countable else {}

    def add(self, ours: memoryview, theirs: memoryview, at: int) -> None:
        """Count the differing elements of two blocks that are not equal.

        Args:
            ours: of the first, whole elements.
            theirs: of the second, of the same length.
            at: bytes of the tensor before them.
        """
        import numpy

        kind = f"<u{self._width}" if self._width in (1, 2, 4, 8) else f"V{self._width}"
        one, other = numpy.frombuffer(ours, dtype=kind), numpy.frombuffer(theirs, dtype=kind)
        differs = one != other
        self._num_different += int(differs.sum())
        if self._first is None:
            self._first = self._describe(ours, theirs, at, int(differs.argmax()))
        if self._flipped:
            self._count(one[differs], other[differs])

    def result(self) -> Difference | None:
        """What was counted; None where nothing differs."""
        if self._first is None:
            return None
        index, expected, found = self._first
        return Difference(
            dtype=self._dtype.name,
            num_different=self._num_different,
            index=index,
            expected=expected,
            found=found,
            bits_flipped=tuple(self._flipped),
            max_abs=self._max_abs,
            max_ulp=self._max_ulp,
            ulp_histogram=tuple(_buckets(self._ulps)),
            num_not_finite=self._num_not_finite,
            conclusion=self._conclusion(),
        )

    def _describe(
        self, ours: memoryview, theirs: memoryview, at: int, first: int
    ) -> tuple[tuple[int, ...], str, str]:
        width = self._width
        piece = slice(first * width, (first + 1) * width)
        is_whole = self._dtype.bits >= 8
        index = _unravel(at // width + first, self._shape) if is_whole else (at + first,)
        return index, bytes(ours[piece])[::-1].hex(), bytes(theirs[piece])[::-1].hex()

    def _count(self, ours: Array, theirs: Array) -> None:
        """Count the bits and the distances of elements that differ."""
        unsigned = f"<u{self._width}"
        a, b = ours.view(unsigned), theirs.view(unsigned)
        for bit, number in enumerate(_count_bits(a ^ b, self._width)):
            self._flipped[bit] += number
        self._possible = {words: holds for words, holds in self._possible.items() if holds(a, b)}
        if self._dtype.is_real_float:
            self._count_distances(a, b)

    def _count_distances(self, a: Array, b: Array) -> None:
        import numpy

        with numpy.errstate(over="ignore", invalid="ignore"):
            first, second = _values(a, self._dtype), _values(b, self._dtype)
            apart = numpy.abs(first - second)
        finite = numpy.isfinite(first) & numpy.isfinite(second)
        if not finite.all():
            self._num_not_finite += int(finite.size - numpy.count_nonzero(finite))
            a, b, apart = a[finite], b[finite], apart[finite]
        if not apart.size:
            return
        self._max_abs = max(float(apart.max()), self._max_abs or 0.0)
        distances = _distances(a, b, self._dtype.bits)
        self._max_ulp = max(int(distances.max()), self._max_ulp or 0)
        for at, number in enumerate(_by_magnitude(distances)):
            self._ulps[at] += number

    def _conclusion(self) -> str:
        if self._num_different == 1 and sum(self._flipped) == 1:
            return f"one bit of it is flipped, {_bit_name(self._flipped, self._dtype)}"
        return next(iter(self._possible), "")


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return tuple(reversed(index))


def _count_bits(bits: Array, width: int) -> list[int]:
    """How many of these have each bit set, the least significant first.

    Counted by the values of each byte: sixteen times as fast as bit by bit.
    """
    import numpy

    columns = bits.astype(f"<u{width}", copy=False).view("u1").reshape(-1, width)
    counts = [numpy.bincount(columns[:, at], minlength=256) for at in range(width)]
    return [int(number) for one in counts for number in one @ _bit_table()]


@lru_cache(maxsize=1)
def _bit_table() -> Array:
    """[256, 8]: the bits of every byte."""
    import numpy

    table: Array = (numpy.arange(256)[:, None] >> numpy.arange(8)) & 1
    return table


def _values(bits: Array, dtype: DType) -> Array:
    """The exact values, as float64."""
    values: Array = widen(memoryview(bits.view("u1")), dtype.name).astype("<f8")  # type: ignore[arg-type]
    return values


def _distances(a: Array, b: Array, num_bits: int) -> Array:
    """How many steps of the dtype lie between. Floats are a sign and a magnitude."""
    import numpy

    if num_bits < _MAX_COUNTED_BITS:
        steps: Array = numpy.abs(_ordinals(a, num_bits) - _ordinals(b, num_bits))
        return steps
    # the places of 64-bit floats are as far apart as 65 bits count
    magnitude = numpy.uint64((1 << (num_bits - 1)) - 1)
    size_a, size_b = a & magnitude, b & magnitude
    same_sign = (a > magnitude) == (b > magnitude)
    apart = numpy.maximum(size_a, size_b) - numpy.minimum(size_a, size_b)
    return numpy.where(same_sign, apart, size_a + size_b)


def _ordinals(bits: Array, num_bits: int) -> Array:
    """The place of each float among all of its dtype, 0 in the middle."""
    import numpy

    wide = bits.astype("<i8")
    magnitude = wide & ((1 << (num_bits - 1)) - 1)
    return numpy.where(wide > magnitude, -magnitude, magnitude)


def _by_magnitude(distances: Array) -> list[int]:
    """How many need 0, 1, 2, ... binary digits."""
    import numpy

    if distances.dtype.kind == "i":  # below 2**53: exact as floats
        _, digits = numpy.frexp(distances.astype("<f8"))
    else:
        powers = numpy.left_shift(numpy.uint64(1), numpy.arange(64, dtype="<u8"))
        digits = numpy.searchsorted(powers, distances, side="right")
    return [int(number) for number in numpy.bincount(digits)]


def _buckets(counts: Sequence[int]) -> Iterator[Bucket]:
    """From the first that has something to the last, without gaps."""
    filled = [at for at, number in enumerate(counts) if number]
    for at in range(filled[0], filled[-1] + 1) if filled else ():
        yield (1 << at >> 1, max((1 << at) - 1, 0), counts[at])


Holds = Callable[[Any, Any], bool]


def _explanations(dtype: DType) -> Iterator[tuple[str, Holds]]:
    """(words, whether they are true of elements that differ); the more telling first."""
    num_bits = dtype.bits
    yield "wherever they differ, {theirs} is 0", lambda _, b: not b.any()
    if dtype.is_real_float:
        sign = 1 << (num_bits - 1)
        yield "wherever they differ, only the sign does", lambda a, b: bool(((a ^ b) == sign).all())
        yield from _rounded(dtype)
    if num_bits > 8:
        yield (
            "wherever they differ, the bytes of {theirs} are {ours}'s in the other order",
            lambda a, b: bool((a.byteswap() == b).all()),
        )


def _rounded(dtype: DType) -> Iterator[tuple[str, Holds]]:
    for name in _NARROWER:
        narrow = DTYPES[name]
        if narrow.bits > dtype.bits or narrow is dtype:
            continue
        holds = _is_rounded(dtype, narrow)
        yield f"wherever they differ, {{theirs}} is {{ours}} rounded through {name}", holds
        yield f"wherever they differ, {{ours}} is {{theirs}} rounded through {name}", _turned(holds)
    if dtype.name == "F32":
        yield (
            "wherever they differ, {theirs} is {ours} cut to BF16, not rounded",
            lambda a, b: bool(((a & 0xFFFF0000) == b).all()),
        )


def _turned(holds: Holds) -> Holds:
    return lambda a, b: holds(b, a)


def _is_rounded(dtype: DType, narrow: DType) -> Holds:
    def holds(a: Any, b: Any) -> bool:
        there = cast_block(memoryview(a.tobytes()), dtype, narrow, CastCounts())
        back = cast_block(there, narrow, dtype, CastCounts())
        return bool(back.tobytes() == b.tobytes())

    return holds


_EXPONENT_BITS = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8}


def _bit_name(flipped: Sequence[int], dtype: DType) -> str:
    """`bit 30 (exponent)`."""
    bit = next(at for at, number in enumerate(flipped) if number)
    exponent = _EXPONENT_BITS.get(dtype.name)
    if exponent is None:
        return f"bit {bit}"
    mantissa = dtype.bits - 1 - exponent
    part = "sign" if bit == dtype.bits - 1 else "mantissa" if bit < mantissa else "exponent"
    return f"bit {bit} ({part})"


def facts_of(found: Difference, ours: str, theirs: str) -> dict[str, Any]:
    """What the data of a finding says about a difference beside its first element.

    Args:
        found: the difference.
        ours: what to call an element of the first, such as `the expected value`.
        theirs: what to call one of the second.
    """
    facts: dict[str, Any] = {
        "dtype": found.dtype,
        "num_elements_different": found.num_different,
    }
    if found.bits_flipped:
        facts["bits_flipped"] = list(found.bits_flipped)
    if found.max_ulp is not None:
        facts |= {"max_abs": found.max_abs, "max_ulp": found.max_ulp}
        facts["ulp_histogram"] = [list(bucket) for bucket in found.ulp_histogram]
    if found.num_not_finite:
        facts["num_not_finite"] = found.num_not_finite
    if found.conclusion:
        facts["conclusion"] = found.conclusion.format(ours=ours, theirs=theirs)
    return facts


def describe(found: Difference, ours: str, theirs: str) -> str:
    """How far the two are apart, and what is true of all that differs: ends a sentence.

    Args:
        found: the difference.
        ours: as of `facts_of`.
        theirs: as of `facts_of`.
    """
    told = ""
    if found.max_ulp is not None:
        told = f"; at most {found.max_ulp} ulp apart (max_abs {found.max_abs:.2g})"
    if found.num_not_finite:
        told += f"; {found.num_not_finite} NaN or infinite on a side"
    if found.conclusion:
        told += "; " + found.conclusion.format(ours=ours, theirs=theirs)
    return told
