"""What a load did, or why it was refused: every key of both sides, grouped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.loading.resize import Resized
from flamingo_ckpt.report.fold import fold
from flamingo_ckpt.tensors import escape

_MAX_ROWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Every key of a checkpoint and of a module, with what became of it.

    Attributes:
        uri: the checkpoint, as it was named.
        model: the module's class.
        format: of the checkpoint.
        layout: of the checkpoint's names; None where they show none or are the module's own.
        model_layout: of the module's names, likewise.
        num_loaded: tensors of the module that were filled; a tied one counts once.
        num_bytes: of the checkpoint that went into them.
        num_mapped: of the tensors, those whose bytes stay in the file until they are touched.
        cast: module key -> (dtype in the file, dtype in the module).
        resized: tables of positions that were brought to another size.
        missing_keys: of the module, that the checkpoint has nothing for and that keep what they
            had.
        unexpected_keys: of the checkpoint, that the module has no place for.
        mismatched: module key -> (shape in the file, shape in the module); only in a refusal.
        left_on_meta: module keys that would have no bytes; only in a refusal.
        absent_by_design: module key -> the base that supplies it.
        kept: module key that the checkpoint need not have and lacks -> why it keeps what it has.
        aliases: key of the checkpoint -> the key that holds the same tensor.
        ignored: key of the checkpoint -> why it may be left out.
        zero_filled: module keys that became zero -> why.
        findings: what the user should know.
    """

    uri: str
    model: str
    format: str
    layout: str | None = None
    model_layout: str | None = None
    num_loaded: int = 0
    num_bytes: int = 0
    num_mapped: int = 0
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    resized: tuple[Resized, ...] = ()
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    left_on_meta: tuple[str, ...] = ()
    absent_by_design: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    zero_filled: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.num_loaded} tensors ({self.num_bytes} bytes) of {self.uri} in {self.model}"
        ]
        if self.layout != self.model_layout:
            lines[0] += f", {self.layout or 'no known layout'} as {self.model_layout or 'named'}"
        lines += [f"  {finding.detail}" for finding in self.findings]
        return "\n".join((*lines, *self.problems()))

    def problems(self) -> list[str]:
        """Lines that tell what does not fit, repeated layers folded; none where all is well."""
        shapes = (
            (key, f": {_shape(a)} in the file, {_shape(b)} in the model")
            for key, (a, b) in self.mismatched.items()
        )
        lines = _group("of another shape", shapes)
        lines += _group("missing from the file", _plain(self.missing_keys))
        lines += _group("unexpected in the file", _plain(self.unexpected_keys))
        lines += _group("left without bytes (on meta)", _plain(self.left_on_meta))
        return lines


class _Keys(NamedTuple):
    missing_keys: list[str]
    unexpected_keys: list[str]


class IncompatibleKeys(_Keys):
    """What `load_state_dict` returns: `(missing_keys, unexpected_keys)`, printed as torch does.

    Attributes:
        report: all that is known of the load.
    """

    report: LoadReport

    def __new__(
        cls, missing_keys: Iterable[str], unexpected_keys: Iterable[str], report: LoadReport
    ) -> IncompatibleKeys:
        """Two lists, and the report beside them."""
        self = super().__new__(cls, [*missing_keys], [*unexpected_keys])
        self.report = report
        return self

    def __getnewargs__(self) -> Any:
        return (*self, self.report)

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return super().__repr__()

    __str__ = __repr__


def _plain(keys: Iterable[str]) -> Iterable[tuple[str, str]]:
    return ((key, "") for key in keys)


def _group(title: str, entries: Iterable[tuple[str, str]]) -> list[str]:
    """A heading with the number of keys, then rows of folded keys."""
    rows = fold((escape(key), told) for key, told in entries)
    if not rows:
        return []
    count = sum(row.count for row in rows)
    shown = [f"    {row.pattern()}{row.facts}" for row in rows[:_MAX_ROWS]]
    if len(rows) > _MAX_ROWS:
        left = sum(row.count for row in rows[_MAX_ROWS:])
        shown.append(f"    and {left} more, see the report")
    return [f"  {count} {title}:", *shown]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"
