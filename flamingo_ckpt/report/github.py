"""A report for GitHub Actions: annotations beside the files, and the summary of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.markdown import check_sections, code, prose, table
from flamingo_ckpt.report.places import place_of
from flamingo_ckpt.report.words import (
    KINDS,
    SEVERITIES,
    Group,
    count,
    groups,
    sentence,
    verdict_word,
)
from flamingo_ckpt.tensors import escape

#: GitHub shows this many of each kind for a step, and drops the rest without a word.
MAX_ANNOTATIONS = 10
_COMMANDS: Mapping[str, str] = {"error": "error", "warning": "warning", "info": "notice"}
_MAX_LISTED = 20


def to_annotations(report: Report) -> str:
    """A workflow command for each finding, as many as are shown, then how many more there are."""
    lines: list[str] = []
    for severity in SEVERITIES:
        found = _spread([one for one in report.findings if one.severity == severity])
        lines += [_annotation(report, one) for one in found[:MAX_ANNOTATIONS]]
        if len(found) > MAX_ANNOTATIONS:
            more = len(found) - MAX_ANNOTATIONS
            lines.append(f"and {count(more, f'more {KINDS[severity]}')}, see the report")
    if report.verdict != "pass" and not any(one.severity == "error" for one in report.findings):
        lines.append(_command("error", {"title": _title(report)}, sentence(report)))
    lines.append(f"flamingo-ckpt {_plain(f'{report.command}: {sentence(report)}')}")
    return "\n".join(lines)


def _spread(findings: Sequence[Finding]) -> list[Finding]:
    """The first of each code before the second of any: ten of one kind must not hide the rest."""
    seen: dict[str, int] = {}
    ranks = []
    for one in findings:
        ranks.append(seen.get(one.code, 0))
        seen[one.code] = ranks[-1] + 1
    order = sorted(range(len(findings)), key=lambda at: ranks[at])
    return [findings[at] for at in order]


def _annotation(report: Report, finding: Finding) -> str:
    place = place_of(report, finding)
    facts = {"title": f"{finding.code} {finding.title}"}
    if place is not None:
        facts = {"file": place.path, **({"line": str(place.line)} if place.line else {}), **facts}
    told = escape(finding.detail) + (f"\nhint: {escape(finding.hint)}" if finding.hint else "")
    return _command(_COMMANDS[finding.severity], facts, told)


def _command(name: str, facts: Mapping[str, str], message: str) -> str:
    """`::error file=a.md,line=1::text`, with what the runner reads as syntax escaped."""
    told = ",".join(f"{key}={_property(value)}" for key, value in facts.items())
    return f"::{name} {told}::{_data(message)}"


def _data(text: str) -> str:
    lines = (_plain(line) for line in text.split("\n"))
    return "%0A".join(line.replace("%", "%25") for line in lines)


def _property(text: str) -> str:
    return _data(escape(text)).replace(":", "%3A").replace(",", "%2C")


def _plain(text: str) -> str:
    """Without what the runner takes for a command of its older form, anywhere in a line."""
    return escape(text).replace("##[", "## [")


def _title(report: Report) -> str:
    return f"flamingo-ckpt {report.command}".strip()


def to_step_summary(report: Report) -> str:
    """Verdict, checks, and the findings by code: for `$GITHUB_STEP_SUMMARY`."""
    lines = [f"## {prose(_title(report))}: {verdict_word(report)}", ""]
    lines += [f"**{prose(sentence(report))}**", ""]
    if report.extra.get("checks"):
        lines += check_sections(report)
    for group in groups(report.findings):
        lines += _folded(group)
    lines.append(f"<sub>{code(' '.join(('flamingo-ckpt', *report.argv)))}</sub>")
    return "\n".join(lines)


def _folded(group: Group) -> Iterator[str]:
    """One code: open where it is an error."""
    number = count(len(group.findings), group.kind)
    state = " open" if group.severity == "error" else ""
    yield f"<details{state}><summary>{number}: {group.code} {prose(group.title)}</summary>"
    yield ""
    rows = [(one.key, one.detail, one.hint) for one in group.findings[:_MAX_LISTED]]
    yield from table(("key", "what", "hint"), rows)
    if len(group.findings) > _MAX_LISTED:
        yield f"and {len(group.findings) - _MAX_LISTED} more, see the report"
        yield ""
    yield "</details>"
    yield ""
