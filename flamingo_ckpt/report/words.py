"""What all renderings say in the same words: the verdict, one sentence, findings by code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.tensors import escape

#: The severities, the worst first.
SEVERITIES = ("error", "warning", "info")
#: What a finding of each severity is called where people read it.
KINDS: Mapping[str, str] = {"error": "error", "warning": "warning", "info": "note"}
_VERDICTS: Mapping[str, str] = {
    "pass": "passed",
    "fail": "failed",
    "error": "error",
    "incomplete": "incomplete",
}
_COMPARED = {"keys": "names", "headers": "names, dtypes and shapes", "bits": "every bit"}


def count(number: int, noun: str) -> str:
    """`1 tensor`, `334 tensors`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def verdict_word(report: Report) -> str:
    """`passed`, `failed`, `error` or `incomplete`."""
    return _VERDICTS[report.verdict]


def sentence(report: Report) -> str:
    """The answer in one line, for people who read no other."""
    if not report.summary:
        return f"{verdict_word(report)}: {escape(report.findings[0].detail)}"
    if report.command == "parity":
        from flamingo_ckpt.report.parity_words import sentence as parity_sentence

        return parity_sentence(report)
    told = _SENTENCES.get(report.command, _counted)
    return told(report)


def _counted(report: Report) -> str:
    found = [
        count(number, KINDS[severity])
        for severity in SEVERITIES
        if (number := sum(one.severity == severity for one in report.findings))
    ]
    return f"{verdict_word(report)}: {', '.join(found) or 'nothing found'}"


def _inspect(report: Report) -> str:
    summary = report.summary
    return f"{count(summary['num_tensors'], 'tensor')}, {summary['num_parameters']} parameters"


def _convert(report: Report) -> str:
    summary, extra = report.summary, report.extra
    if extra["dry_run"]:
        return f"would write {count(summary['num_tensors'], 'tensor')}; nothing was written"
    how = (
        f"{summary['verified']} read back and compared with the source bit for bit"
        if extra["verified"]
        else "not read back (--no-verify)"
    )
    return f"wrote {count(summary['num_tensors'], 'tensor')}, {how}"


def _verify(report: Report) -> str:
    summary = report.summary
    if report.verdict == "pass":
        cast = " after the cast" if summary["cast"] else ""
        return "faithful: every tensor is there, bit for bit" + cast
    if report.verdict == "incomplete":
        unverified = len(report.extra["unverified"])
        return f"incomplete: {count(unverified, 'tensor')} came from a base that is not given"
    wrong = ", ".join(
        f"{summary[name]} {name}"
        for name in ("different", "missing", "unexpected")
        if summary[name]
    )
    return "not faithful" + (f": {wrong}" if wrong else "")


def _diff(report: Report) -> str:
    counts = ", ".join(
        f"{number} {name.replace('_', ' ')}"
        for name, number in report.summary.items()
        if number or name == "same"
    )
    word = "same" if report.verdict == "pass" else "differs"
    return f"{word}: {counts} (compared: {_COMPARED[report.extra['level']]})"


def _layouts(report: Report) -> str:
    summary = report.summary
    if summary["num_rules"]:
        return f"{count(summary['num_rules'], 'rule')} of one layout"
    return count(summary["num_layouts"], "layout")


def _check(report: Report) -> str:
    summary = report.summary
    missing = sum(finding.code == "FC623" for finding in report.findings)
    warnings = max(summary["warnings"] - missing, 0)
    parts = [count(summary["errors"], "error"), count(warnings, "warning")]
    if summary["waived"]:
        parts.append(f"{summary['waived']} waived")
    if missing:
        parts.append(f"{count(missing, 'required check')} not run")
    idle = summary["skipped"] - missing
    if idle > 0:
        parts.append(f"{count(idle, 'other check' if missing else 'check')} not run")
    word = {"pass": "ready", "fail": "not ready"}.get(report.verdict, verdict_word(report))
    if report.verdict == "pass" and report.extra["level"] == "headers":
        word = "ready as far as headers tell"
    return f"{word}: " + ", ".join(parts)


def _pull(report: Report) -> str:
    files = count(report.summary["num_files"], "file")
    if report.extra["dry_run"]:
        return f"would pull {files}; nothing was written"
    return f"pulled {files} of commit {escape(str(report.extra['commit']))[:12]}, each as listed"


def _push(report: Report) -> str:
    summary, extra = report.summary, report.extra
    files = count(summary["num_sent"], "file")
    unchecked = "" if extra["checked"] else ", unchecked"
    if extra["dry_run"]:
        return f"would push {files}{unchecked}; nothing was sent"
    if not summary["num_sent"]:
        return "nothing to send: every file is there already"
    how = "as a pull request" if extra["pull_request"] else "to the branch"
    return f"pushed {files} {how}{unchecked}"


_SENTENCES = {
    "inspect": _inspect,
    "convert": _convert,
    "verify": _verify,
    "diff": _diff,
    "layouts": _layouts,
    "check": _check,
    "pull": _pull,
    "push": _push,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The findings of one code and severity, in their order."""

    code: str
    severity: str
    title: str
    findings: tuple[Finding, ...]

    @property
    def kind(self) -> str:
        """`error`, `warning` or `note`."""
        return KINDS[self.severity]


def groups(findings: Sequence[Finding]) -> list[Group]:
    """By severity, the worst first, then by code in the order in which each appears."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for severity in SEVERITIES:
        for one in findings:
            if one.severity == severity:
                found.setdefault((severity, one.code), []).append(one)
    return [
        Group(code=code, severity=severity, title=some[0].title, findings=tuple(some))
        for (severity, code), some in found.items()
    ]
