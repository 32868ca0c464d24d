"""The one exception root, the table of finding codes, and the finding itself.

Every message that a user can meet carries a stable code from `CODES`. An error stops the verb; a
finding is part of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

#: What each code is about: code -> title. Codes are stable across releases.
CODES: MappingProxyType[str, str] = MappingProxyType(
    {
        "FC001": "unknown format",
        "FC002": "cannot read the source",
        "FC003": "destination exists",
        "FC004": "cannot write the destination",
        "FC005": "destination is the source",
        "FC006": "options contradict each other",
        "FC007": "source changed while it was read",
        "FC008": "internal error",
        "FC010": "interrupted",
        "FC101": "malformed header",
        "FC102": "truncated",
        "FC103": "byte ranges overlap, leave holes or point outside",
        "FC104": "duplicate entry",
        "FC105": "checksum mismatch",
        "FC106": "malformed archive",
        "FC107": "index and shards disagree",
        "FC109": "compressed data expands too far",
        "FC110": "malformed pickle",
        "FC111": "limit exceeded",
        "FC112": "unsupported container",
        "FC113": "records that nothing refers to",
        "FC114": "checksum absent",
        "FC201": "no tensors",
        "FC202": "two sources for one name",
        "FC203": "missing tensor",
        "FC204": "unexpected tensor",
        "FC205": "shape differs",
        "FC206": "dtype differs",
        "FC207": "ambiguous weights",
        "FC208": "flat parameters",
        "FC209": "left out",
        "FC210": "tied tensors",
        "FC211": "views materialised",
        "FC212": "prefix on some names only",
        "FC213": "pattern fits no name",
        "FC214": "renamed",
        "FC215": "absent by design",
        "FC216": "resizable",
        "FC217": "wrong interval of gated cross-attention",
        "FC218": "moved content",
        "FC301": "bits differ",
        "FC302": "inexact cast",
        "FC303": "overflow to infinity in a cast",
        "FC304": "NaN lost in a cast",
        "FC305": "dtype not representable",
        "FC306": "unsupported tensor kind",
        "FC307": "view expands its storage",
        "FC308": "non-canonical BOOL bytes",
        "FC410": "unknown layout",
        "FC411": "no layout fits",
        "FC412": "ambiguous layout",
        "FC413": "key without a rule",
        "FC414": "no place in the target layout",
        "FC415": "tensor does not fit its layout",
        "FC416": "layouts are not interchangeable",
        "FC417": "half one layout, half another",
        "FC418": "vocabulary rows",
        "FC419": "padding rows are not zero",
        "FC420": "base does not fit",
        "FC421": "partial model",
        "FC422": "already in the target layout",
        "FC401": "invalid model config",
        "FC402": "hidden behind closed gates",
        "FC403": "unknown kind of model",
        "FC404": "no such model",
        "FC405": "model cannot be constructed",
        "FC406": "gated layers fit no interval",
        "FC407": "setting differs",
        "FC408": "config contradicts itself",
        "FC450": "nothing at that place",
        "FC451": "no tower that gives patch tokens",
        "FC452": "no such pretrained weights",
        "FC453": "no decoder layers at that path",
        "FC454": "tokenizer cannot be read",
        "FC455": "no such interval of gated cross-attention",
        "FC470": "no such repository",
        "FC471": "no such file or revision on the hub",
        "FC472": "gated repository",
        "FC473": "offline and not in the cache",
        "FC474": "the hub cannot be reached",
        "FC475": "invalid name on the hub",
        "FC430": "checkpoint does not fit the model",
        "FC431": "next to nothing matched",
        "FC432": "another language model",
        "FC433": "left on the meta device",
        "FC434": "not loaded on purpose",
        "FC435": "filled with zeros",
        "FC436": "cast to the model's dtype",
        "FC437": "integers for floating-point weights",
        "FC438": "hooks of the model's own that are not run",
        "FC440": "grid of positions unknown",
        "FC441": "width of positions differs",
        "FC442": "class row on one side only",
        "FC443": "text positions",
        "FC444": "grid does not fit the source",
        "FC445": "not a table of positions",
        "FC446": "positions resized",
        "FC460": "value that no checkpoint holds",
        "FC461": "parallel wrapper",
        "FC462": "nothing to save",
        "FC463": "training state does not fit",
        "FC464": "training step cannot be made",
        "FC465": "another process failed",
        "FC456": "tokenizer does not serve",
        "FC457": "head and embedding: config and file disagree",
        "FC458": "several dtypes",
        "FC459": "adapters or quantised weights",
        "FC466": "accelerate is not installed",
        "FC467": "weights could only be unpickled",
        "FC468": "no token for images is known",
        "FC469": "a head of its own, and a config that ties it",
        "FC480": "diverges",
        "FC481": "not deterministic",
        "FC482": "required run not made",
        "FC483": "to blame",
        "FC484": "inputs do not serve",
        "FC485": "not seen by this check",
        "FC486": "continuations differ",
        "FC487": "not a number",
        "FC488": "not explained",
        "FC489": "does not fit into the memory that is allowed",
        "FC501": "pickle names code that could run",
        "FC502": "tensor depends on an unknown class",
        "FC503": "path leaves the folder",
        "FC504": "files left behind",
        "FC505": "control characters in a name",
        "FC506": "unknown classes beside the weights",
    }
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
