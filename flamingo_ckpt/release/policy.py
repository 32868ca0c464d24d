"""What a release has to fulfil: read from a file of the user's, useful without one.

`flamingo-ckpt.toml`, or `[tool.flamingo-ckpt]` of a `pyproject.toml`, in the current folder. The
release's own folder is never asked: it would set its own standard.
"""

from __future__ import annotations

import datetime
import fnmatch
import hashlib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from flamingo_ckpt.codes import TABLE, UNWAIVABLE
from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.release.policy_table import Table, bad
from flamingo_ckpt.release.result import CHECKS, Outcome, Waived
from flamingo_ckpt.tensors import escape

FILE_NAME: Final = "flamingo-ckpt.toml"
#: What is required where nobody says otherwise; `bits` and `parity` besides where a source is
#: given.
DEFAULT_REQUIRED: Final = ("container", "keys", "values", "safety", "config", "card")
WITH_SOURCE: Final = ("bits", "parity")

_SEVERITIES = ("error", "warning", "info")
_MAX_BYTES = 1 << 20
_NORM_FACTOR = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """One exception: which findings, why, by whom, and until when (that day included)."""

    code: str
    key: str
    reason: str
    owner: str
    until: datetime.date

    def covers(self, finding: Finding) -> bool:
        """Whether a finding is one of those; a finding without key is met by its file, or `*`."""
        if finding.code != self.code:
            return False
        about = finding.key or str(finding.data.get("file", ""))
        return fnmatch.fnmatchcase(about, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is required and what is allowed.

    Attributes:
        source: the file, or None for the default.
        sha256: of the file.
        required: checks that have to run; None for the default ones.
        is_strict: whether warnings count as errors.
        severity: code -> severity, instead of the usual one.
        waivers: exceptions.
        licenses: identifiers that the card may name; empty for any.
        norm_factor: how far the size of a tensor may be from its like in the other layers.
        parity: `dtypes`, `gates`, `device`, `seed` for the parity check.
        signature: `public_key`, or `identity` and `identity_provider`.
    """

    source: str | None = None
    sha256: str | None = None
    required: frozenset[str] | None = None
    is_strict: bool = False
    severity: Mapping[str, str] = field(default_factory=dict)
    waivers: tuple[Waiver, ...] = ()
    licenses: tuple[str, ...] = ()
    norm_factor: float = _NORM_FACTOR
    parity: Mapping[str, Any] = field(default_factory=dict)
    signature: Mapping[str, str] = field(default_factory=dict)

    def required_checks(self, *, has_source: bool) -> frozenset[str]:
        """The checks that have to run."""
        if self.required is not None:
            return self.required
        return frozenset((*DEFAULT_REQUIRED, *(WITH_SOURCE if has_source else ())))

    def describe(self, *, has_source: bool) -> dict[str, Any]:
        """For the report."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "required": [
                one for one in CHECKS if one in self.required_checks(has_source=has_source)
            ],
            "strict": self.is_strict,
            "waivers": len(self.waivers),
        }


def find_policy(
    named: str | None, *, strict: bool = False, folder: str = ".", release: str | None = None
) -> Policy:
    """The policy that was named, else that of the folder, else the default.

    Args:
        named: a file.
        strict: whether warnings count as errors, whatever the policy says.
        folder: where one is looked for, unless it is the release or within it.
        release: what is checked.

    Raises:
        CkptError: FC620 where it cannot be used.
    """
    if named is not None:
        policy = read_policy(named)
    elif release is not None and _is_within(folder, release):
        policy = Policy()
    else:
        policy = _found_in(folder)
    return replace(policy, is_strict=True) if strict else policy


def _is_within(folder: str, release: str) -> bool:
    inside, around = os.path.realpath(folder), os.path.realpath(release)
    return os.path.isdir(around) and os.path.commonpath([inside, around]) == around


def _found_in(folder: str) -> Policy:
    own = os.path.join(folder, FILE_NAME)
    if os.path.isfile(own):
        return read_policy(own)
    project = os.path.join(folder, "pyproject.toml")
    if os.path.isfile(project) and _own_table(_load(project)[0]) is not None:
        return read_policy(project)
    return Policy()


def _own_table(project: Mapping[str, Any]) -> Any:
    """`[tool.flamingo-ckpt]` of a `pyproject.toml`, or None."""
    tools = project.get("tool")
    return tools.get("flamingo-ckpt") if isinstance(tools, dict) else None


def read_policy(path: str) -> Policy:
    """A policy from a file.

    Raises:
        CkptError: FC620, naming the field.
    """
    document, digest = _load(path)
    if os.path.basename(path) == "pyproject.toml":
        document = _own_table(document)
    try:
        if document is None:
            raise bad("it has no table `tool.flamingo-ckpt`")
        if not isinstance(document, dict):
            raise bad("`tool.flamingo-ckpt` is not a table")
        fields = Table(document, "", ("policy",)).table("policy", _FIELDS)
        policy = _parse(fields)
    except CkptError as error:
        raise error.at(path) from None
    return replace(policy, source=path, sha256=digest)


def _load(path: str) -> tuple[dict[str, Any], str]:
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CkptError(
            f"cannot read the policy: {error.strerror}", code="FC620", where=path
        ) from error
    if len(raw) > _MAX_BYTES:
        raise CkptError("the policy is larger than 1 MiB", code="FC620", where=path)
    try:
        document = tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CkptError(
            f"the policy is not TOML: {escape(str(error))[:200]}", code="FC620", where=path
        ) from error
    return document, hashlib.sha256(raw).hexdigest()


_FIELDS = (
    *("required", "strict", "severity", "waiver", "licenses", "tolerance", "parity", "signature"),
)


_PARITY_WORDS: Final = {
    "dtypes": ("float32", "float64", "bfloat16", "float16"),
    "gates": ("as-is", "forced"),
}
_SIGNERS: Final = ({"public_key"}, {"identity", "identity_provider"}, set[str]())


def _parse(table: Table) -> Policy:
    required = table.words("required", CHECKS)
    tolerance = table.table("tolerance", ("norm_factor",))
    parity = table.table("parity", ("dtypes", "gates", "device", "seed"))
    for name, among in _PARITY_WORDS.items():
        if parity.words(name, among) == ():
            raise bad(f"`policy.parity.{name}` is empty: nothing would be compared")
    if parity.value.get("device") not in (None, "cpu", "cuda"):
        raise bad("`policy.parity.device` is neither `cpu` nor `cuda`")
    if type(parity.value.get("seed", 0)) is not int:
        raise bad("`policy.parity.seed` is not a whole number")
    signature = table.table("signature", ("public_key", "identity", "identity_provider"))
    if set(signature.value) not in _SIGNERS:
        raise bad(
            "`policy.signature` has neither `public_key` alone nor both `identity` and "
            "`identity_provider`"
        )
    waivers = table.value.get("waiver", [])
    if not isinstance(waivers, list) or not all(isinstance(one, dict) for one in waivers):
        raise bad("`policy.waiver` is not a list of tables: write [[policy.waiver]]")
    return Policy(
        required=None if required is None else frozenset(required),
        is_strict=table.flag("strict"),
        severity=_severities(table),
        waivers=tuple(_waiver(one, at) for at, one in enumerate(waivers)),
        licenses=table.words("licenses") or (),
        norm_factor=tolerance.number("norm_factor", _NORM_FACTOR),
        parity=dict(parity.value),
        signature={name: signature.text(name) for name in signature.value},
    )


def _severities(table: Table) -> dict[str, str]:
    inner = table.value.get("severity", {})
    if not isinstance(inner, dict):
        raise bad("`policy.severity` is not a table")
    for code, severity in inner.items():
        _check_code(code, "policy.severity")
        if severity not in _SEVERITIES:
            raise bad(f"`policy.severity.{code}` is none of {', '.join(_SEVERITIES)}")
        if code in UNWAIVABLE and severity != "error":
            raise bad(f"`policy.severity.{code}`: {code} stays an error")
    return dict(inner)


def _waiver(value: Mapping[str, Any], at: int) -> Waiver:
    table = Table(value, f"policy.waiver[{at}]", ("code", "key", "reason", "owner", "until"))
    code = table.text("code")
    _check_code(code, table.path)
    if code in UNWAIVABLE:
        raise bad(f"`{table.path}`: {code} ({TABLE[code].title}) cannot be waived")
    return Waiver(
        code=code,
        key=table.text("key"),
        reason=table.text("reason"),
        owner=table.text("owner"),
        until=table.day("until"),
    )


def _check_code(code: str, path: str) -> None:
    if code not in TABLE:
        raise bad(f"`{escape(path)}` names `{escape(code)}`, which is no code of a finding")


def apply_policy(
    policy: Policy, outcomes: Sequence[Outcome], today: datetime.date
) -> tuple[tuple[Outcome, ...], tuple[Waived, ...], tuple[Finding, ...]]:
    """(outcomes with the policy's severities and without what is waived, that, faults of waivers).

    An expired waiver lets nothing pass, and is an error of its own.
    """
    current = [one for one in policy.waivers if one.until >= today]
    used: set[int] = set()
    waived: list[Waived] = []
    kept: list[Outcome] = []
    for outcome in outcomes:
        findings = []
        for finding in outcome.findings:
            severity = policy.severity.get(finding.code, finding.severity)
            finding = replace(finding, severity=severity)
            waiver = next((one for one in current if one.covers(finding)), None)
            if waiver is None or severity == "info":
                findings.append(finding)
                continue
            used.add(id(waiver))
            waived.append(
                Waived(
                    finding=finding,
                    check=outcome.name,
                    reason=waiver.reason,
                    owner=waiver.owner,
                    until=waiver.until.isoformat(),
                )
            )
        count = sum(one.check == outcome.name for one in waived)
        sentence = outcome.sentence + (f" ({count} waived)" if count else "")
        kept.append(replace(outcome, sentence=sentence, findings=tuple(findings)))
    faults = [_expired(one) for one in policy.waivers if one.until < today]
    faults += [_idle(one) for one in current if id(one) not in used]
    faults = [replace(one, severity=policy.severity.get(one.code, one.severity)) for one in faults]
    return tuple(kept), tuple(waived), tuple(faults)


def _expired(waiver: Waiver) -> Finding:
    return Finding(
        code="FC621",
        severity="error",
        key=f"{waiver.code} {waiver.key}",
        detail=f"the waiver of {waiver.code} for `{escape(waiver.key)}` ended on "
        f"{waiver.until.isoformat()}: {escape(waiver.reason)}",
        hint=f"mend what it was for, or have {escape(waiver.owner)} set another day",
    )


def _idle(waiver: Waiver) -> Finding:
    return Finding(
        code="FC622",
        severity="warning",
        key=f"{waiver.code} {waiver.key}",
        detail=f"the waiver of {waiver.code} for `{escape(waiver.key)}` meets nothing that was "
        "found",
        hint="remove it from the policy, or mend its key",
    )


def required_findings(required: frozenset[str], outcomes: Sequence[Outcome]) -> list[Finding]:
    """FC623 for each required check that did not run."""
    return [
        Finding(
            code="FC623",
            severity="warning",
            key=one.name,
            detail=f"the check `{one.name}` is required and did not run: {one.sentence}",
            hint="make it possible, or leave it out of `required` in the policy",
            data={"check": one.name},
        )
        for one in outcomes
        if one.status == "skip" and one.name in required
    ]
