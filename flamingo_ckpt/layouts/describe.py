"""Layouts as rows for people and machines: rules with an example key each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flamingo_ckpt.layouts.families import FAMILIES
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Match, Rule, Table

_CAPTURE = re.compile(r"\{[a-z]+(?::([^{}]*))?\}")
#: What numbers are in example keys.
_EXAMPLE_NUMBER = "3"


def layout_row(layout: Layout) -> dict[str, Any]:
    """One line of the list: what it is, and what it cannot do."""
    return {
        "name": layout.name,
        "title": layout.title,
        "space": layout.space,
        "lossy": layout.lossy or None,
        "read_only": layout.read_only or None,
        "refused": layout.refused or None,
        "language_models": [name for name in layout.families if name],
    }


def rule_rows(layout: Layout) -> list[dict[str, Any]]:
    """Every rule once, with the language models that have it."""
    families: dict[Rule, list[str]] = {}
    for family in layout.families:
        for rule in layout.table(family).rules:
            families.setdefault(rule, []).append(family)
    tables: Mapping[str, Table] = {name: layout.table(name) for name in layout.families}
    return [
        {
            "key": rule.native,
            "canonical": rule.canonical or None,
            "transform": rule.kind,
            "axes": rule.axes or None,
            "mode": rule.mode,
            "reason": rule.drop or rule.loss or None,
            "language_models": names if layout.rules_of and len(names) < len(FAMILIES) else [],
            "example": example_key(rule.native),
            "becomes": _becomes(tables[names[0]].match(example_key(rule.native))),
        }
        for rule, names in families.items()
    ]


def example_key(pattern: str) -> str:
    """A key that a pattern fits: the first word of every choice, and a number for every number.

    >>> example_key("blocks.{layer}.norm{n:1|2}.{p:weight|bias}")
    'blocks.3.norm1.weight'
    """
    return _CAPTURE.sub(
        lambda match: match[1].split("|")[0].split("=")[0] if match[1] else _EXAMPLE_NUMBER, pattern
    )


def _becomes(match: Match | None) -> list[str]:
    """The canonical names in an example key; of a stack, those of its first layer."""
    if match is None or not match.rule.canonical:
        return []
    index = match.arrangement.index if match.arrangement else ()
    parts = range(len(match.parts)) if "part" in index else (0,)
    return [
        match.canonical({name: part if name == "part" else 0 for name in index}) for part in parts
    ]
