"""A parity check as text: the stages in order, what is to blame, and the verdict last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from flamingo_ckpt.report import parity_stages as stages
from flamingo_ckpt.report import parity_words as words
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.parity_stages import Cell, Row
from flamingo_ckpt.report.text import render_findings
from flamingo_ckpt.tensors import escape

_MAX_LISTED = 10
_INDENT = 11
_NAME_WIDTH = 40
#: Width of the three numbers of a pass, and of a pass.
_COLUMNS = (8, 9, 8)
_GROUP = sum(_COLUMNS)
_GAP = "   "


def render_parity(report: Report, *, verbose: bool = False) -> list[str]:
    """What ran, every stage, what is to blame, the findings, and the verdict in words.

    Args:
        report: of the verb `parity`; may have ended before anything ran.
        verbose: whether every stage and every tensor has its line.
    """
    lines = ["", *(_line(word, text) for word, text in words.fact_lines(report))]
    lines += [*_tables(report, verbose), *_answers(report, verbose)]
    for one in report.extra.get("blame") or ():
        lines += _blame(report, one, verbose)
    lines += [
        _line("reported", f"{words.pass_name(report, one)}: {_numbers(one)}; does not decide")
        for one in stages.passes_of(report)
        if not one["decides"]
    ]
    lines += ["", *render_findings(report.findings, verbose)]
    return [*lines, words.sentence(report)]


def _line(word: str, text: str) -> str:
    return f"{word:<{_INDENT}}{text}"


def _tables(report: Report, verbose: bool) -> list[str]:
    """A table for each dtype that decides; of the others too where every stage is asked for."""
    passes = stages.passes_of(report)
    rows = stages.stage_rows(report)
    folded = len(rows) > stages.MAX_STAGES and not verbose
    shown = stages.stage_rows(report, folded=True) if folded else rows
    decide = any(one["decides"] for one in passes)
    lines: list[str] = []
    for dtype, numbered in groupby(enumerate(passes), key=lambda entry: entry[1]["dtype"]):
        group = dict(numbered)
        if verbose or not decide or any(one["decides"] for one in group.values()):
            lines += ["", *_table(report, dtype, group, shown)]
    if folded and lines:
        lines.append(
            f"  {len(rows)} stages; a line for several shows the worst of each column, "
            "-v lists each"
        )
    return [*lines, ""] if lines else []


def _table(
    report: Report, dtype: str, group: Mapping[int, Mapping[str, Any]], rows: Sequence[Row]
) -> list[str]:
    """One dtype: a line for each stage, three numbers for each pass."""
    width = min(max([len("stage"), *(len(row.pattern) for row in rows)]), _NAME_WIDTH)
    decides = any(one["decides"] for one in group.values())
    head = _columns("max_abs", "relative", "used" if decides else "cosine")
    names = _GAP.join(words.gates(report, one["gates"]).rjust(_GROUP) for one in group.values())
    title = escape(dtype) + ("" if decides else f": {words.REPORTED}")
    lines = [] if decides else [title]
    lines += [f"{title if decides else '':<{width + 2}}{_GAP}{names}"]
    lines += [f"  {'stage':<{width}}{_GAP}{_GAP.join(head for _ in group)}"]
    for row in rows:
        cells = _GAP.join(_cell(row.cells[at], decides) for at in group)
        first, bad = words.marker(report, row, list(group)), words.bad_values(row, list(group))
        notes = ", ".join(filter(None, (first and f"<- {first}", bad)))
        lines.append(f"  {row.pattern:<{width}}{_GAP}{cells}  {notes}".rstrip())
    return lines


def _columns(*texts: str) -> str:
    return "".join(text.rjust(width) for text, width in zip(texts, _COLUMNS, strict=True))


def _cell(cell: Cell | None, decides: bool) -> str:
    if cell is None:
        return _columns("-", "-", "-")
    if cell.only_in:
        return f"only in {cell.only_in.upper()}".rjust(_GROUP)
    last = words.used(cell.used) if decides else words.cosine(cell.cosine)
    return _columns(words.short(cell.max_abs), words.short(cell.relative), last)


def _answers(report: Report, verbose: bool) -> list[str]:
    """What comes out at the end, and the weights that went in."""
    lines = []
    if any(one["kl"] is not None for one in stages.passes_of(report)):
        lines = [
            _line("logits" if not at else "", f"{words.pass_name(report, one)}: {_logits(one)}")
            for at, one in enumerate(filter(lambda one: one["decides"], stages.passes_of(report)))
        ]
    if report.extra.get("greedy"):
        lines.append(_line("greedy", words.greedy_text(report.extra["greedy"])))
    if report.extra.get("parameters"):
        lines += _weights(report.extra["parameters"], verbose)
    return lines


def _logits(one: Mapping[str, Any]) -> str:
    agreement = words.share(one["argmax_agreement"])
    return f"argmax agrees on {agreement} of the positions, KL {words.short(one['kl'])} nats"


def _numbers(one: Mapping[str, Any]) -> str:
    told = [
        f"max_abs {words.short(one['max_abs'])}",
        f"relative {words.short(one['max_rel'])}",
        f"cosine {words.cosine(one['cosine'])}",
    ]
    if one["argmax_agreement"] is not None:
        told.append(f"argmax agrees on {words.share(one['argmax_agreement'])}")
    if one["kl"] is not None:
        told.append(f"KL {words.short(one['kl'])}")
    return ", ".join(told)


def _weights(parameters: Mapping[str, Any], verbose: bool) -> list[str]:
    told = [
        f"`{escape(one['canonical'])}`: {escape(one['what'])}"
        for one in parameters.get("different") or ()
    ]
    for side in "ab":
        told += [
            f"`{escape(name)}`: only in {side.upper()}"
            for name in parameters.get(f"only_{side}") or ()
        ]
    return [
        _line("weights", words.weights_text(parameters)),
        *(_line("", f"  {text}") for text in _some(told, verbose)),
    ]


def _blame(report: Report, one: Mapping[str, Any], verbose: bool) -> list[str]:
    stage, gates = escape(one["stage"]), words.gates(report, one["gates"])
    tensors = [
        f"`{escape(tensor['canonical'])}`: {_keys(tensor)}" for tensor in one.get("tensors") or ()
    ]
    tried = [f"tried  {words.trial_text(trial)}" for trial in one.get("tried") or ()]
    confirmation = words.confirmation(one)
    return [
        _line("blame", f"`{stage}`, {gates}: {words.suspect_text(one)}"),
        *([_line("", f"  {confirmation}")] if confirmation else []),
        *(_line("", f"  {text}") for text in _some(tensors, verbose)),
        *(_line("", f"  {text}") for text in _some(tried, verbose)),
    ]


def _keys(tensor: Mapping[str, Any]) -> str:
    if tensor.get("a") and tensor.get("a") == tensor.get("b"):
        return f"A and B `{escape(tensor['a'])}`"
    sides = ((side.upper(), tensor.get(side)) for side in "ab")
    return ", ".join(
        f"{side} `{escape(key)}`" if key else f"{side} has none" for side, key in sides
    )


def _some(texts: Sequence[str], verbose: bool) -> list[str]:
    if verbose or len(texts) <= _MAX_LISTED:
        return list(texts)
    return [*texts[:_MAX_LISTED], f"and {len(texts) - _MAX_LISTED} more, see -v or --json"]
