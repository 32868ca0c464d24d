"""The error of every stage as a drawing: geometry only, in the units of one SVG user space.

x: stages in the order in which they are computed. y: log10 of the relative error, with a row of its
own for exact 0 below and one for what is no number above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flamingo_ckpt.report import parity_stages as stages
from flamingo_ckpt.report import parity_words as words
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.parity_stages import Cell, Row
from flamingo_ckpt.tensors import escape

WIDTH = 1040.0
_LEFT, _RIGHT = 86.0, WIDTH - 14.0
_LINE = 19.0  # of text
_ROW = 36.0  # for exact 0, and for what is no number
_SCALE = 250.0  # the decades
_GLYPH = 7.4  # the mean advance of a letter at the size of the style sheet
_MAX_NAME = 44
_MAX_TICKS = 9
_LABEL_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Text at a place; `anchor` is SVG's `text-anchor`, `lead` where a line to it begins."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    lead: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Neighbouring stages of one part, or of parts that take turns."""

    start: int
    stop: int
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        """`language, xattn`."""
        return _clipped(", ".join(self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One pass: its marks, the line through them, and its own tolerance and noise.

    Attributes:
        number: of its colour and its shape.
        legend: one mark, for the legend.
    """

    number: int
    name: str
    legend: str
    marks: tuple[str, ...]
    line: str
    tolerance: str
    noise: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One dtype's drawing.

    Attributes:
        shared_tolerance, shared_noise: whether all passes have the same, drawn once.
        zero, no_number: y of the rows outside the scale; None where nothing is there.
        hovers: (x, what each pass says) of every stage.
    """

    dtype: str
    decides: bool
    height: float
    top: float
    bottom: float
    step: float
    description: str
    series: tuple[Series, ...]
    shared_tolerance: bool
    shared_noise: bool
    ticks: tuple[Label, ...]
    zero: float | None
    no_number: float | None
    bands: tuple[tuple[float, float], ...]
    labels: tuple[Label, ...]
    divergences: tuple[Label, ...]
    hovers: tuple[tuple[float, tuple[str, ...]], ...]
    left: float = _LEFT
    right: float = _RIGHT
    width: float = WIDTH


def plots(report: Report) -> list[Plot]:
    """One for each dtype with stages to draw, in the order of the passes."""
    rows = stages.stage_rows(report)
    numbered = enumerate(stages.passes_of(report))
    groups = [list(group) for _, group in groupby(numbered, key=lambda one: one[1]["dtype"])]
    return [_plot(report, group, rows) for group in groups if rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """Where a value is drawn."""

    low: int
    high: int
    top: float
    bottom: float
    zero: float
    no_number: float

    def y(self, value: float) -> float:
        if value == 0:
            return self.zero
        if not math.isfinite(value) or value < 0:
            return self.no_number
        return self._at(math.log10(value))

    def _at(self, exponent: float) -> float:
        part = (exponent - self.low) / (self.high - self.low)
        return self.bottom - min(max(part, 0.0), 1.0) * (self.bottom - self.top)

    def ticks(self) -> Iterator[Label]:
        step = math.ceil((self.high - self.low) / _MAX_TICKS)
        for exponent in range(self.low, self.high + 1, step):
            text = "1" if exponent == 0 else f"1e{exponent}"
            yield Label(x=_LEFT - 10, y=self._at(exponent), text=text, anchor="end")


def _plot(
    report: Report, group: Sequence[tuple[int, Mapping[str, Any]]], rows: Sequence[Row]
) -> Plot:
    columns = [[row.cells[at] for row in rows] for at, _ in group]
    cells = [cell for column in columns for cell in column if cell is not None]
    step = (_RIGHT - _LEFT) / len(rows)
    has_zero = any(cell.relative == 0 and not cell.only_in for cell in cells)
    has_no_number = any(cell.only_in or not math.isfinite(cell.relative) for cell in cells)
    places = _places(report, group, rows)
    top = 10 + _LINE * len(places) + _ROW * has_no_number
    axis = _axis(cells, top, has_zero)
    bottom = axis.bottom + _ROW * has_zero
    bands = list(_bands([row.pattern for row in rows], step))
    labels = list(_band_labels(bands, step, bottom))
    return Plot(
        dtype=escape(group[0][1]["dtype"]),
        decides=bool(group[0][1]["decides"]),
        height=max((label.y for label in labels), default=bottom) + 14 + _LINE,
        top=top - _ROW * has_no_number,
        bottom=bottom,
        step=step,
        description=_description(report, group, rows),
        series=tuple(
            _series(report, number, one, column, axis, step)
            for number, ((_, one), column) in enumerate(zip(group, columns, strict=True))
        ),
        shared_tolerance=_same(columns, lambda cell: cell.tolerance),
        shared_noise=_same(columns, lambda cell: cell.noise),
        ticks=tuple(axis.ticks()),
        zero=axis.zero if has_zero else None,
        no_number=axis.no_number if has_no_number else None,
        bands=tuple(
            (_LEFT + band.start * step, (band.stop - band.start) * step) for band in bands[1::2]
        ),
        labels=tuple(labels),
        divergences=tuple(_divergence_labels(places, step)),
        hovers=tuple(
            (_LEFT + at * step, tuple(_hover(report, row, group))) for at, row in enumerate(rows)
        ),
    )


def _axis(cells: Sequence[Cell], top: float, has_zero: bool) -> _Axis:
    values = [
        value
        for cell in cells
        for value in (cell.relative, cell.tolerance, cell.noise)
        if value is not None and 0 < value < math.inf
    ]
    low = math.floor(math.log10(min(values, default=1e-8)))
    high = math.ceil(math.log10(max(values, default=1.0)))
    bottom = top + _SCALE
    return _Axis(
        low=low,
        high=max(high, low + 2),
        top=top,
        bottom=bottom,
        # a value that is no number and has no row is drawn at the edge
        zero=bottom + _ROW * 0.7 if has_zero else bottom,
        no_number=top - _ROW * 0.7,
    )


def _same(columns: Sequence[Sequence[Cell | None]], of: Callable[[Cell], float | None]) -> bool:
    first, *others = ([None if cell is None else of(cell) for cell in column] for column in columns)
    return all(other == first for other in others)


def _series(
    report: Report,
    number: int,
    one: Mapping[str, Any],
    column: Sequence[Cell | None],
    axis: _Axis,
    step: float,
) -> Series:
    shape = _SHAPES[number % len(_SHAPES)]
    points = [
        (_LEFT + (at + 0.5) * step, axis.no_number if cell.only_in else axis.y(cell.relative), cell)
        for at, cell in enumerate(column)
        if cell is not None
    ]
    return Series(
        number=number % len(_SHAPES),
        name=words.gates(report, one["gates"]),
        legend=shape(9, 9),
        marks=tuple(shape(x, y) for x, y, _ in points),
        line=_line([(x, y, _is_on_scale(cell)) for x, y, cell in points]),
        tolerance=_steps([None if c is None else c.tolerance for c in column], axis, step),
        noise=_steps([None if c is None else c.noise for c in column], axis, step),
    )


def _is_on_scale(cell: Cell) -> bool:
    return not cell.only_in and 0 < cell.relative < math.inf


def _line(points: Sequence[tuple[float, float, bool]]) -> str:
    """Through neighbours that are both on the scale."""
    parts, is_open = [], False
    for x, y, on_scale in points:
        if on_scale:
            parts.append(f"{'L' if is_open else 'M'}{x:.1f} {y:.1f}")
        is_open = on_scale
    return "".join(parts)


def _steps(values: Sequence[float | None], axis: _Axis, step: float) -> str:
    """One level a stage; nothing where there is no value."""
    parts, is_open = [], False
    for at, value in enumerate(values):
        drawn = value is not None and 0 < value < math.inf
        if drawn:
            x, y = _LEFT + at * step, axis.y(value or 0.0)
            parts.append(f"{'L' if is_open else 'M'}{x:.1f} {y:.1f}H{x + step:.1f}")
        is_open = drawn
    return "".join(parts)


def _disc(x: float, y: float) -> str:
    return f"M{x - 3.2:.1f} {y:.1f}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z"


def _diamond(x: float, y: float) -> str:
    return f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"


def _square(x: float, y: float) -> str:
    return f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z"


def _triangle(x: float, y: float) -> str:
    return f"M{x:.1f} {y - 6:.1f}l6 10h-12z"


#: By number of the pass: a small filled disc can lie within a hollow diamond and both be seen.
_SHAPES = (_disc, _diamond, _square, _triangle)


def _bands(names: Sequence[str], step: float) -> Iterator[Band]:
    """Runs of one part; parts that take turns in runs too narrow for their names are one band."""
    bands: list[Band] = []
    start = 0
    for part, run in groupby(name.partition(".")[0] for name in names):
        new = Band(start=start, stop=start + len(list(run)), parts=(part,))
        start = new.stop
        if bands and part in bands[-1].parts:
            new = _joined([bands.pop(), new])
        elif len(bands) > 1 and part in bands[-2].parts:
            turns = [*bands[-2:], new]
            if any(_is_narrow(band, step) for band in turns):
                del bands[-2:]
                new = _joined(turns)
        bands.append(new)
    yield from bands


def _joined(bands: Sequence[Band]) -> Band:
    parts = dict.fromkeys(part for band in bands for part in band.parts)
    return Band(start=bands[0].start, stop=bands[-1].stop, parts=tuple(parts))


def _is_narrow(band: Band, step: float) -> bool:
    return (band.stop - band.start) * step < len(band.text) * _GLYPH + 8


def _band_labels(bands: Sequence[Band], step: float, bottom: float) -> Iterator[Label]:
    """Names below the bands, each in the first row where it touches no other; else left out."""
    ends = [0.0] * _LABEL_ROWS
    for band in bands:
        middle = _LEFT + (band.start + band.stop) / 2 * step
        half = len(band.text) * _GLYPH / 2
        x = min(max(middle, _LEFT + half), _RIGHT - half)
        row = next((row for row, end in enumerate(ends) if end + 10 <= x - half), None)
        if row is None:
            continue
        ends[row] = x + half
        y = bottom + 18 + row * _LINE
        yield Label(x=x, y=y, text=band.text, lead=middle)


def _places(
    report: Report, group: Sequence[tuple[int, Mapping[str, Any]]], rows: Sequence[Row]
) -> list[tuple[int, str]]:
    """(index of the stage, text) of every first divergence of the group."""
    found: list[tuple[int, str]] = []
    for at, row in enumerate(rows):
        here = [one for index, one in group if index in row.first_in]
        if here:
            alone = len(here) < len(group)
            names = " and ".join(words.gates(report, one["gates"]) for one in here)
            found.append(
                (
                    at,
                    f"first divergence: {_clipped(row.pattern)}" + (f" ({names})" if alone else ""),
                )
            )
    return found


def _divergence_labels(places: Sequence[tuple[int, str]], step: float) -> Iterator[Label]:
    """One above the other, beside their lines."""
    last = len(places) - 1
    for row, (at, text) in enumerate(places):
        lead = _LEFT + (at + 0.5) * step
        width = len(text) * _GLYPH
        # lines of later places begin higher: text that ends at its own line is crossed by none
        y = _LINE * (last - row + 1) - 4
        fits_left, fits_right = lead - 6 > width, lead + 6 + width < _RIGHT
        if fits_left and not (row == last and fits_right):
            yield Label(x=lead - 6, y=y, text=text, anchor="end", lead=lead)
        else:
            x = max(min(lead + 6, _RIGHT - width), 0.0)
            yield Label(x=x, y=y, text=text, anchor="start", lead=lead)


def _hover(
    report: Report, row: Row, group: Sequence[tuple[int, Mapping[str, Any]]]
) -> Iterator[str]:
    yield row.pattern
    for at, one in group:
        cell = row.cells[at]
        if cell is not None:
            yield f"{words.gates(report, one['gates'])}: {_cell_text(cell)}"


def _cell_text(cell: Cell) -> str:
    if cell.only_in:
        return f"only in {cell.only_in.upper()}"
    told = f"relative {words.short(cell.relative)}, max_abs {words.short(cell.max_abs)}"
    if cell.tolerance is not None:
        told += f", tolerance {words.short(cell.tolerance)}"
    return told + {None: "", True: ", agrees", False: ", diverges"}[cell.agrees]


def _description(
    report: Report, group: Sequence[tuple[int, Mapping[str, Any]]], rows: Sequence[Row]
) -> str:
    """What the drawing shows, for those who do not see it."""
    told = [f"Relative error of {len(rows)} stages in the order in which they are computed."]
    for at, one in group:
        known = [cell for row in rows if (cell := row.cells[at]) is not None and not cell.only_in]
        worst = words.short(stages.largest([cell.relative for cell in known]))
        exact = sum(cell.relative == 0 for cell in known)
        told.append(
            f"{words.gates(report, one['gates'])}: {words.outcome(one)}, largest {worst}, "
            f"exactly 0 at {exact}."
        )
    return " ".join([*told, "The table of stages below has the same numbers."])


def _clipped(text: str) -> str:
    return text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 3] + "..."
