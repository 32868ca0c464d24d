"""A parity report as one HTML page: no network, no script, complete on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flamingo_ckpt.report import parity_stages as stages
from flamingo_ckpt.report import parity_words as words
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.page import render_page, ticks
from flamingo_ckpt.report.parity_plot import plots
from flamingo_ckpt.report.parity_stages import Row
from flamingo_ckpt.report.text import format_bytes

_FIELDS = ("uri", "format", "layout", "wrapper", "prefix", "num_tensors", "num_bytes")
_COLUMNS = ("", "path", "format", "layout", "wrapper", "prefix", "tensors", "size")


def to_html(report: Report) -> str:
    """The page; the JSON document is embedded in it, in `script#report`.

    Args:
        report: of the verb `parity`; may have ended before anything ran.
    """
    return render_page(report, "parity.html.jinja", _context(report))


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeGroup:
    """The passes of one dtype: (index, gates)."""

    report: Report
    dtype: str
    decides: bool
    passes: tuple[tuple[int, str], ...]

    def notes(self, row: Row) -> list[str]:
        """What no number says: the first divergence first."""
        among = [at for at, _ in self.passes]
        diverges = any(cell.agrees is False for at in among if (cell := row.cells[at]))
        first = words.marker(self.report, row, among)
        told = (first or ("diverges" if diverges else ""), words.bad_values(row, among))
        return [text for text in told if text]

    def is_first(self, row: Row) -> bool:
        """Whether one of its passes diverges first here."""
        return any(at in row.first_in for at, _ in self.passes)


def dtype_groups(report: Report) -> Iterator[DtypeGroup]:
    """The passes of each dtype together."""
    numbered = enumerate(stages.passes_of(report))
    for dtype, entries in groupby(numbered, key=lambda entry: str(entry[1]["dtype"])):
        group = list(entries)
        yield DtypeGroup(
            report=report,
            dtype=dtype,
            decides=any(one["decides"] for _, one in group),
            passes=tuple((at, words.gates(report, one["gates"])) for at, one in group),
        )


def _context(report: Report) -> dict[str, Any]:
    parameters = report.extra.get("parameters") or {}
    data = {"sha256": None, "tensors": (), **(report.extra.get("data") or {})}
    rows = stages.stage_rows(report)
    hashed = any(one.get("sha256") for one in report.inputs)
    return {
        "word": words.verdict_word(report),
        "sentence": words.sentence(report),
        "inputs": [_input(side, one, hashed) for side, one in zip("AB", report.inputs)],  # noqa: B905
        "input_columns": (*_COLUMNS, "sha256") if hashed else _COLUMNS,
        "lines": words.fact_lines(report),
        "data": data,
        "given": [
            (one["name"], one["dtype"], "x".join(map(str, one["shape"]))) for one in data["tensors"]
        ],
        "passes": stages.passes_of(report),
        "greedy": report.extra.get("greedy"),
        "parameters": parameters,
        "blame": report.extra.get("blame") or (),
        "plots": plots(report),
        "rows": rows,
        "tables": list(dtype_groups(report)) if rows else [],
        "modules": [(one["stage"], *one["module"]) for one in report.summary.get("layers") or ()],
        "reported": words.REPORTED,
        "tensors": _tensors,
        "different": _different(parameters),
        "cast": parameters.get("cast") or (),
        "environment": _facts(report),
    }


def _input(side: str, one: Mapping[str, Any], hashed: bool) -> Sequence[Any]:
    *fields, num_bytes = (one.get(name) for name in _FIELDS)
    size = format_bytes(num_bytes) if isinstance(num_bytes, int) else None
    return (side, *fields, size, *([one.get("sha256")] if hashed else []))


def _tensors(blame: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [
        tuple(one.get(name) or "-" for name in ("canonical", "a", "b")) for one in blame["tensors"]
    ]


def _different(parameters: Mapping[str, Any]) -> list[tuple[str, Any]]:
    told = [(one["canonical"], ticks(one["what"])) for one in parameters.get("different") or ()]
    for side in "ab":
        told += [(name, f"only in {side.upper()}") for name in parameters.get(f"only_{side}") or ()]
    return told


def _facts(report: Report) -> list[tuple[str, str]]:
    environment = report.extra.get("environment") or {}
    facts = [
        (name.replace("_", " "), json.dumps(value) if isinstance(value, list) else str(value))
        for name, value in environment.items()
        if value not in (None, [], "")
    ]
    facts += [
        (f"{name}, seconds", words.short(value))
        for name, value in (report.extra.get("seconds") or {}).items()
    ]
    return [*facts, ("in all, seconds", words.short(report.duration_seconds))]
