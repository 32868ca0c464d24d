"""What a pull takes and a push sends, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.text import format_bytes, render_findings
from flamingo_ckpt.report.words import count
from flamingo_ckpt.tensors import escape

_MAX_ROWS = 40


def render_pull(report: Report, *, verbose: bool = False) -> list[str]:
    """The files, then what stays on the hub and why, then where they are now."""
    extra, summary = report.extra, report.summary
    rows = [
        (escape(one["path"]), format_bytes(one["num_bytes"]), str(one["sha256"] or "")[:12])
        for one in extra["files"]
    ]
    lines = ["", *_table(rows, verbose)]
    left = [
        (escape(one["path"]), format_bytes(one["num_bytes"]), escape(one["reason"]))
        for one in extra["left"]
    ]
    if left:
        lines += ["", "left on the hub", *_table(left, verbose)]
    what = f"{count(summary['num_files'], 'file')}, {format_bytes(summary['num_bytes'])}"
    if extra["dry_run"]:
        return [*lines, "", f"would pull {what}; nothing written (--dry-run)"]
    moved = summary["num_bytes_moved"]
    how = "all from the cache" if moved == 0 else f"{format_bytes(moved)} over the network"
    lines += [
        "",
        f"pulled     {what} into {escape(extra['dst'])}; {how}",
        "checked    size and digest of every file, as the hub lists them",
        f"commit     {escape(extra['commit'])}",
    ]
    return [*lines, *render_findings(report.findings, verbose)]


def render_push(report: Report, *, verbose: bool = False) -> list[str]:
    """The files with what becomes of each, then the commit."""
    extra, summary = report.extra, report.summary
    rows = [
        (escape(one["path"]), format_bytes(one["num_bytes"]), one["status"])
        for one in extra["files"]
    ]
    lines = ["", *_table(rows, verbose)]
    if extra["left"]:
        left = [(escape(one["path"]), escape(one["reason"]), "") for one in extra["left"]]
        lines += ["", "not sent", *_table(left, verbose)]
    if extra["stays"]:
        stays = [(escape(path), "", "") for path in extra["stays"]]
        lines += ["", "stays in the repository", *_table(stays, verbose)]
    lines += ["", *render_findings(report.findings, verbose)]
    what = f"{count(summary['num_sent'], 'file')}, {format_bytes(summary['num_bytes_sent'])}"
    if not extra["checked"]:
        lines.append("unchecked  no report of a check")
    if extra["dry_run"]:
        where = f"to {escape(extra['dst'])}"
        new = "" if extra["parent"] else ", which would be made"
        lines.append(f"would push {what} {where}{new}; nothing sent (--dry-run)")
    elif not summary["num_sent"]:
        lines.append(f"nothing to send: {escape(extra['dst'])} has every file as it is here")
    else:
        lines.append(f"pushed     {what} to {escape(extra['dst'])}, and compared with its list")
        lines.append(f"commit     {escape(extra['commit'])}")
        if extra["pull_request"]:
            lines.append(f"review     {escape(extra['pull_request'])}")
    return lines


def _table(rows: Sequence[tuple[str, ...]], verbose: bool) -> list[str]:
    shown: Sequence[tuple[Any, ...]] = rows if verbose else rows[:_MAX_ROWS]
    widths = [min(max((len(row[at]) for row in shown), default=0), 100) for at in range(2)]
    lines = [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}".rstrip() for row in shown]
    more = len(rows) - len(shown)
    return [*lines, f"  and {more} more, see -v"] if more else lines
