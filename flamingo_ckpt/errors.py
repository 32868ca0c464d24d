"""The one exception root, the table of finding codes, and the finding itself.

Every message that a user can meet carries a stable code from `CODES`. An error stops the verb; a
finding is part of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flamingo_ckpt.codes import TABLE

#: What each code is about: code -> title. Codes are stable across releases.
CODES: MappingProxyType[str, str] = MappingProxyType(
    {code: row.title for code, row in TABLE.items()}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One statement about one key (or about the whole input, when `key` is None)."""

    code: str
    severity: str  # "error", "warning" or "info"
    detail: str
    key: str | None = None
    hint: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the code is about."""
        return CODES[self.code]


class CkptError(Exception):
    """The root of everything this package raises on purpose.

    Args:
        message: one sentence, lower case, naming the value that is wrong.
        code: a key of `CODES`.
        where: the file, and the place in it.
        hint: the next command or edit.
        key: the tensor or entry at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        where: str | None = None,
        hint: str | None = None,
        key: str | None = None,
    ) -> None:
        if code not in CODES:
            raise ValueError(f"unknown finding code {code}")
        super().__init__(message)
        self.message = message
        self.code = code
        self.where = where
        self.hint = hint
        self.key = key

    def at(self, where: str) -> CkptError:
        """Name the place, unless it is known already; returns self, to be raised again."""
        if self.where is None:
            self.where = where
        return self

    def as_finding(self) -> Finding:
        """The same statement as a finding of severity `error`."""
        return Finding(
            code=self.code, severity="error", detail=self.message, key=self.key, hint=self.hint
        )


class FormatError(CkptError):
    """The bytes are not what the format asks for."""


class UnsafeError(CkptError):
    """The file names something that could run code, or reaches outside its folder."""


class LoadError(CkptError, RuntimeError):
    """A checkpoint does not fit a module. Nothing of the module was changed.

    Args:
        message: as of every error; several lines.
        report: a `LoadReport`: every key that is missing, unexpected or of another shape.
        code, where, hint, key: as of every error.
    """

    def __init__(
        self,
        message: str,
        *,
        report: Any = None,
        code: str,
        where: str | None = None,
        hint: str | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(message, code=code, where=where, hint=hint, key=key)
        self.report = report


class WriteError(CkptError):
    """The destination could not be written; nothing that looks complete was left."""


class NotFaithfulError(CkptError):
    """What was written differs from the source: a bad answer. Nothing was put in place."""


def name_some(names: list[str], limit: int = 10, *, where: str = ", see --json") -> str:
    """Up to `limit` names in backticks, then how many more there are, and `where` they are.

    >>> name_some(["a", "b", "c"], 2, where="")
    '`a`, `b` and 1 more'
    """
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    more = len(names) - limit
    return shown if more <= 0 else f"{shown} and {more} more{where}"
