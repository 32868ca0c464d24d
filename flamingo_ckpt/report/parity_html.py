"""A parity report as one HTML page: no network, no script, complete on paper."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

from flamingo_ckpt import __version__
from flamingo_ckpt.report import parity_stages as stages
from flamingo_ckpt.report import parity_words as words
from flamingo_ckpt.report.document import Report, to_document
from flamingo_ckpt.report.parity_plot import plots
from flamingo_ckpt.report.parity_stages import Row
from flamingo_ckpt.report.text import format_bytes
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import jinja2

_FIELDS = ("uri", "format", "layout", "wrapper", "prefix", "num_tensors", "num_bytes")
_COLUMNS = ("", "path", "format", "layout", "wrapper", "prefix", "tensors", "size")
_TICKS = re.compile("`([^`]+)`")


def to_html(report: Report) -> str:
    """The page; the JSON document is embedded in it, in `script#report`.

    Args:
        report: of the verb `parity`; may have ended before anything ran.
    """
    from markupsafe import Markup

    css = _data("parity.css")
    page = _environment(report).from_string(_data("parity.html.jinja"))
    return page.render(
        _context(report),
        # the style sheet is ours, and holds nothing of the report
        css=Markup(css),  # noqa: S704
        policy=_policy(css),
        document=to_document(report),
    )


def _data(name: str) -> str:
    return resources.files("flamingo_ckpt.report").joinpath(name).read_text("utf-8")


def _policy(css: str) -> str:
    """Nothing may be loaded, run or sent; one style sheet is allowed, by its hash."""
    digest = base64.b64encode(hashlib.sha256(css.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _environment(report: Report) -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": True}
    environment.filters |= {
        "short": words.short,
        "cosine": words.cosine,
        "share": words.share,
        "used": words.used,
        "gates": partial(words.gates, report),
        "outcome": words.outcome,
        "greedy": words.greedy_text,
        "weights": words.weights_text,
        "suspect": words.suspect_text,
        "confirmation": words.confirmation,
        "trial": words.trial_text,
        "ticks": _ticks,
    }
    return environment


def _printable(value: Any) -> Any:
    """What is text and not yet HTML, without controls and what else cannot be seen."""
    return escape(value) if type(value) is str else value


def _ticks(text: str) -> Any:
    """What stands in backticks as code."""
    from markupsafe import Markup

    parts = _TICKS.split(escape(text))
    marked = (Markup("<code>{}</code>").format(part) for part in parts[1::2])
    # even places are the text between
    return Markup("").join(
        part for pair in zip(parts[::2], [*marked, ""], strict=True) for part in pair
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
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


def _groups(report: Report) -> Iterator[_Group]:
    numbered = enumerate(stages.passes_of(report))
    for dtype, entries in groupby(numbered, key=lambda entry: str(entry[1]["dtype"])):
        group = list(entries)
        yield _Group(
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
        "report": report,
        "version": __version__,
        "word": words.verdict_word(report),
        "sentence": words.sentence(report),
        "command": [shlex.quote(word) for word in ("flamingo-ckpt", *report.argv)],
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
        "tables": list(_groups(report)) if rows else [],
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
    told = [(one["canonical"], _ticks(one["what"])) for one in parameters.get("different") or ()]
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
