"""A diff as text: what explains most comes first, keys are folded, and the verdict is last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.report.fold import fold
from flamingo_ckpt.report.words import sentence
from flamingo_ckpt.tensors import escape

_MAX_ROWS = 12
#: Codes in the order in which they are told, with a word for each.
_WORDS: Mapping[str, str] = {
    "FC416": "other models",
    "FC417": "two layouts",
    "FC407": "setting",
    "FC217": "interval",
    "FC202": "two values",
    "FC216": "resizable",
    "FC205": "shape",
    "FC206": "dtype",
    "FC218": "moved",
    "FC301": "bits",
    "FC214": "renamed?",
    "FC203": "missing",
    "FC204": "unexpected",
}
#: Where the heading of a group says what the detail of each key says.
_SAID_ABOVE = ("FC203", "FC204")
_FLAGS = {"vision": "--base-vision", "language": "--base-language"}


def render_diff(report: Report, *, verbose: bool = False) -> list[str]:
    """What differs by kind, what does not matter, then the verdict with the counts."""
    lines = [""]
    errors = [one for one in report.findings if one.severity == "error"]
    codes = dict.fromkeys(one.code for one in errors)
    for code in sorted(codes, key=_rank):
        lines += _group("error", [one for one in errors if one.code == code], verbose)
    lines += _absent(report.findings, verbose)
    for severity, word in (("warning", "warning"), ("info", "note")):
        rest = [one for one in report.findings if one.severity == severity and one.code != "FC215"]
        for code in dict.fromkeys(one.code for one in rest):
            lines += _group(word, [one for one in rest if one.code == code], verbose)
    return [*lines, sentence(report)]


def _rank(code: str) -> int:
    known = list(_WORDS)
    return known.index(code) if code in known else len(known)


def _absent(findings: Iterable[Finding], verbose: bool) -> list[str]:
    lines: list[str] = []
    absent = [one for one in findings if one.code == "FC215"]
    for base in dict.fromkeys(str(one.data.get("base")) for one in absent):
        keys = [one for one in absent if str(one.data.get("base")) == base]
        lines.append(
            f"absent by design: {_keys(len(keys))} of the {escape(base)} base"
            + (f" (convert {_FLAGS[base]} supplies them)" if base in _FLAGS else "")
        )
        if verbose:
            lines += _rows([(one.key or "", "") for one in keys], verbose)
    return lines


def _group(word: str, group: Sequence[Finding], verbose: bool) -> list[str]:
    """One finding in full, several as a heading with folded keys; each hint once."""
    code = group[0].code
    named = f"{word} {code}  {_WORDS.get(code, group[0].title)}"
    facts = [(one.key or "", _facts(one, verbose)) for one in group]
    if len(group) == 1 or any(fact is None for _, fact in facts):
        shown = group if verbose else group[:_MAX_ROWS]
        lines = [f"{named}: {one.detail}" for one in shown]
        if len(group) > len(shown):
            lines.append(f"  and {len(group) - len(shown)} more, see -v or --json")
    else:
        told = [(key, fact or "") for key, fact in facts]
        lines = [f"{named}: {_keys(len({key for key, _ in told}))}", *_rows(told, verbose)]
    hints = list(dict.fromkeys(one.hint for one in group if one.hint))
    lines += [f"  hint: {hint}" for hint in (hints if verbose else hints[:3])]
    if len(hints) > 3 and not verbose:
        lines.append(f"  and {len(hints) - 3} more hints, see -v or --json")
    return lines


def _keys(number: int) -> str:
    return f"{number} key" + ("" if number == 1 else "s")


def _rows(entries: Sequence[tuple[str, str]], verbose: bool) -> list[str]:
    rows = fold(entries)
    shown = rows if verbose else rows[:_MAX_ROWS]
    lines = [
        f"  {escape(row.pattern())}"
        + (f"  x{row.count}" if row.count > 1 else "")
        + (f"  {row.facts}" if row.facts else "")
        for row in shown
    ]
    if len(rows) > len(shown):
        more = sum(row.count for row in rows[len(shown) :])
        lines.append(f"  and {more} more, see -v or --json")
    return lines


def _facts(finding: Finding, verbose: bool) -> str | None:
    """What the detail says behind the key; None where it does not begin with the key."""
    start = f"`{escape(finding.key or '')}`"
    if not finding.key or not finding.detail.startswith(start):
        return None
    told = finding.detail[len(start) :].lstrip(": ")
    tensor, _, why = told.partition(": ")
    if finding.code not in _SAID_ABOVE or verbose:
        return told
    # the heading says that it is missing; what is left is the tensor, and why if it is no rename
    tensor = tensor.partition(")")[0] + ")"
    return tensor if not why or why.startswith("it would be ") else f"{tensor}: {why}"
