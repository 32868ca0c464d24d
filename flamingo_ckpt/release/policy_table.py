"""A table of a policy file, of which nothing is understood in part."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape


class Table:
    """A table of the file, whose fields are asked for by name and type; unknown ones are errors."""

    def __init__(self, value: Mapping[str, Any], path: str, known: Sequence[str]) -> None:
        self.value, self.path = value, path
        unknown = [name for name in value if name not in known]
        if unknown:
            raise bad(f"`{self._at(unknown[0])}` is not known; known: {', '.join(known)}")

    def _at(self, name: str) -> str:
        return escape(f"{self.path}.{name}".lstrip("."))

    def table(self, name: str, known: Sequence[str]) -> Table:
        """A table within, empty where it is not there."""
        value = self.value.get(name, {})
        if not isinstance(value, dict):
            raise bad(f"`{self._at(name)}` is not a table")
        return Table(value, self._at(name), known)

    def words(self, name: str, among: Sequence[str] = ()) -> tuple[str, ...] | None:
        """A list of words, or None."""
        value = self.value.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise bad(f"`{self._at(name)}` is not a list of words")
        wrong = [one for one in value if among and one not in among]
        if wrong:
            raise bad(f"`{self._at(name)}` has `{escape(wrong[0])}`; known: {', '.join(among)}")
        return tuple(value)

    def flag(self, name: str) -> bool:
        """Whether it is true; false where it is not there."""
        value = self.value.get(name, False)
        if not isinstance(value, bool):
            raise bad(f"`{self._at(name)}` is neither true nor false")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 1."""
        value = self.value.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value < 1e9:
            raise bad(f"`{self._at(name)}` is not a number above 1")
        return float(value)

    def text(self, name: str) -> str:
        """Words that are not empty."""
        value = self.value.get(name)
        if not isinstance(value, str) or not value.strip():
            raise bad(f"`{self._at(name)}` is missing, or no text")
        return value

    def day(self, name: str) -> datetime.date:
        """A date, written bare or in quotes."""
        value = self.value.get(name)
        if isinstance(value, str):
            try:
                value = datetime.date.fromisoformat(value)
            except ValueError:
                value = None
        if isinstance(value, datetime.datetime) or not isinstance(value, datetime.date):
            raise bad(f"`{self._at(name)}` is missing, or no date like 2027-01-31")
        return value


def bad(message: str) -> CkptError:
    """FC620 with a sentence."""
    return CkptError(
        message,
        code="FC620",
        hint="the README lists what a policy can say; `flamingo-ckpt explain` lists the codes",
    )
