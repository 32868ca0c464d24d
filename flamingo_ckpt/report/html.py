"""Any verb's report as one HTML page: no network, complete without its script and on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.codes import TABLE, Code
from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report import parity_words
from flamingo_ckpt.report.document import SCHEMA_VERSION, Report
from flamingo_ckpt.report.fold import fold
from flamingo_ckpt.report.histogram import Histogram, histograms
from flamingo_ckpt.report.page import render_page, ticks
from flamingo_ckpt.report.parity_plot import plots
from flamingo_ckpt.report.text import format_bytes
from flamingo_ckpt.report.words import Group, groups, sentence, verdict_word
from flamingo_ckpt.tensors import format_shape

#: Above this many findings of one code they are folded, and differences are no longer drawn.
MAX_OPEN, MAX_DRAWN = 10, 40
_MAX_SHOWN_DRAWINGS = 4
_STATUS = {
    "pass": ("\N{CHECK MARK}", "passed"),
    "warn": ("!", "warned"),
    "fail": ("\N{BALLOT X}", "failed"),
    "skip": ("\N{EN DASH}", "not run"),
}
_SYMBOLS = {"error": "\N{BALLOT X}", "warning": "!", "info": "i"}
#: Counts of the summary that are bad news where they are not 0.
_BAD = frozenset({"different", "missing", "unexpected", "changed", "renamed", "errors"})
_OPEN = frozenset({"warnings", "skipped"})
#: Further fields that have a section of their own, or say what the page says elsewhere.
_KNOWN = frozenset({"checks", "waived", "fixes", "tensors", "parity", "bits", "files", "where"})
_INPUTS = ("uri", "format", "layout", "wrapper", "prefix", "num_tensors", "num_bytes")
_INPUT_NAMES = ("path", "format", "layout", "wrapper", "prefix", "tensors", "size")


def to_html(report: Report) -> str:
    """The page; the JSON document is embedded in it, in `script#report`."""
    if report.command == "parity":
        from flamingo_ckpt.report.parity_html import to_html as parity_page

        return parity_page(report)
    parity = _parity_of(report)
    return render_page(
        report, "report.html.jinja", _context(report, parity), parity=parity, script="page.js"
    )


def _parity_of(report: Report) -> Report | None:
    """The parity report that a check has within it."""
    found = report.extra.get("parity") if report.command == "check" else None
    if not found:
        return None
    extra = {name: value for name, value in found.items() if name != "summary"}
    return Report(
        command="parity",
        argv=report.argv,
        verdict=report.verdict,
        exit_code=report.exit_code,
        summary=found["summary"],
        extra=extra,
    )


def _context(report: Report, parity: Report | None) -> dict[str, Any]:
    grouped = groups(report.findings)
    columns, inputs = _inputs(report)
    files = list(_files(report))
    hashed = any(one[2] for one in files)
    return {
        "word": verdict_word(report),
        "sentence": sentence(report),
        "inputs": inputs,
        "input_columns": columns,
        "tiles": list(_tiles(report.summary)),
        "checks": [_check(report, one) for one in report.extra.get("checks") or ()],
        "groups": [_told(group) for group in grouped],
        "pages": [
            TABLE[code] for code in dict.fromkeys(one.code for one in grouped) if code in TABLE
        ],
        "waived": [_waived(one) for one in report.extra.get("waived") or ()],
        "fixes": [
            (one["path"], one["what"], "done" if one["applied"] else "not applied: --fix does it")
            for one in report.extra.get("fixes") or ()
        ],
        "parity": parity,
        "reported": parity_words.REPORTED,
        **_parity_parts(parity),
        "tensors": list(_tensors(report.extra.get("tensors") or ())),
        "num_tensors": len(report.extra.get("tensors") or ()),
        "files": [one[: 3 if hashed else 2] for one in files],
        "file_columns": ("path", "size", "sha256")[: 3 if hashed else 2],
        "sections": list(_sections(report)),
        "environment": _environment(report),
    }


def _inputs(report: Report) -> tuple[tuple[str, ...], list[list[Any]]]:
    """(columns, rows), without the columns that say nothing."""
    rows = []
    for one in report.inputs:
        told = dict(zip(_INPUT_NAMES, (one.get(name) for name in _INPUTS), strict=True))
        told["size"] = _size(told["size"])
        told |= {"sha256": one.get("sha256"), "revision": (one.get("remote") or {}).get("revision")}
        rows.append(told)
    columns = tuple(dict.fromkeys(name for row in rows for name, value in row.items() if value))
    ordered = [name for name in (*_INPUT_NAMES, "sha256", "revision") if name in columns]
    return tuple(ordered), [[row[name] for name in ordered] for row in rows]


def _size(num_bytes: Any) -> str | None:
    return format_bytes(num_bytes) if isinstance(num_bytes, int) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One count of the summary; `parts` where it is several."""

    name: str
    value: str
    tone: str
    parts: tuple[tuple[str, str], ...] = ()


def _tiles(summary: Mapping[str, Any]) -> Iterator[Tile]:
    for name, value in summary.items():
        words = name.removeprefix("num_").replace("_", " ")
        if isinstance(value, Mapping):
            if name != "checks" and value:
                parts = tuple((str(key), _scalar(item)) for key, item in value.items())
                yield Tile(name=words, value="", tone="", parts=parts)
        elif not isinstance(value, list | tuple):
            is_size = name == "num_bytes" and isinstance(value, int)
            tone = "failed" if name in _BAD else "incomplete" if name in _OPEN else ""
            yield Tile(
                name="size" if is_size else words,
                value=format_bytes(value) if is_size else _scalar(value),
                tone=tone if value else "",
            )


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One check: how it ended, in a symbol and in words."""

    name: str
    status: str
    symbol: str
    word: str
    sentence: str
    codes: tuple[str, ...]
    num_waived: int


def _check(report: Report, one: Mapping[str, Any]) -> CheckRow:
    symbol, word = _STATUS[one["status"]]
    is_unmet = one["status"] == "skip" and one["required"]
    codes = [item.code for item in report.findings if item.data.get("check") == one["name"]]
    return CheckRow(
        name=one["name"],
        status="unmet" if is_unmet else one["status"],
        symbol=symbol,
        word=f"{word}, and required" if is_unmet else word,
        sentence=one["sentence"],
        codes=tuple(dict.fromkeys(codes)),
        num_waived=one["num_waived"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One finding: its key where the detail does not say it, its file, and how bits differ."""

    key: str | None
    detail: str
    hint: str | None
    place: str | None
    drawings: tuple[Histogram, ...]
    shows_drawings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """The findings of one code; `hint` where all of them have the same."""

    group: Group
    symbol: str
    page: Code | None
    hint: str | None
    items: tuple[Item, ...]
    is_open: bool


def _told(group: Group) -> GroupRow:
    hints = {one.hint for one in group.findings}
    shared = hints.pop() if len(hints) == 1 else None
    return GroupRow(
        group=group,
        symbol=_SYMBOLS[group.severity],
        page=TABLE.get(group.code),
        hint=shared,
        items=tuple(_item(one, shared, at) for at, one in enumerate(group.findings)),
        is_open=len(group.findings) <= MAX_OPEN,
    )


def _item(one: Finding, shared: str | None, at: int) -> Item:
    file, line = one.data.get("file"), one.data.get("line")
    place = f"{file}:{line}" if line else file
    is_told = not line and str(file) in one.detail
    return Item(
        key=one.key if one.key and one.key != file and one.key not in one.detail else None,
        detail=one.detail,
        hint=None if one.hint == shared else one.hint,
        place=place if isinstance(file, str) and not is_told else None,
        drawings=tuple(histograms(one.data)) if at < MAX_DRAWN else (),
        shows_drawings=at < _MAX_SHOWN_DRAWINGS,
    )


def _waived(one: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("code", "key", "check", "reason", "owner", "until")
    code, key, *rest = (one[name] for name in names)
    return (code, key, ticks(one["detail"]), *rest)


def _parity_parts(parity: Report | None) -> dict[str, Any]:
    if parity is None:
        return {"plots": [], "rows": [], "tables": [], "passes": [], "parity_sentence": ""}
    from flamingo_ckpt.report import parity_stages as stages
    from flamingo_ckpt.report.parity_html import dtype_groups

    rows = stages.stage_rows(parity)
    return {
        "plots": plots(parity),
        "rows": rows,
        "tables": list(dtype_groups(parity)) if rows else [],
        "passes": stages.passes_of(parity),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """Tensors with the same facts: a pattern, and the names that it stands for."""

    pattern: str
    keys: tuple[str, ...]
    dtype: str
    shape: str
    size: str


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> Iterator[TensorRow]:
    entries = [
        (one["name"], (one["dtype"], tuple(one["shape"]), one["num_bytes"])) for one in tensors
    ]
    for row in fold(entries):
        facts: Any = row.facts
        dtype, shape, num_bytes = facts
        yield TensorRow(
            pattern=row.pattern(),
            keys=tuple(row.keys()),
            dtype=dtype,
            shape=format_shape(shape),
            size=format_bytes(num_bytes * row.count),
        )


def _files(report: Report) -> Iterator[tuple[str, str, str]]:
    for one in (*(report.extra.get("files") or ()), *(report.summary.get("files") or ())):
        yield one["path"], format_bytes(one["num_bytes"]), one.get("sha256") or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A further field as it lies: `facts`, a `table`, a `list`, or `text`."""

    title: str
    kind: str
    rows: tuple[Any, ...] = ()
    columns: tuple[str, ...] = ()


def _sections(report: Report) -> Iterator[Section]:
    """Everything that has no section of its own: nothing of a report is left out."""
    rest = {name: value for name, value in report.extra.items() if name not in _KNOWN}
    plain = [
        (_name(name), _scalar(value))
        for name, value in rest.items()
        if _is_scalar(value) and value not in (None, "")
    ]
    if plain:
        yield Section(title="", kind="facts", rows=tuple(plain))
    for name, value in rest.items():
        if not _is_scalar(value) and value:
            yield _section(_name(name), value)


def _section(title: str, value: Any) -> Section:
    if isinstance(value, Mapping):
        rows = tuple((str(key), _cell(item)) for key, item in value.items())
        return Section(title=title, kind="facts", rows=rows)
    if all(isinstance(item, Mapping) for item in value):
        told = dict.fromkeys(str(name) for item in value for name in item)
        columns = tuple(name for name in told if any(item.get(name) for item in value))
        rows = tuple(tuple(ticks(_cell(item.get(name))) for name in columns) for item in value)
        return Section(title=title, kind="table", rows=rows, columns=tuple(map(_name, columns)))
    return Section(title=title, kind="list", rows=tuple(map(_cell, value)))


def _name(field: str) -> str:
    return field.removeprefix("num_").replace("_", " ")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) or value is None


def _cell(value: Any) -> str:
    """A value within a table, on one line."""
    if _is_scalar(value):
        return "" if value is None else _scalar(value)
    if isinstance(value, list | tuple) and all(map(_is_scalar, value)):
        return ", ".join(map(_cell, value))
    return json.dumps(value, default=str)


def _environment(report: Report) -> list[tuple[str, str]]:
    version = SCHEMA_VERSION if report.document is None else report.document["schema_version"]
    return [
        ("flamingo-ckpt", report.tool_version),
        ("schema", version),
        ("seconds", parity_words.short(report.duration_seconds)),
    ]
