"""The report every verb gives: data first, renderings of it after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flamingo_ckpt import __version__
from flamingo_ckpt.errors import CODES, Finding
from flamingo_ckpt.tensors import Manifest, distinct, escape

SCHEMA_VERSION = "1.0"
#: Fields of a document that are fields of `Report`; all others are `Report.extra`.
_FIELDS = frozenset(
    {"schema_version", "tool", "command", "verdict", "exit_code", "inputs", "summary"}
    | {"findings", "duration_seconds"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a verb found, ready to be rendered.

    Attributes:
        command: the verb.
        argv: as given.
        verdict: `pass`, `fail`, `error` or `incomplete`.
        exit_code: what the process ends with.
        inputs: one mapping per source, from `describe_input`.
        summary: counts.
        findings: statements, one per key.
        extra: further top-level fields.
        document: of a report that was read from a file, the whole of it as it stood there.
    """

    command: str
    argv: tuple[str, ...]
    verdict: str
    exit_code: int
    inputs: tuple[Mapping[str, Any], ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    duration_seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    document: Mapping[str, Any] | None = None

    @property
    def tool_version(self) -> str:
        """Of the tool that made the report, which need not be this one."""
        return __version__ if self.document is None else str(self.document["tool"]["version"])


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFinding(Finding):
    """A finding of a stored report; its code may be newer than the table.

    Attributes:
        stored_title: what the report says that the code is about.
    """

    stored_title: str

    @property
    def title(self) -> str:
        """What the code is about: by the table, and by the report where that lacks it."""
        return CODES.get(self.code, self.stored_title)


def describe_input(manifest: Manifest, prefix: str | None, layout: str | None) -> dict[str, Any]:
    """The `inputs[]` entry of a manifest; `layout` is None where its keys show none."""
    remote = {} if manifest.remote is None else {"remote": dict(manifest.remote())}
    return {
        "uri": manifest.uri,
        "format": manifest.format,
        "layout": layout,
        "prefix": prefix,
        "wrapper": manifest.wrapper,
        "num_tensors": len(manifest.tensors),
        "num_bytes": sum(tensor.num_bytes for tensor in distinct(manifest.tensors)),
        **remote,
    }


def to_document(report: Report) -> dict[str, Any]:
    """The one JSON document of a verb; see the contract in the README."""
    if report.document is not None:
        return dict(report.document)
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "flamingo-ckpt", "version": __version__},
        "command": {"name": report.command, "argv": list(report.argv)},
        "verdict": report.verdict,
        "exit_code": report.exit_code,
        "inputs": [dict(one) for one in report.inputs],
        "summary": plain(report.summary),
        "findings": [_finding(finding) for finding in report.findings],
        "duration_seconds": round(report.duration_seconds, 3),
        **{key: plain(value) for key, value in report.extra.items()},
    }


def from_document(document: Mapping[str, Any]) -> Report:
    """The report that a document is of: it renders as the original did.

    Fields that this version does not know are kept.

    Args:
        document: as `to_document` makes it, and as `stored.read_report` has checked it.
    """
    return Report(
        command=document["command"]["name"],
        argv=tuple(document["command"]["argv"]),
        verdict=document["verdict"],
        exit_code=document["exit_code"],
        inputs=tuple(document["inputs"]),
        summary=document["summary"],
        findings=tuple(map(_stored_finding, document["findings"])),
        duration_seconds=float(document["duration_seconds"]),
        extra={name: value for name, value in document.items() if name not in _FIELDS},
        document=document,
    )


def _stored_finding(entry: Mapping[str, Any]) -> StoredFinding:
    return StoredFinding(
        code=entry["code"],
        severity=entry["severity"],
        detail=entry["detail"],
        key=entry["key"],
        hint=entry["hint"],
        data=entry.get("data") or {},
        stored_title=entry["title"],
    )


def _finding(finding: Finding) -> dict[str, Any]:
    entry = {
        "code": finding.code,
        "severity": finding.severity,
        "title": finding.title,
        "key": finding.key,
        "detail": escape(finding.detail),
        "hint": None if finding.hint is None else escape(finding.hint),
    }
    if finding.data:
        entry["data"] = plain(finding.data)
    return entry


def plain(value: Any) -> Any:
    """JSON values only: numbers that JSON lacks become strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
