"""Read the fields of a config with bounds, and say exactly which one is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

#: The largest value of each kind of size. Far beyond any real model, and small enough that a
#: hostile config cannot keep the constructor busy: building takes time for each layer.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 17
MAX_HEADS = 1 << 12
MAX_ROWS = 1 << 24
MAX_IMAGE = 1 << 14

_REQUIRED: Final = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping of a config with the place it stands at.

    Attributes:
        data: the mapping.
        path: its name in the config with a dot after it, empty for the config itself.
        where: the file, for messages.
    """

    data: Mapping[str, Any]
    path: str
    where: str

    def section(self, name: str) -> Fields:
        """A mapping inside; raises `CkptError` (FC401) where there is none."""
        value = self.data.get(name)
        if value is None:
            raise self.missing(name)
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "a mapping")
        return Fields(value, f"{self.path}{name}.", self.where)

    def integer(
        self, name: str, *, low: int = 1, high: int = MAX_WIDTH, default: object = _REQUIRED
    ) -> int:
        """A whole number in bounds; raises `CkptError` (FC401)."""
        value = self.data.get(name)
        if value is None:
            if default is _REQUIRED:
                raise self.missing(name)
            value = default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, value, "a whole number")
        if not low <= value <= high:
            raise self.wrong(name, value, f"a number from {low} to {high}")
        return value

    def optional(self, name: str, *, low: int = 1, high: int = MAX_WIDTH) -> int | None:
        """As `integer`, or None where the field is absent or null."""
        return None if self.data.get(name) is None else self.integer(name, low=low, high=high)

    def text(self, name: str) -> str | None:
        """A string, or None where the field is absent or null."""
        value = self.data.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def flag(self, name: str) -> bool | None:
        """True, false, or None where the field is absent or null."""
        value = self.data.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def missing(self, name: str) -> CkptError:
        """The error about a field that is not there."""
        return self.error(f"the config has no `{self.path}{name}`", "FC401")

    def wrong(self, name: str, value: object, wanted: str) -> CkptError:
        """The error about a field whose value cannot be used."""
        shown = escape(repr(value))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return self.error(f"`{self.path}{name}` is {shown}, not {wanted}", "FC401")

    def contradiction(self, message: str, hint: str | None = None) -> CkptError:
        """The error about two fields that cannot both be true."""
        return self.error(message, "FC408", hint)

    def error(self, message: str, code: str, hint: str | None = None) -> CkptError:
        """An error at this config."""
        return CkptError(message, code=code, where=self.where, hint=hint)

    def divisible(self, name: str, value: int, by_name: str, by: int) -> None:
        """Raise `CkptError` (FC408) unless `value` is a multiple of `by`."""
        if value % by:
            raise self.contradiction(
                f"`{self.path}{name}` is {value}, which `{self.path}{by_name}` ({by}) does not "
                "divide"
            )


def lookup(data: Mapping[str, Any], dotted: str) -> Any:
    """The value at `a.b.c`, or None where a step is missing.

    >>> lookup({"a": {"b": 1}}, "a.b")
    1
    """
    value: Any = data
    for step in dotted.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(step)
    return value
