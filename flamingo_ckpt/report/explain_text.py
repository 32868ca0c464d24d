"""The page of a finding, or the list of all of them, as text."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from flamingo_ckpt.report.document import Report

#: Columns where the answer does not go to a terminal.
_WIDTH = 100
_NARROWEST = 40
_WORDS = {"error": "error", "warning": "warning", "info": "note"}


def render_explain(report: Report, *, verbose: bool = False) -> list[str]:
    """One page; or one line a code, below the headings of their themes; or with `-v` all pages."""
    width = max(shutil.get_terminal_size((_WIDTH, 24)).columns, _NARROWEST)
    codes = report.extra["codes"]
    if codes and "code" in report.summary:
        return list(_page(codes[0], width))
    if verbose:
        return [line for one in codes for line in (*_page(one, width), "")]
    lines = [line for theme, rows in groupby(codes, _theme) for line in _list(theme, rows)]
    return [*lines, f"{len(codes)} codes; `explain CODE` prints the page of one, -v all pages."]


def _theme(one: Mapping[str, Any]) -> str:
    return str(one["theme"])


def _list(theme: str, codes: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield theme
    for one in codes:
        yield f"  {one['code']}  {_word(one):<8} {one['title']}"
    yield ""


def _page(one: Mapping[str, Any], width: int) -> Iterator[str]:
    word = _word(one)
    yield f"{word} {one['code']}  {one['title']}"
    article = "an" if word == "error" else "a"
    yield from _wrapped(f"{one['theme']}; usually {article} {word}", width)
    for paragraph in one["meaning"].split("\n\n"):
        yield ""
        yield from _wrapped(paragraph, width)
    yield ""
    yield from _wrapped(f"hint: {one['hint']}", width)
    if not one["of_check"]:
        return
    yield ""
    if one["waiver"] is None:
        yield "No policy can waive it."
        return
    what = "it" if word != "note" else "it where it is more than a note,"
    yield f"To waive {what} in the policy of `check` (flamingo-ckpt.toml):"
    yield ""
    yield from ("  " + line for line in one["waiver"].splitlines())


def _word(one: Mapping[str, Any]) -> str:
    return _WORDS.get(one["severity"], "note")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
