"""The table as a document: `docs/findings.md`, and what a waiver of a finding looks like."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from flamingo_ckpt.codes import THEME_OF, THEMES, UNWAIVABLE, is_of_check
from flamingo_ckpt.codes.code import Code, Theme

_WIDTH = 100
#: The fields that a waiver has, to be filled in; `YYYY-MM-DD` is refused until it is a day.
_WAIVER = """\
[[policy.waiver]]
code = "{code}"
key = "KEY"             # as the finding has it: a tensor, a file; * and ? stand for more
reason = "REASON"
owner = "OWNER"
until = "YYYY-MM-DD"    # the last day that it holds
"""
_HEAD = """\
# Findings

Every error and every finding has a code, which stays the same across releases. This is the page of
each, as `flamingo-ckpt explain CODE` prints it. It is made from the table in
`flamingo_ckpt/codes/`, by `python -m flamingo_ckpt.codes > docs/findings.md`; edit it there.

The severity is the one that a code usually has. An error is a bad answer, or none; a warning asks
to be looked at; a note (`info`) is there so that nothing happens unseen.

What `check` finds can be waived in the policy (`flamingo-ckpt.toml`), one code at a time, by
somebody, for a reason, until a day:

```toml
{waiver}```

In a `pyproject.toml` the table is `[[tool.flamingo-ckpt.policy.waiver]]`. Each page says whether
the finding can be waived. Notes need no waiver.
"""
_USUALLY = {"error": "an error", "warning": "a warning", "info": "a note"}


def usually(code: Code) -> str:
    """`an error`, `a warning` or `a note`."""
    return _USUALLY[code.severity]


def waiver_of(code: Code) -> str | None:
    """The TOML of a waiver, to be filled in; None where it cannot be waived or need not be."""
    if code.code in UNWAIVABLE or not is_of_check(code.code):
        return None
    return _WAIVER.format(code=code.code)


def row(code: Code) -> dict[str, str | bool | None]:
    """A code as `explain` reports it."""
    return {
        "code": code.code,
        "severity": code.severity,
        "title": code.title,
        "theme": THEME_OF[code.code].title,
        "meaning": code.meaning,
        "hint": code.hint,
        "of_check": is_of_check(code.code),
        "waiver": waiver_of(code),
    }


def to_markdown() -> str:
    """All pages, by theme."""
    lines = [_HEAD.format(waiver=_WAIVER.format(code="FC204"))]
    for theme in THEMES:
        if theme.codes:
            lines += _theme(theme)
    return "\n".join(lines).rstrip() + "\n"


def _theme(theme: Theme) -> Iterator[str]:
    yield f"## {theme.title}\n"
    yield "| code | usually | |"
    yield "| --- | --- | --- |"
    for code in theme.codes:
        yield f"| [{code.code}](#{code.code.lower()}) | {usually(code)} | {code.title} |"
    yield ""
    for code in theme.codes:
        yield from _page(code)


def _page(code: Code) -> Iterator[str]:
    yield f'### <a id="{code.code.lower()}"></a>{code.code}: {code.title}\n'
    yield f"Usually {usually(code)}.{_waivable(code)}\n"
    for paragraph in (*code.meaning.split("\n\n"), f"**What to do:** {code.hint}"):
        yield wrap(paragraph, _WIDTH) + "\n"


def _waivable(code: Code) -> str:
    if code.code in UNWAIVABLE:
        return " It cannot be waived."
    return " It can be waived." if is_of_check(code.code) else ""


def wrap(text: str, width: int) -> str:
    """Lines of at most `width`, broken between words only."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
