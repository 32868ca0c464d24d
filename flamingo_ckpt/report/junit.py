"""A report as JUnit XML: what every CI shows as tests that passed, failed, or were skipped."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.words import Group, groups, sentence
from flamingo_ckpt.tensors import escape

_MAX_LISTED = 100


def to_junit(report: Report) -> str:
    """One suite: of `check` a case for each check, of other verbs one for each kind of finding.

    Where no case says that the answer is bad, or that there is none, one more does.
    """
    suite = ET.Element("testsuite", name=f"flamingo-ckpt {report.command}".strip())
    checks = report.extra.get("checks") or ()
    names = {one["name"] for one in checks}
    for one in checks:
        _check(suite, one, [f for f in report.findings if f.data.get("check") == one["name"]])
    if report.summary:
        # those of a policy are of no check
        for group in groups([f for f in report.findings if f.data.get("check") not in names]):
            _group(suite, report.command, group)
    has_failed = suite.find("testcase/failure") is not None
    is_told = has_failed if report.verdict == "fail" else report.verdict == "pass" and len(suite)
    if not is_told:
        _verdict(suite, report)
    for name, path in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"testcase/{path}"))))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("time", f"{report.duration_seconds:.3f}")
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode")


def _case(suite: ET.Element, command: str, name: str, seconds: float = 0.0) -> ET.Element:
    return ET.SubElement(
        suite,
        "testcase",
        classname=escape(f"flamingo-ckpt.{command}"),
        name=escape(name),
        time=f"{seconds:.3f}",
    )


def _check(suite: ET.Element, one: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    case = _case(suite, "check", one["name"], float(one["seconds"]))
    told = escape(one["sentence"])
    if one["status"] == "skip":
        required = "required, and not run: " if one["required"] else "not run: "
        ET.SubElement(case, "skipped", message=required + told)
    elif one["status"] == "fail":
        _failure(case, told, [f for f in findings if f.severity == "error"])
    if one["status"] != "fail" and findings:
        ET.SubElement(case, "system-out").text = _listed(findings)


def _group(suite: ET.Element, command: str, group: Group) -> None:
    case = _case(suite, command, f"{group.code} {group.title}")
    if group.severity == "error":
        _failure(case, f"{len(group.findings)} found", group.findings)
    else:
        ET.SubElement(case, "system-out").text = _listed(group.findings)


def _failure(case: ET.Element, message: str, findings: Sequence[Finding]) -> None:
    codes = ", ".join(dict.fromkeys(one.code for one in findings))
    ET.SubElement(case, "failure", message=message, type=codes or "failed").text = _listed(findings)


def _verdict(suite: ET.Element, report: Report) -> None:
    case = _case(suite, report.command, "verdict", report.duration_seconds)
    if report.verdict != "pass":
        kind = "failure" if report.verdict == "fail" else "error"
        ET.SubElement(case, kind, message=escape(sentence(report)), type=report.verdict)


def _listed(findings: Sequence[Finding]) -> str:
    """A line for each; what XML has no place for is escaped."""
    lines = []
    for one in findings[:_MAX_LISTED]:
        lines.append(f"{one.severity} {one.code}: {escape(one.detail)}")
        if one.hint:
            lines.append(f"  hint: {escape(one.hint)}")
    if len(findings) > _MAX_LISTED:
        lines.append(f"and {len(findings) - _MAX_LISTED} more, see the JSON report")
    return "\n".join(lines)
