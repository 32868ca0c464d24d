"""A release check as text: one line a check, then what is wrong and what to do first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.tensors import escape


def render_check(report: Report, *, verbose: bool) -> list[str]:
    """One line a check, waivers and fixes, findings, and the verdict last."""
    from flamingo_ckpt.report.text import render_findings  # which knows this module's name

    rows: Sequence[Mapping[str, Any]] = report.extra["checks"]
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [""]
    for row in rows:
        codes = ", ".join(dict.fromkeys(_codes(report.findings, row["name"])))
        required = "" if row["status"] != "skip" or not row["required"] else " (required)"
        lines.append(
            f"  {row['name']:<{width}}  {row['status']:<4}  "
            + (f"{codes}: " if codes else "")
            + escape(row["sentence"])
            + required
        )
    for one in report.extra["waived"]:
        lines.append(
            f"  waived  {one['code']}  {escape(one['detail'])}; until {one['until']} "
            f"({escape(one['owner'])}): {escape(one['reason'])}"
        )
    lines += _fixes(report.extra["fixes"])
    found = render_findings(report.findings, verbose)
    return [*lines, "", *found, *([""] if found else []), _verdict_line(report)]


def _verdict_line(report: Report) -> str:
    """What it comes to."""
    summary = report.summary
    missing = sum(finding.code == "FC623" for finding in report.findings)
    parts = [_count(summary["errors"], "error"), _count(summary["warnings"] - missing, "warning")]
    if summary["waived"]:
        parts.append(f"{summary['waived']} waived")
    if missing:
        parts.append(f"{_count(missing, 'required check')} not run")
    idle = summary["skipped"] - missing
    if idle:
        parts.append(f"{_count(idle, 'other check' if missing else 'check')} not run")
    word = {
        "pass": "ready",
        "fail": "not ready",
        "incomplete": "incomplete",
    }[report.verdict]
    if report.verdict == "pass" and report.extra["level"] == "headers":
        word = "ready as far as headers tell"
    return f"{word}: " + ", ".join(parts)


def _codes(findings: Sequence[Finding], check: str) -> list[str]:
    return [
        one.code
        for one in findings
        if one.data.get("check") == check and one.severity != "info" and one.code != "FC623"
    ]


def _fixes(fixes: Sequence[Mapping[str, Any]]) -> list[str]:
    if not fixes:
        return []
    told = [
        f"  {'mended' if one['applied'] else 'to mend':<7} {escape(one['path'])}: "
        f"{escape(one['what'])}"
        for one in fixes
    ]
    if not fixes[0]["applied"]:
        told.append("  nothing was changed; --fix --yes does it")
    return told


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
