"""Reports as Markdown, for pull requests and release notes."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.words import sentence, verdict_word
from flamingo_ckpt.tensors import escape


def to_markdown(report: Report) -> str:
    """Headline, inputs, counts and every finding as tables; hostile text is escaped."""
    lines = [f"# flamingo-ckpt {prose(report.command)}: {verdict_word(report)}", ""]
    lines += [code("flamingo-ckpt " + " ".join(report.argv)), ""]
    if report.inputs:
        columns = ("uri", "format", "layout", "wrapper", "prefix", "num_tensors", "num_bytes")
        lines += table(columns, ([one.get(name) for name in columns] for one in report.inputs))
    if report.command == "parity" and report.summary:
        from flamingo_ckpt.report.parity_markdown import parity_sections

        lines += parity_sections(report)
    elif report.command == "check" and report.summary:
        lines += [f"**{prose(sentence(report))}**", "", *check_sections(report)]
    elif report.command == "explain" and report.summary:
        lines += [line for one in report.extra["codes"] for line in _page(one)]
    elif report.summary:
        counts = [(name, value) for name, value in report.summary.items() if name != "files"]
        lines += table(("count", "value"), counts)
        files = report.summary.get("files")
        if files:
            rows = [(one["path"], one["num_bytes"]) for one in files]
            lines += table(("file", "bytes"), rows)
    if report.findings:
        told = [(f.severity, f.code, f.key, f.detail, f.hint) for f in report.findings]
        lines += table(("severity", "code", "key", "detail", "hint"), told)
    return "\n".join(lines)


def _page(one: Mapping[str, str]) -> list[str]:
    """What a code means, as `explain` tells it."""
    lines = [f"## {prose(one['code'])}: {prose(one['title'])}", ""]
    for paragraph in (*one["meaning"].split("\n\n"), f"What to do: {one['hint']}"):
        lines += [prose(paragraph), ""]
    return lines


def check_sections(report: Report) -> list[str]:
    """One row for each check: how it ended, in a word, and why; then what was let pass, by whom."""
    rows = []
    for one in report.extra["checks"]:
        found = [item.code for item in report.findings if item.data.get("check") == one["name"]]
        status = one["status"] + (", required" if one["required"] else "")
        rows.append((one["name"], status, one["sentence"], ", ".join(dict.fromkeys(found))))
    lines = table(("check", "status", "", "codes"), rows)
    names = ("code", "detail", "reason", "owner", "until")
    waived = [[one[name] for name in names] for one in report.extra["waived"]]
    if waived:
        lines += table(("waived", "what was found", "reason", "owner", "until"), waived)
    return lines


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table and the empty line after it; cells are escaped, columns are ours."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return [*lines, ""]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return prose(
        ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    )


def prose(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    text = html.escape(escape(text), quote=False)
    for char in "\\|*_[]":
        text = text.replace(char, "\\" + char)
    return text


def code(text: str) -> str:
    """Text between backticks, on one line."""
    return "`" + html.escape(escape(text), quote=False).replace("`", "'") + "`"
