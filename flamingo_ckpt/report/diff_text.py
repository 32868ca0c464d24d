"""A diff as text: folded, short, and with the verdict last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.fold import fold
from flamingo_ckpt.tensors import escape

_MAX_ROWS = 12
_WORDS: Mapping[str, str] = {
    "FC203": "missing",
    "FC204": "unexpected",
    "FC205": "shape",
    "FC206": "dtype",
    "FC214": "renamed?",
    "FC215": "absent",
    "FC216": "resizable",
    "FC217": "interval",
    "FC218": "moved",
    "FC202": "twins",
    "FC301": "bits",
    "FC209": "left out",
}
#: Findings whose keys say all there is to say; the others are told in full.
_KEYS_ONLY = ("FC203", "FC204", "FC215")


def render_diff(report: Report, *, verbose: bool) -> list[str]:
    """Counts, then what differs by kind, then the verdict."""
    summary = report.summary
    lines = [""]
    errors = [one for one in report.findings if one.severity == "error"]
    for code in dict.fromkeys(one.code for one in errors):
        group = [one for one in errors if one.code == code]
        lines += _group(code, group, verbose)
    absent = [one for one in report.findings if one.code == "FC215"]
    for base in dict.fromkeys(one.data["base"] for one in absent):
        keys = [one for one in absent if one.data["base"] == base]
        lines.append(f"absent by design: {len(keys)} keys that the {base} base supplies")
        if verbose:
            lines += _folded(keys, verbose)
    lines += [
        f"note {one.code}  {one.detail}"
        for one in report.findings
        if one.severity == "info" and one.code != "FC215"
    ][: None if verbose else _MAX_ROWS]
    lines += [
        f"warning {one.code}  {one.detail}" for one in report.findings if one.severity == "warning"
    ]
    counts = ", ".join(
        f"{number} {name.replace('_', ' ')}" for name, number in summary.items() if number
    )
    compared = {"keys": "names", "headers": "names, dtypes and shapes", "bits": "bits"}
    told = compared[report.extra["level"]]
    lines.append(
        f"same: {counts} (compared: {told})"
        if report.verdict == "pass"
        else f"differs: {counts} (compared: {told})"
    )
    return lines


def _group(code: str, group: Sequence[Finding], verbose: bool) -> list[str]:
    word = _WORDS.get(code, code)
    if code in _KEYS_ONLY:
        return [f"error {code}  {word}: {len(group)}", *_folded(group, verbose)]
    shown = group if verbose else group[:_MAX_ROWS]
    lines: list[str] = []
    for one in shown:
        lines.append(f"error {code}  {word}: {one.detail}")
        if one.hint:
            lines.append(f"  hint: {one.hint}")
    if len(group) > len(shown):
        lines.append(f"  and {len(group) - len(shown)} more, see -v or --json")
    return lines


def _folded(group: Iterable[Finding], verbose: bool) -> list[str]:
    rows = fold([(one.key or "", _after_key(one)) for one in group])
    shown = rows if verbose else rows[:_MAX_ROWS]
    lines = [
        f"  {escape(row.pattern())}"
        + (f"  x{row.count}" if row.count > 1 else "")
        + f"  {row.facts}"
        for row in shown
    ]
    if len(rows) > len(shown):
        more = sum(row.count for row in rows[len(shown) :])
        lines.append(f"  and {more} more, see -v or --json")
    return lines


def _after_key(finding: Finding) -> str:
    """What the detail says behind the key: `(F32 64x1024)`."""
    _, found, rest = finding.detail.partition("` (")
    return "(" + rest.split(")")[0] + ")" if found else ""
