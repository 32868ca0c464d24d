"""One row of the table of findings, and the themes that the rows are sorted by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """What a code is about, for people.

    Attributes:
        code: `FC` and three digits; stable across releases.
        severity: the one that it usually has: `error`, `warning` or `info`.
        title: a few words, no two codes share them.
        meaning: what was seen and why it matters; paragraphs, separated by an empty line.
        hint: what to do about it; a finding's own hint is more exact.
    """

    code: str
    severity: str
    title: str
    meaning: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Codes that are about one thing.

    Attributes:
        name: a word, for scripts.
        title: the heading above its codes.
        of_check: whether `check` can find them, so that a policy can waive them.
        codes: its rows, in the order of the codes.
    """

    name: str
    title: str
    of_check: bool
    codes: tuple[Code, ...]
