"""The release check: every check in its order, the policy over what they found, one verdict."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.behaviour import Source, check_bits, check_parity
from flamingo_ckpt.release.card import check_card
from flamingo_ckpt.release.config import check_config
from flamingo_ckpt.release.container import check_container
from flamingo_ckpt.release.folder import check_same, digests
from flamingo_ckpt.release.keys import check_keys
from flamingo_ckpt.release.leaks import without_secrets
from flamingo_ckpt.release.manifest import check_manifest
from flamingo_ckpt.release.policy import Policy, apply_policy, required_findings
from flamingo_ckpt.release.preprocessing import check_preprocessing
from flamingo_ckpt.release.result import (
    DATA_CHECKS,
    CheckResult,
    FileFact,
    Outcome,
    failed,
    of_check,
    skipped,
)
from flamingo_ckpt.release.safety import check_safety
from flamingo_ckpt.release.signature import check_signature
from flamingo_ckpt.release.subject import Subject
from flamingo_ckpt.release.tokenizer import check_tokenizer
from flamingo_ckpt.release.values import check_values
from flamingo_ckpt.stream import OnBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told of progress.

    Attributes:
        say: what is done next.
        on_bytes: name of a check that reads data -> a callback for bytes done.
    """

    say: Callable[[str], None] = lambda _: None
    on_bytes: Mapping[str, OnBytes] = field(default_factory=dict)

    def bytes_of(self, name: str) -> OnBytes:
        """The callback of a check."""
        return self.on_bytes.get(name, lambda _: None)


def check_release(
    subject: Subject,
    policy: Policy,
    *,
    source: Source | None = None,
    level: str = "all",
    watch: Watch | None = None,
    between: Callable[[list[Outcome]], Subject] | None = None,
    today: datetime.date | None = None,
) -> CheckResult:
    """Whether a release may be uploaded.

    Args:
        subject: the release.
        policy: what it has to fulfil.
        source: what it was made from, where that is known.
        level: `all`, or `headers` for the checks that read no tensor data.
        watch: who is told of progress.
        between: called with what the weights showed, before the papers beside them are read; gives
            the release as it is then.
        today: for the end of waivers.
    """
    watch = watch or Watch()
    made: list[Outcome] = []

    def make(name: str, check: Callable[[], Outcome]) -> Outcome:
        watch.say(name)
        started = time.monotonic()
        if level == "headers" and name in DATA_CHECKS:
            outcome = skipped(name, "not asked for: only headers are read")
        else:
            try:
                outcome = check()
            except CkptError as error:
                outcome = failed(name, error)
        placed = [_masked(_placed(one, subject)) for one in outcome.findings]
        outcome = replace(
            outcome,
            sentence=without_secrets(outcome.sentence),
            findings=tuple(of_check(one, name) for one in _once(placed)),
            seconds=time.monotonic() - started,
        )
        made.append(outcome)
        return outcome

    make("container", lambda: check_container(subject))
    make("keys", lambda: check_keys(subject))
    make("bits", lambda: check_bits(subject, source, watch.bytes_of("bits")))
    values = make(
        "values",
        lambda: check_values(subject, policy.norm_factor, watch.bytes_of("values")),
    )
    make("parity", lambda: check_parity(subject, source, policy.parity, watch.say))
    if between is not None:
        subject = between(made)
    make("safety", lambda: check_safety(subject))
    make("config", lambda: check_config(subject))
    make("tokenizer", lambda: check_tokenizer(subject))
    make("preprocessing", lambda: check_preprocessing(subject))
    content = values.details.get("content")
    make("card", lambda: check_card(subject, policy.licenses, content))
    files: list[FileFact] = []

    def manifest() -> Outcome:
        found = digests(subject.files, watch.bytes_of("manifest"))
        check_same(subject.files)  # else the report would list bytes that nobody looked at
        files.extend(found)
        return check_manifest(subject, files)

    make("manifest", manifest)
    make("signature", lambda: check_signature(subject, policy.signature))
    return _judged(made, policy, source, level, tuple(files), today or datetime.date.today())


def _placed(finding: Finding, subject: Subject) -> Finding:
    """What an error said of its place, as the file of the release that it is about."""
    if "where" not in finding.data:
        return finding
    data = dict(finding.data)
    path = subject.path_of(str(data.pop("where")))
    if path is None:
        return replace(finding, data=data)
    return replace(finding, key=finding.key or path, data={"file": path, **data})


def _masked(finding: Finding) -> Finding:
    """The finding without the secrets that it quotes: reports go to logs and to other people."""
    return replace(
        finding,
        key=finding.key and without_secrets(finding.key),
        detail=without_secrets(finding.detail),
        hint=finding.hint and without_secrets(finding.hint),
    )


def _once(findings: list[Finding]) -> list[Finding]:
    """Without repetitions: two readers of one file say the same."""
    seen = {(one.code, one.key, one.detail): one for one in reversed(findings)}
    return list(reversed(seen.values()))


def _judged(
    made: list[Outcome],
    policy: Policy,
    source: Source | None,
    level: str,
    files: tuple[FileFact, ...],
    today: datetime.date,
) -> CheckResult:
    required = policy.required_checks(has_source=source is not None)
    if level == "headers":
        required -= frozenset(DATA_CHECKS)
    outcomes, waived, faults = apply_policy(policy, made, today)
    return CheckResult(
        outcomes=outcomes,
        required=required,
        waived=waived,
        policy_findings=(*faults, *required_findings(required, outcomes)),
        files=files,
        is_strict=policy.is_strict,
        level=level,
    )


def details_of(result: CheckResult, name: str) -> Any:
    """A field that one of the checks gave the report, or None."""
    return next(
        (one.details[name] for one in result.outcomes if name in one.details),
        None,
    )
