"""A release check as text: one line a check, then what is wrong and what to do first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.words import sentence
from flamingo_ckpt.tensors import escape


def render_check(report: Report, *, verbose: bool = False) -> list[str]:
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
    return [*lines, "", *found, *([""] if found else []), sentence(report)]


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
