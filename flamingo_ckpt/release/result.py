"""What a release check found: one outcome per check, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from flamingo_ckpt.errors import CkptError, Finding

#: The checks, in the order in which they are made and told.
CHECKS: Final = (
    "container",
    "keys",
    "bits",
    "values",
    "parity",
    "safety",
    "config",
    "tokenizer",
    "preprocessing",
    "card",
    "manifest",
    "signature",
)
#: Those that read all bytes; at level `headers` they are not made.
DATA_CHECKS: Final = ("bits", "values", "parity", "manifest", "signature")
LEVELS: Final = ("all", "headers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one check found.

    Attributes:
        name: of `CHECKS`.
        sentence: what was looked at and found, or why it was not.
        findings: its statements.
        is_skipped: whether it did not run. A check that ran in part and found nothing wrong is
            skipped too: what did not run is never called passed.
        seconds: that it took.
        details: for the report, by the name of its field.
    """

    name: str
    sentence: str
    findings: tuple[Finding, ...] = ()
    is_skipped: bool = False
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """`pass`, `warn`, `fail` or `skip`; what is wrong outweighs what did not run."""
        severities = {finding.severity for finding in self.findings}
        if "error" in severities:
            return "fail"
        if self.is_skipped:
            return "skip"
        return "warn" if "warning" in severities else "pass"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waived:
    """A finding that the policy lets pass.

    Attributes:
        finding: as found.
        check: that found it.
        reason, owner, until: of the waiver; the day as `YYYY-MM-DD`.
    """

    finding: Finding
    check: str
    reason: str
    owner: str
    until: str

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {
            "code": self.finding.code,
            "key": self.finding.key,
            "detail": self.finding.detail,
            "severity": self.finding.severity,
            "check": self.check,
            "reason": self.reason,
            "owner": self.owner,
            "until": self.until,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFact:
    """A file of the release: its path in the folder with `/`, size, and SHA-256."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The answer to: may I upload this.

    Attributes:
        outcomes: one for each of `CHECKS`, in order, without what was waived.
        required: names of the checks that have to run.
        waived: what was let pass.
        policy_findings: about the policy itself: FC621, FC622, FC623.
        files: everything that would be uploaded.
        is_strict: whether warnings count as errors.
        level: of `LEVELS`.
        waived_counts: check -> number of its findings that were waived.
    """

    outcomes: tuple[Outcome, ...]
    required: frozenset[str]
    waived: tuple[Waived, ...] = ()
    policy_findings: tuple[Finding, ...] = ()
    files: tuple[FileFact, ...] = ()
    is_strict: bool = False
    level: str = "all"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that was found and not waived, errors first."""
        found = [*self.policy_findings]
        for outcome in self.outcomes:
            found += outcome.findings
        order = {"error": 0, "warning": 1, "info": 2}
        return tuple(sorted(found, key=lambda finding: order[finding.severity]))

    @property
    def missing(self) -> tuple[str, ...]:
        """Required checks that did not run."""
        return tuple(
            one.name for one in self.outcomes if one.status == "skip" and one.name in self.required
        )

    @property
    def verdict(self) -> str:
        """`pass`, `fail` or `incomplete`."""
        bad = {"error", "warning"} if self.is_strict else {"error"}
        # FC623 says that a check is missing, which is another answer than a bad one
        if any(one.severity in bad and one.code != "FC623" for one in self.findings):
            return "fail"
        return "incomplete" if self.missing else "pass"

    @property
    def exit_code(self) -> int:
        """0, 1 or 3."""
        return {"pass": 0, "fail": 1, "incomplete": 3}[self.verdict]

    def summary(self) -> dict[str, Any]:
        """The counts of the JSON report."""
        severities = [finding.severity for finding in self.findings]
        return {
            "errors": severities.count("error"),
            "warnings": severities.count("warning"),
            "skipped": sum(one.status == "skip" for one in self.outcomes),
            "waived": len(self.waived),
            "checks": {one.name: one.status for one in self.outcomes},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One mapping for each check, for the report."""
        return [
            {
                "name": one.name,
                "status": one.status,
                "required": one.name in self.required,
                "sentence": one.sentence,
                "num_errors": sum(f.severity == "error" for f in one.findings),
                "num_warnings": sum(f.severity == "warning" for f in one.findings),
                "num_waived": sum(w.check == one.name for w in self.waived),
                "seconds": round(one.seconds, 3),
            }
            for one in self.outcomes
        ]


def skipped(name: str, why: str, *findings: Finding) -> Outcome:
    """A check that did not run, and why."""
    return Outcome(name=name, sentence=why, findings=findings, is_skipped=True)


def failed(name: str, error: CkptError) -> Outcome:
    """A check that an error ended: a bad answer, and no check any more once the error is waived."""
    return Outcome(
        name=name, sentence=error.message, findings=(finding_of(error),), is_skipped=True
    )


def finding_of(error: CkptError) -> Finding:
    """An error as a finding with its place, which `check_release` makes a file of the release."""
    finding = error.as_finding()
    return finding if error.where is None else replace(finding, data={"where": error.where})


def of_check(finding: Finding, check: str, **data: Any) -> Finding:
    """The finding with its check, and the file that it is about where there is one."""
    return replace(finding, data={"check": check, **data, **finding.data})
