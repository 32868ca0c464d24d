"""Fold repeated keys for people, without loss.

The keys of the rows are the keys that went in, and only keys whose facts are equal share a row.

A row is a dotted pattern whose components are sets, written `{0-5,7}` or `{weight,bias}`; it means
every combination, and every combination is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

_MAX_WORDS = 6
# Names with more components are hostile, not repetitive; they are shown one by one.
_MAX_DEPTH = 64
_Component = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Keys that differ only in some components, and have the same facts.

    Attributes:
        components: the alternatives of each dotted component.
        facts: what all of the keys share.
    """

    components: tuple[_Component, ...]
    facts: Hashable

    @property
    def count(self) -> int:
        """How many keys it stands for."""
        total = 1
        for alternatives in self.components:
            total *= len(alternatives)
        return total

    def keys(self) -> list[str]:
        """The keys themselves."""
        return [".".join(parts) for parts in itertools.product(*self.components)]

    def pattern(self) -> str:
        """`layers.{0-5}.{weight,bias}`; braces of the key itself are escaped."""
        return ".".join(_render(alternatives) for alternatives in self.components)


def fold(entries: Iterable[tuple[str, Hashable]]) -> list[Row]:
    """Rows in the order in which their first key appears.

    >>> [row.pattern() for row in fold([("a.0.w", 1), ("a.1.w", 1), ("a.3.w", 1), ("b", 2)])]
    ['a.{0-1,3}.w', 'b']
    """
    rows = [Row(tuple((part,) for part in key.split(".")), facts) for key, facts in entries]
    if len(rows) < 2:
        return rows
    deepest = min(max(len(row.components) for row in rows), _MAX_DEPTH)
    for position in range(deepest):
        rows = _merge(rows, position, numbers=True)
    for position in reversed(range(deepest)):
        rows = _merge(rows, position, numbers=False)
    return rows


def _merge(rows: Sequence[Row], position: int, *, numbers: bool) -> list[Row]:
    """Merge rows that are equal except at `position`."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        parts = row.components
        fits = position < len(parts) <= _MAX_DEPTH and all(
            _is_number(text) if numbers else _is_word(text) for text in parts[position]
        )
        key: object = (
            (parts[:position], parts[position + 1 :], row.facts) if fits else (id(row), "alone")
        )
        groups.setdefault(key, []).append(row)
    merged: list[Row] = []
    for group in groups.values():
        if len(group) == 1:
            merged += group
            continue
        alternatives = [text for row in group for text in row.components[position]]
        if not numbers and len(alternatives) > _MAX_WORDS:
            merged += group
            continue
        if numbers:
            alternatives.sort(key=int)
        first = group[0]
        parts = first.components
        merged.append(
            Row((*parts[:position], tuple(alternatives), *parts[position + 1 :]), first.facts)
        )
    return merged


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")


def _is_word(text: str) -> bool:
    """Whether it can stand in a set of words without being taken for a number or a range."""
    return not text[:1].isdigit()


def _render(alternatives: _Component) -> str:
    if len(alternatives) == 1:
        return _literal(alternatives[0])
    if all(_is_number(text) for text in alternatives):
        return "{" + ",".join(_ranges([int(text) for text in alternatives])) + "}"
    return "{" + ",".join(_literal(text) for text in alternatives) + "}"


def _literal(text: str) -> str:
    for char in "\\{},":
        text = text.replace(char, "\\" + char)
    return text


def _ranges(numbers: list[int]) -> list[str]:
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found]
