"""The stages of a parity report, one by one or folded, for all of its renderings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.fold import fold
from flamingo_ckpt.tensors import escape

#: Reports with more stages are folded where people read them.
MAX_STAGES = 40
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One stage in one pass; of several stages, the worst of each number.

    Attributes:
        used: the relative difference over the tolerance; None where nobody judges.
        agrees: None where the pass does not decide.
        only_in: `a`, `b`, or "".
    """

    max_abs: float
    relative: float
    cosine: float
    noise: float | None
    tolerance: float | None
    used: float | None
    agrees: bool | None
    only_in: str
    num_bad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A stage, or several that are told as one.

    Attributes:
        pattern: the name, or `vision.layers.{0-23}`; printable.
        count: how many stages it stands for.
        cells: one for each pass; None where the pass has no such stage.
        first_in: indices of the passes whose first divergence it is.
    """

    pattern: str
    count: int
    cells: tuple[Cell | None, ...]
    first_in: tuple[int, ...]


def passes_of(report: Report) -> list[Mapping[str, Any]]:
    """The passes; none where the check ended before the first."""
    return list(report.summary.get("passes") or ())


def stage_rows(report: Report, *, folded: bool = False) -> list[Row]:
    """The stages in the order in which they are computed.

    Folded, neighbours of one part that fared alike share a row; a first divergence never does.
    """
    first = [one["first_divergence"] for one in passes_of(report)]
    rows = [_row(one, first) for one in report.summary.get("layers") or ()]
    if not folded:
        return [replace(row, pattern=escape(row.pattern)) for row in rows]
    return [
        merged for _, run in groupby(enumerate(rows), key=_fate) for merged in _merged(dict(run))
    ]


def _row(layer: Mapping[str, Any], first: Sequence[str | None]) -> Row:
    return Row(
        pattern=layer["stage"],
        count=1,
        cells=tuple(None if one is None else _cell(one) for one in layer["passes"]),
        first_in=tuple(at for at, name in enumerate(first) if name == layer["stage"]),
    )


def _cell(one: Mapping[str, Any]) -> Cell:
    relative, tolerance = float(one["rel"]), one.get("tolerance")
    return Cell(
        max_abs=float(one["max_abs"]),
        relative=relative,
        cosine=float(one["cosine"]),
        noise=None if one.get("noise") is None else float(one["noise"]),
        tolerance=None if tolerance is None else float(tolerance),
        used=None if tolerance is None else _ratio(relative, float(tolerance)),
        agrees=one.get("agrees"),
        only_in=one.get("only_in") or "",
        num_bad=one.get("num_bad") or 0,
    )


def _ratio(relative: float, tolerance: float) -> float:
    if relative == 0:
        return 0.0
    return math.inf if tolerance == 0 else relative / tolerance


def _fate(numbered: tuple[int, Row]) -> tuple[object, ...]:
    """What stages of one run share; a first divergence shares nothing."""
    index, row = numbered
    cells = tuple(cell and (cell.agrees, cell.only_in, cell.num_bad > 0) for cell in row.cells)
    return (cells, index if row.first_in else None)


def _merged(run: Mapping[int, Row]) -> Iterator[Row]:
    """Stages of a run whose names differ only in numbers are one row."""
    rows = {row.pattern: row for row in run.values()}
    for found in fold((name, _NUMBER.sub("0", name)) for name in rows):
        members = [rows[name] for name in found.keys()]  # noqa: SIM118
        yield Row(
            pattern=escape(found.pattern()),
            count=len(members),
            cells=tuple(map(_worst, zip(*(row.cells for row in members), strict=True))),
            first_in=members[0].first_in,
        )


def _worst(cells: Sequence[Cell | None]) -> Cell | None:
    """Of cells with one fate: None with None, only in A with only in A."""
    known = [cell for cell in cells if cell is not None]
    if len(known) < 2:
        return known[0] if known else None
    return replace(
        known[0],
        max_abs=largest([cell.max_abs for cell in known]),
        relative=largest([cell.relative for cell in known]),
        cosine=-largest([-cell.cosine for cell in known]),
        noise=largest([cell.noise for cell in known]),
        tolerance=largest([cell.tolerance for cell in known]),
        used=largest([cell.used for cell in known]),
        num_bad=sum(cell.num_bad for cell in known),
    )


def largest(values: Sequence[Any]) -> Any:
    """The largest number; NaN is worse than any, and None is none.

    >>> largest([0.5, float("nan"), None])
    nan
    """
    known = [value for value in values if value is not None]
    return max(known, key=lambda value: (value != value, value), default=None)
