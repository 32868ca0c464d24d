"""A parity check in Markdown: verdict, passes, stages (folded), and what is to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flamingo_ckpt.report import parity_stages as stages
from flamingo_ckpt.report import parity_words as words
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.markdown import prose, table
from flamingo_ckpt.report.parity_stages import Cell, Row

_PASS = ("pass", "device", "verdict", "max_abs", "relative", "cosine", "argmax agrees", "KL (nats)")


def parity_sections(report: Report) -> list[str]:
    """What stands between the inputs and the findings."""
    lines = [f"**{prose(words.sentence(report))}**", ""]
    lines += [f"* {word or 'note'}: {prose(text)}" for word, text in words.fact_lines(report)]
    lines += [f"* {word}: {prose(text)}" for word, text in _answers(report.extra)]
    if lines[-1]:
        lines.append("")
    passes = stages.passes_of(report)
    if passes:
        lines += ["## Passes", "", *table(_PASS, (_pass(report, one) for one in passes))]
        lines += ["## Stages", "", *_stages(report, passes)]
    for one in report.extra.get("blame") or ():
        lines += _blame(report, one)
    return [*lines, "## Findings", ""] if report.findings else lines


def _answers(extra: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if extra.get("greedy"):
        yield "greedy continuation", words.greedy_text(extra["greedy"])
    if extra.get("parameters"):
        yield "weights", words.weights_text(extra["parameters"])


def _pass(report: Report, one: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        words.pass_name(report, one),
        one["device"],
        words.outcome(one),
        words.short(one["max_abs"]),
        words.short(one["max_rel"]),
        words.cosine(one["cosine"]),
        words.share(one["argmax_agreement"]),
        words.short(one["kl"]),
    )


def _stages(report: Report, passes: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a stage."""
    rows = stages.stage_rows(report)
    folded = len(rows) > stages.MAX_STAGES
    shown = stages.stage_rows(report, folded=True) if folded else rows
    columns = ("stage", *(prose(words.pass_name(report, one)) for one in passes), "")
    told = "The relative difference, and the share of the tolerance that it takes."
    if folded:
        told += f" {len(rows)} stages; a line for several shows the worst of each pass."
    return [told, "", *table(columns, (_row(report, row, passes) for row in shown))]


def _row(report: Report, row: Row, passes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    among = [at for at, one in enumerate(passes) if one["decides"]]
    notes = (words.marker(report, row, among), words.bad_values(row, range(len(passes))))
    return (row.pattern, *map(_cell, row.cells), ", ".join(filter(None, notes)))


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if cell.only_in:
        return f"only in {cell.only_in.upper()}"
    used = "" if cell.used is None else f" ({words.used(cell.used)})"
    return words.short(cell.relative) + used


def _blame(report: Report, one: Mapping[str, Any]) -> list[str]:
    told = (words.suspect_text(one), words.confirmation(one))
    lines = [f"## Blame: {prose(one['stage'])}, {prose(words.gates(report, one['gates']))}", ""]
    lines += [prose("; ".join(filter(None, told))), ""]
    if one.get("tensors"):
        keys = ((tensor["canonical"], tensor["a"], tensor["b"]) for tensor in one["tensors"])
        lines += table(("tensor", "key in A", "key in B"), keys)
    if one.get("tried"):
        lines += table(("tried",), ((words.trial_text(trial),) for trial in one["tried"]))
    return lines
