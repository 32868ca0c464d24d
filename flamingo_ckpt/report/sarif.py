"""A report as SARIF 2.1.0, the form in which code scanners exchange what they found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from flamingo_ckpt.codes import TABLE
from flamingo_ckpt.errors import CODES, Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.places import Place, input_place, place_of
from flamingo_ckpt.report.words import sentence
from flamingo_ckpt.tensors import escape

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def to_sarif(report: Report) -> str:
    """The log of one run: a rule for each code, a result for each finding."""
    waived = report.extra.get("waived") or ()
    codes = sorted({*(one.code for one in report.findings), *(one["code"] for one in waived)})
    titles = {one.code: one.title for one in report.findings}
    results = [_result(report, codes, one) for one in report.findings]
    results += [_waived(report, codes, one) for one in waived]
    driver = {
        "name": "flamingo-ckpt",
        "version": report.tool_version,
        "rules": [_rule(code, CODES.get(code) or titles.get(code, code)) for code in codes],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(report)],
        "results": results,
        "columnKind": "unicodeCodePoints",
        "properties": {"verdict": report.verdict, "command": report.command},
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(code: str, title: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"id": code, "shortDescription": {"text": _text(title)}}
    row = TABLE.get(code)
    if row is not None:
        rule["defaultConfiguration"] = {"level": _LEVELS[row.severity]}
        if row.meaning:
            rule["fullDescription"] = {"text": _text(row.meaning)}
        told = "\n\n".join(filter(None, (row.meaning, row.hint)))
        rule["help"] = {"text": _text(told or title)}
    return rule


def _result(report: Report, codes: Sequence[str], finding: Finding) -> dict[str, Any]:
    message = finding.detail + (f"\nhint: {finding.hint}" if finding.hint else "")
    place = place_of(report, finding) or input_place(report)
    return {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": _LEVELS[finding.severity],
        "message": {"text": _text(message)},
        "locations": [_location(place, finding.key)],
        "partialFingerprints": {"finding/v1": _fingerprint(finding.code, finding.key, place)},
    }


def _waived(report: Report, codes: Sequence[str], one: Mapping[str, Any]) -> dict[str, Any]:
    """A finding that a policy lets pass: there, and suppressed."""
    place = input_place(report)
    why = ", ".join(
        filter(None, (one["reason"], one["owner"], one["until"] and f"until {one['until']}"))
    )
    return {
        "ruleId": one["code"],
        "ruleIndex": codes.index(one["code"]),
        "level": _LEVELS[one["severity"]],
        "message": {"text": _text(one["detail"])},
        "locations": [_location(place, one["key"])],
        "partialFingerprints": {"finding/v1": _fingerprint(one["code"], one["key"], place)},
        "suppressions": [{"kind": "external", "status": "accepted", "justification": _text(why)}],
    }


def _location(place: Place | None, key: str | None) -> dict[str, Any]:
    location: dict[str, Any] = {}
    if place is not None:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": _uri(place.path)},
            "region": {"startLine": place.line or 1},
        }
    if key is not None:
        location["logicalLocations"] = [{"fullyQualifiedName": escape(key), "kind": "member"}]
    return location


def _uri(path: str) -> str:
    """A path is bytes to the file system, and a URI has ASCII alone."""
    try:
        raw = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # from a report that no file system has seen
        raw = escape(path).encode("ascii")
    return quote(raw, safe="/")


def _fingerprint(code: str, key: str | None, place: Place | None) -> str:
    """Equal for one finding in two runs: of what it is about, and not of how it is put."""
    parts = (code, key or "", place.path if place else "")
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _invocation(report: Report) -> dict[str, Any]:
    """How the run ended: one without an answer, or with a part that did not run, is no success."""
    notes = [
        {
            "level": "error" if one["required"] else "warning",
            "message": {"text": _text(f"check {one['name']} did not run: {one['sentence']}")},
        }
        for one in report.extra.get("checks") or ()
        if one["status"] == "skip"
    ]
    if report.verdict in ("error", "incomplete"):
        notes.append({"level": "error", "message": {"text": _text(sentence(report))}})
    return {
        "executionSuccessful": report.verdict in ("pass", "fail"),
        "exitCode": report.exit_code,
        "arguments": [escape(word) for word in report.argv],
        **({"toolExecutionNotifications": notes} if notes else {}),
    }


def _text(text: str) -> str:
    """Words that no viewer takes for a placeholder (section 3.11.5) or a link (3.11.6)."""
    lines = (escape(line) for line in text.split("\n"))
    plain = "\n".join(lines).replace("{", "{{").replace("}", "}}")
    return plain.replace("](", "] (")
