"""What differs between two checkpoints, or between a checkpoint and a model.

Both sides are named alike first: where both have a layout, A is carried into B's. Then every key
is the same, changed, missing, unexpected, probably renamed, or absent by design.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.likeness import Pair, find_renamed
from flamingo_ckpt.sides import Entry, Side, View, views
from flamingo_ckpt.tensors import escape, format_shape

#: What is compared: names; also dtype and shape; also the bits.
LEVELS = ("keys", "headers", "bits")
#: Canonical name -> what its rows are: tensors that a loader can resize.
RESIZABLE: Mapping[str, str] = {
    "vision.position_embedding.weight": "position embedding",
    "text.position_embedding.weight": "position embedding",
    "lm.embed_positions.weight": "position embedding",
    "lm.embed_tokens.weight": "vocabulary",
    "lm.head.weight": "vocabulary",
    "lm.head.bias": "vocabulary",
    "text.token_embedding.weight": "vocabulary",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResult:
    """Every key with what became of it; keys as stored in the file that holds them.

    Attributes:
        same: names that both sides have alike, in B's words.
        changed: of another shape, dtype or content.
        renamed: pairs (A's key, B's key) that are probably one tensor.
        missing: B has it and A lacks it.
        unexpected: A has it and B does not.
        expected_absent: absent by design -> the base that supplies it.
        level: that was compared at.
        a, b: the two sides.
        findings: one per key that is not the same.
    """

    same: tuple[str, ...]
    changed: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    expected_absent: Mapping[str, str]
    level: str
    a: Side
    b: Side
    findings: tuple[Finding, ...]

    @property
    def is_same(self) -> bool:
        """Whether nothing differs but what is absent by design."""
        return not any(finding.severity == "error" for finding in self.findings)


@dataclass(slots=True)
class _Sorted:
    """The keys while they are being sorted."""

    both: list[tuple[str, Entry, Entry]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    missing: dict[str, Entry] = field(default_factory=dict)
    unexpected: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def diff(
    a: Side, b: Side, *, level: str = "headers", dims: Mapping[str, int] | None = None
) -> DiffResult:
    """Compare two sides by names, headers, and at level `bits` by content.

    Args:
        a: what is looked at.
        b: what is expected of it.
        level: one of `LEVELS`.
        dims: numbers of heads, where a layout needs them.

    Raises:
        CkptError: FC411 where a model is compared with keys that no layout fits; FC006 for bits of
            a model; what reading bytes raises.
    """
    _check_sides(a, b, level)
    ours, theirs = views(a, b, dims or {})
    found = _Sorted()
    _sort(ours, theirs, a, b, found)
    _compare_headers(found, level)
    pairs = find_renamed(found.unexpected, found.missing, reads=_can_read(a, b, level))
    for pair in pairs:
        del found.unexpected[pair.ours], found.missing[pair.theirs]
    changed = {name for name in found.changed}
    same = [name for name, _, _ in found.both if name not in changed]
    if level == "bits":
        from flamingo_ckpt.diff_bits import compare_bits

        different = compare_bits(a, b, [one for one in found.both if one[0] in set(same)])
        found.findings += [finding for group in different.values() for finding in group]
        changed |= different.keys()
        same = [name for name in same if name not in changed]
    found.findings += [
        *_twins(a, level),
        *_interval(a, b),
        *(_renamed(pair) for pair in pairs),
        *_missing(found.missing, ours, b),
        *_unexpected(found.unexpected, b),
        *_absent(found.absent, a, b),
        *_left_out(ours, a, b),
        *_left_out(theirs, b, a),
    ]
    return DiffResult(
        same=tuple(same),
        changed=tuple(sorted(changed)),
        renamed=tuple((pair.our_key, pair.their_key) for pair in pairs),
        missing=tuple(entry.key for entry in found.missing.values()),
        unexpected=tuple(entry.key for entry in found.unexpected.values()),
        expected_absent=found.absent,
        level=level,
        a=a,
        b=b,
        findings=tuple(found.findings),
    )


def _check_sides(a: Side, b: Side, level: str) -> None:
    if level == "bits" and (a.is_model or b.is_model):
        raise CkptError(
            "a model has no bytes to compare with",
            code="FC006",
            hint="--level headers, or two checkpoints",
        )
    for one, other in ((a, b), (b, a)):
        if other.is_model and one.detection is None:
            raise CkptError(
                "no layout has any evidence in the keys, so they cannot be told from a model's",
                code="FC411",
                where=one.uri,
                hint="`flamingo-ckpt layouts` lists what is known",
            )


def _can_read(a: Side, b: Side, level: str) -> bool:
    return level != "keys" and not a.is_model and not b.is_model


def _sort(ours: View, theirs: View, a: Side, b: Side, found: _Sorted) -> None:
    for name, entry in theirs.entries.items():
        mine = ours.entries.get(name)
        if mine is not None:
            found.both.append((name, mine, entry))
        elif _is_tied(name, entry, ours, theirs):
            continue
        elif name not in ours.faults and (base := _base(a, entry)):
            found.absent[entry.key] = base
        else:
            found.missing[name] = entry
    for name, entry in ours.entries.items():
        if name in theirs.entries or _is_tied(name, entry, theirs, ours):
            continue
        if base := _base(b, entry):
            found.absent[entry.key] = base
        else:
            found.unexpected[name] = entry
    for name, entry in ours.strangers.items():
        _meet_stranger(name, entry, found.missing, found.unexpected, found)
    for name, entry in theirs.strangers.items():
        found.missing.setdefault(name, entry)


def _meet_stranger(
    name: str, entry: Entry, missing: dict[str, Entry], unexpected: dict[str, Entry], found: _Sorted
) -> None:
    """A key that no rule takes, or whose shape its rule cannot: compare it by its name."""
    other = missing.pop(name, None)
    if other is None:
        unexpected[name] = entry
    else:
        found.both.append((name, entry, other))


def _is_tied(name: str, entry: Entry, here: View, there: View) -> bool:
    """Whether a name that one side lacks is a second name of a tensor that it has."""
    del name
    identity = entry.step.source.identity
    if entry.step.source.storage is None:
        return False
    return any(
        other.step.source.identity == identity and key in here.entries
        for key, other in there.entries.items()
        if other is not entry
    )


def _base(side: Side, entry: Entry) -> str:
    """The base that supplies an entry that a side lacks by design."""
    bases = {side.lacks_by_design(name) for name in entry.canonical}
    return bases.pop() if len(bases) == 1 else ""


def _compare_headers(found: _Sorted, level: str) -> None:
    if level == "keys":
        return
    for name, mine, other in found.both:
        finding = _header_finding(mine, other)
        if finding is not None:
            found.changed.append(name)
            found.findings.append(finding)


def _header_finding(mine: Entry, other: Entry) -> Finding | None:
    key = escape(mine.key)
    data = {
        "other_key": other.key,
        "dtype": [mine.dtype.name, other.dtype.name],
        "shape": [list(mine.shape), list(other.shape)],
    }
    if mine.shape != other.shape:
        code, detail, hint = _shape_difference(mine, other)
        return Finding(
            code=code,
            severity="error",
            key=mine.key,
            detail=f"`{key}`: {detail}",
            hint=hint,
            data=data,
        )
    if mine.dtype is not other.dtype:
        return Finding(
            code="FC206",
            severity="error",
            key=mine.key,
            detail=f"`{key}`: {mine.dtype} here, {other.dtype} there",
            data=data,
        )
    return None


def _shape_difference(mine: Entry, other: Entry) -> tuple[str, str, str | None]:
    here, there = format_shape(mine.shape), format_shape(other.shape)
    what = RESIZABLE.get(mine.canonical[0]) if mine.canonical else None
    if what and mine.shape[1:] == other.shape[1:] and mine.shape:
        change = other.shape[0] - mine.shape[0]
        grids = _grids(mine, other) if what == "position embedding" else ""
        hint = (
            f"--vocab-rows {other.shape[0]} pads or cuts it"
            if what == "vocabulary" and mine.canonical[0].startswith("lm.")
            else None
        )
        return (
            "FC216",
            f"{what} of {mine.shape[0]} rows, {other.shape[0]} there: {change:+d}{grids}",
            hint,
        )
    if mine.shape == other.shape[::-1]:
        return "FC205", f"{here} here, {there} there: transposed", None
    if math.prod(mine.shape) == math.prod(other.shape):
        return "FC205", f"{here} here, {there} there: as many elements in another shape", None
    return "FC205", f"{here} here, {there} there", None


def _grids(mine: Entry, other: Entry) -> str:
    """`, a grid of 16x16 and of 24x24`, where both are a square and a class token or none."""
    told: list[str] = []
    for rows in (mine.shape[0], other.shape[0]):
        sides = [
            math.isqrt(rows - extra)
            for extra in (1, 0)
            if math.isqrt(rows - extra) ** 2 == rows - extra
        ]
        if not sides or not mine.canonical[0].startswith("vision."):
            return ""
        told.append(f"{sides[0]}x{sides[0]}")
    return f", a grid of {told[0]} and of {told[1]}"


def _renamed(pair: Pair) -> Finding:
    return Finding(
        code="FC214",
        severity="error",
        key=pair.our_key,
        detail=f"`{escape(pair.our_key)}` is probably `{escape(pair.their_key)}`: {pair.why}",
        data={"other_key": pair.their_key, "evidence": pair.why},
    )


def _missing(names: Mapping[str, Entry], ours: View, b: Side) -> Iterable[Finding]:
    for name, entry in names.items():
        fault = ours.faults.get(name)
        there = "the model" if b.is_model else "B"
        yield Finding(
            code="FC203",
            severity="error",
            key=entry.key,
            detail=f"`{escape(entry.key)}` ({entry.describe()}) is in {there} and not in A"
            + (f": {fault}" if fault else ""),
        )


def _unexpected(names: Mapping[str, Entry], b: Side) -> Iterable[Finding]:
    for entry in names.values():
        there = "the model has no place for it" if b.is_model else "not in B"
        yield Finding(
            code="FC204",
            severity="error",
            key=entry.key,
            detail=f"`{escape(entry.key)}` ({entry.describe()}) is in A, and {there}"
            if b.is_model
            else f"`{escape(entry.key)}` ({entry.describe()}) is in A and {there}",
        )


def _absent(names: Mapping[str, str], a: Side, b: Side) -> Iterable[Finding]:
    del a, b
    for key, base in names.items():
        yield Finding(
            code="FC215",
            severity="info",
            key=key,
            detail=f"`{escape(key)}` is absent by design: the {base} base supplies it",
            data={"base": base},
        )


def _left_out(view: View, holder: Side, other: Side) -> Iterable[Finding]:
    layout = other.detection.layout.name if other.detection else ""
    for key, reason in view.left_out.items():
        yield Finding(
            code="FC209",
            severity="info",
            key=key,
            detail=f"`{escape(key)}` has no place in `{layout}`: {reason}",
            data={"in": holder.uri},
        )


def _twins(a: Side, level: str) -> Iterable[Finding]:
    """Two names of one tensor that are not equal: a loader takes one of them, and which is luck."""
    if a.reading is None:
        return
    for first, second in a.reading.equal:
        differs = first.dtype is not second.dtype or first.shape != second.shape
        if not differs and level == "bits":
            from flamingo_ckpt.diff_bits import digest_of

            differs = digest_of(first) != digest_of(second)
        if differs:
            yield Finding(
                code="FC202",
                severity="error",
                key=second.name,
                detail=f"`{escape(second.name)}` ({second.describe()}) and `{escape(first.name)}` "
                f"({first.describe()}) are two names of one tensor, and differ",
            )


def _interval(a: Side, b: Side) -> Iterable[Finding]:
    layers = [_gated(side) for side in (a, b)]
    if not all(layers) or layers[0] == layers[1]:
        return
    every = [_every(found) for found in layers]
    if every[0] == every[1]:
        return
    told = [f"every {n} layers" if n else "at irregular layers" for n in every]
    yield Finding(
        code="FC217",
        severity="error",
        detail=f"A has gated cross-attention {told[0]}, B {told[1]}: "
        "cross_attn_every_n_layers is another one",
        hint=f"the config should say {every[0]}" if every[0] and b.is_model else None,
        data={"layers": [sorted(found) for found in layers]},
    )


def _gated(side: Side) -> frozenset[int]:
    atoms = side.reading.atoms if side.reading is not None else {}
    return frozenset(int(name.split(".")[1]) for name in atoms if group_of(name) == "xattn")


def _every(layers: frozenset[int]) -> int:
    """The interval that explains the layers; 0 where none does."""
    every = min(layers) + 1
    return every if layers == {every * (n + 1) - 1 for n in range(len(layers))} else 0


def summary_of(result: DiffResult) -> dict[str, Any]:
    """The counts of the JSON report."""
    return {
        "same": len(result.same),
        "changed": len(result.changed),
        "renamed": len(result.renamed),
        "missing": len(result.missing),
        "unexpected": len(result.unexpected),
        "expected_absent": len(result.expected_absent),
    }
