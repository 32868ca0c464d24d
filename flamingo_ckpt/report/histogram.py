"""How two tensors differ, as bars: geometry only, in the units of one SVG user space.

One drawing of the distances, by powers of two of units in the last place, and one of the bits, the
most significant first, as a number is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.report.words import count

HEIGHT, BASE, _TOP = 132.0, 104.0, 22.0
_LEFT, _MAX_STEP, _MIN_STEP, _MAX_WIDTH = 6.0, 46.0, 7.0, 520.0
_GLYPH = 7.6
#: What an element can be cut into: (exponent bits, mantissa bits) of each dtype.
_PARTS: Mapping[str, tuple[int, int]] = {
    "F64": (11, 52),
    "F32": (8, 23),
    "BF16": (8, 7),
    "F16": (5, 10),
    "F8_E4M3": (4, 3),
    "F8_E5M2": (5, 2),
    "F8_E4M3FNUZ": (4, 3),
    "F8_E5M2FNUZ": (5, 2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar: where it stands, what is written below and above it, and its colour's number."""

    x: float
    y: float
    width: float
    height: float
    label: str
    number: str
    told: str
    part: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """One drawing.

    Attributes:
        title: what is counted.
        description: the same in words, for those who do not see it.
        parts: names of the parts that colours stand for; none where there is one colour.
    """

    title: str
    description: str
    bars: tuple[Bar, ...]
    width: float
    parts: tuple[tuple[int, str], ...] = ()
    height: float = HEIGHT
    base: float = BASE


def histograms(data: Mapping[str, Any]) -> list[Histogram]:
    """The drawings of a finding's data; none where it counts nothing."""
    found = []
    if data.get("ulp_histogram"):
        found.append(_distances(data["ulp_histogram"]))
    if any(data.get("bits_flipped") or ()):
        found.append(_bits(data["bits_flipped"], str(data.get("dtype") or "")))
    return found


def _distances(buckets: Sequence[Sequence[int]]) -> Histogram:
    names = [_range(low, high) for low, high, _ in buckets]
    numbers = [number for *_, number in buckets]
    told = [
        f"{name} ulp: {count(number, 'element')}"
        for name, number in zip(names, numbers, strict=True)
    ]
    labels = [_power(low) for low, *_ in buckets]
    return Histogram(
        title="Distance in units in the last place (ulp)",
        description="; ".join(told),
        bars=_bars(numbers, labels, told, [0] * len(numbers)),
        width=_width(len(numbers)),
    )


def _bits(flipped: Sequence[int], dtype: str) -> Histogram:
    places = list(range(len(flipped)))[::-1]
    parts = [_part(place, len(flipped), dtype) for place in places]
    numbers = [flipped[place] for place in places]
    named = {0: "mantissa", 1: "exponent", 3: "sign"}
    told = [
        f"bit {place}{f' ({named[part]})' if dtype in _PARTS else ''}: {count(number, 'element')}"
        for place, part, number in zip(places, parts, numbers, strict=True)
    ]
    shown = tuple((part, named[part]) for part in (3, 1, 0)) if dtype in _PARTS else ()
    return Histogram(
        title="Bits that differ, the most significant first",
        description="; ".join(text for text, number in zip(told, numbers, strict=True) if number),
        bars=_bars(numbers, [str(place) for place in places], told, parts),
        width=_width(len(flipped)),
        parts=shown,
    )


def _part(place: int, num_bits: int, dtype: str) -> int:
    """The number of the colour of a bit."""
    exponent, mantissa = _PARTS.get(dtype, (0, num_bits))
    if place < mantissa:
        return 0
    return 1 if place < mantissa + exponent else 3


def _width(number: int) -> float:
    return 2 * _LEFT + _step(number) * number


def _step(number: int) -> float:
    return max(_MIN_STEP, min(_MAX_STEP, _MAX_WIDTH / number))


def _bars(
    numbers: Sequence[int], labels: Sequence[str], told: Sequence[str], parts: Sequence[int]
) -> tuple[Bar, ...]:
    """As high as the share of the highest; what is not 0 can be seen."""
    step, most = _step(len(numbers)), max(numbers, default=0)
    shown = [_short(number) if number else "" for number in numbers]
    every = _every(labels, step)
    crowded = any(len(text) * _GLYPH > step for text in shown)
    bars = []
    for at, number in enumerate(numbers):
        height = max(number / most * (BASE - _TOP), 2.0) if number else 0.0
        # where numbers would run into each other, the highest alone has its own
        has_number = not crowded or (number == most and shown.index(shown[at]) == at)
        bars.append(
            Bar(
                x=_LEFT + at * step + step * 0.1,
                y=BASE - height,
                width=step * 0.8,
                height=height,
                label=labels[at] if at % every == 0 else "",
                number=shown[at] if has_number else "",
                told=told[at],
                part=parts[at],
            )
        )
    return tuple(bars)


def _every(labels: Sequence[str], step: float) -> int:
    """Every how many bars there is room for a label."""
    widest = max(map(len, labels), default=1) * _GLYPH + 3
    return next(every for every in (1, 2, 4, 8, 16, 32) if every * step >= widest or every == 32)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _power(low: int) -> str:
    """`0`, `1`, `2`, ... `512`, then `2^10`: the lower end of a bucket."""
    return str(low) if low < 1000 else f"2^{low.bit_length() - 1}"


def _short(number: int) -> str:
    """`999`, `1.2k`, `40M`."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < 6:
        value, unit = value / 1000, unit + 1
    return str(number) if unit == 0 else f"{value:.3g}{'kMGTPE'[unit - 1]}"
