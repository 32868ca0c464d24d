"""What differs between two checkpoints, or between a checkpoint and a model.

Both sides are named alike first: where both have a layout, A is carried into B's. Then every key
is the same, changed, missing, unexpected, probably renamed, or absent by design.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flamingo_ckpt.diff import findings as tell
from flamingo_ckpt.diff.likeness import Pair, find_renamed
from flamingo_ckpt.diff.names import LostName, lost_names
from flamingo_ckpt.diff.settings import settings_findings
from flamingo_ckpt.diff.sides import Side
from flamingo_ckpt.diff.views import Entry, View, are_comparable, have_one_family, views
from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.tensors import escape

#: What is compared: names; also dtype and shape; also the bits.
LEVELS = ("keys", "headers", "bits")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResult:
    """Every key with what became of it; keys as stored in the file that holds them.

    Attributes:
        same: names that both sides have alike, in B's words.
        changed: of another shape, dtype or content, in B's words.
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
    """The keys while they are being sorted; `notes` are about keys that are no difference."""

    both: list[tuple[str, Entry, Entry]] = field(default_factory=list)
    missing: dict[str, Entry] = field(default_factory=dict)
    unexpected: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    nameless: set[str] = field(default_factory=set)
    notes: list[Finding] = field(default_factory=list)


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
    if level == "bits":
        _meet_copies(ours, theirs, found)
    _pair(ours, a, b, level, found)
    different = _compare(a, b, level, found)
    changed = [name for name, _, _ in found.both if name in different]
    return DiffResult(
        same=tuple(
            name
            for name, _, _ in found.both
            if name not in different and name not in found.nameless
        ),
        changed=tuple(changed),
        renamed=tuple((pair.our_key, pair.their_key) for pair in found.pairs),
        missing=_keys(found.missing),
        unexpected=_keys(found.unexpected),
        expected_absent=found.absent,
        level=level,
        a=a,
        b=b,
        findings=(
            *tell.headlines(a, b),
            *(settings_findings(a, b) if level != "keys" else ()),
            *tell.twins(a, b, level),
            *(finding for name in changed for finding in different[name]),
            *(tell.renamed(pair) for pair in found.pairs),
            *tell.missing(found.missing, ours, a, b, found.nameless),
            *tell.unexpected(found.unexpected, a, b),
            *found.notes,
            *tell.absent(found.absent),
            *tell.left_out(ours, a, b),
            *tell.left_out(theirs, b, a),
            *tell.dropped(a, b),
        ),
    )


def _keys(entries: Mapping[str, Entry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for entry in entries.values() for key in entry.keys))


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


def _sort(ours: View, theirs: View, a: Side, b: Side, found: _Sorted) -> None:
    for name, entry in theirs.entries.items():
        mine = ours.entries.get(name)
        if mine is not None:
            found.both.append((name, mine, entry))
    _sort_rest(theirs, ours, a, "B", found.missing, found)
    _sort_rest(ours, theirs, b, "A", found.unexpected, found)
    _sort_strangers(ours.strangers, theirs.strangers, _frozen(a, b), found)
    by_key = [{key: one for one in v.entries.values() for key in one.keys} for v in (ours, theirs)]
    for lost in lost_names(a, b):
        _lose(lost, by_key[not lost.by_a].get(lost.other_key), found)


def _frozen(a: Side, b: Side) -> dict[str, str]:
    """Name -> base of what a model has from a base and A, being partial, holds nothing of."""
    if not a.is_partial():
        return {}
    held = {group for name, (group, _) in b.frozen.items() if name in a.tensors}
    return {name: base for name, (group, base) in b.frozen.items() if group not in held}


def _sort_strangers(
    ours: Mapping[str, Entry],
    theirs: Mapping[str, Entry],
    frozen: Mapping[str, str],
    found: _Sorted,
) -> None:
    """Keys that no rule takes, or whose shape their rule cannot: compare them by their names."""
    for name, entry in ours.items():
        other = theirs.get(name) or found.missing.pop(name, None)
        if other is None:
            found.unexpected[name] = entry
        else:
            found.both.append((name, entry, other))
    for name, entry in theirs.items():
        if name not in ours:
            mine = found.unexpected.pop(name, None)
            if mine is None and name in frozen:
                found.absent |= dict.fromkeys(entry.keys, frozen[name])
            elif mine is None:
                found.missing[name] = entry
            else:
                found.both.append((name, mine, entry))


def _sort_rest(
    here: View, there: View, lacking: Side, label: str, rest: dict[str, Entry], found: _Sorted
) -> None:
    """Sort what one side has and the other lacks; `label` names the one that has it."""
    known = {entry.identity: entry for name, entry in here.entries.items() if name in there.entries}
    for name, entry in here.entries.items():
        if name in there.entries:
            continue
        twin = known.get(entry.identity) if entry.identity is not None else None
        if name in there.tied:
            stored = there.tied[name]
            found.both.append((name, entry, stored) if label == "A" else (name, stored, entry))
            if twin is None:
                found.notes.append(tell.stored_apart(entry, lacking))
        elif twin is not None:
            found.notes.append(tell.tied(entry, twin, label))
        elif loss := _loss(entry, lacking):
            found.notes.append(tell.no_place(entry, lacking, loss))
        elif name not in there.faults and (base := _base(lacking, entry)):
            found.absent |= dict.fromkeys(entry.keys, base)
        else:
            rest[name] = entry
    for name, fault in here.faults.items():
        if name in there.faults:
            continue  # both sides tell their parts below, under the names that these have
        if name not in there.entries:
            rest |= fault.parts
    for name, fault in here.faults.items():
        if name in there.faults:
            _meet_parts(fault.parts, there.faults[name].parts, label, rest, found)


def _meet_parts(
    here: Mapping[str, Entry],
    there: Mapping[str, Entry],
    label: str,
    rest: dict[str, Entry],
    found: _Sorted,
) -> None:
    """Compare by their own names what neither side can put together."""
    for name, entry in here.items():
        if name not in there:
            rest[name] = entry
        elif label == "B":
            found.both.append((name, there[name], entry))


def _loss(entry: Entry, lacking: Side) -> str:
    """Why a layout may lack an entry for which it has no place; "" where it has one."""
    table = lacking.table
    if table is None or not entry.pieces:
        return ""
    losses = {piece.loss for piece in entry.pieces}
    has_place = any(table.place(name) is not None for name in entry.canonical)
    return "" if has_place or len(losses) != 1 else losses.pop()


def _base(side: Side, entry: Entry) -> str:
    """The base that supplies an entry that a side lacks by design."""
    bases = {side.lacks_by_design(name) for name in entry.canonical}
    return bases.pop() if len(bases) == 1 else ""


def _lose(lost: LostName, entry: Entry | None, found: _Sorted) -> None:
    """A name that one side lacks although it has the tensor under another."""
    if entry is None:
        return
    rest = found.missing if lost.by_a else found.unexpected
    rest.setdefault(
        lost.name,
        replace(entry, keys=(lost.key,), why=f"the tensor is there as `{escape(lost.other_key)}`"),
    )
    found.nameless.add(lost.name)


def _meet_copies(ours: View, theirs: View, found: _Sorted) -> None:
    """A head that only one side stores is no difference where it is a copy of the embedding."""
    from flamingo_ckpt.diff.bits import digest_of_step

    for rest, view, label in ((found.missing, theirs, "B"), (found.unexpected, ours, "A")):
        embed = [one for one in view.entries.values() if one.canonical == (tell.EMBED,)]
        heads = [name for name, one in rest.items() if one.canonical == (tell.HEAD,)]
        for name in heads if embed else ():
            head = rest[name]
            alike = (head.shape, head.dtype) == (embed[0].shape, embed[0].dtype)
            if alike and digest_of_step(head) == digest_of_step(embed[0]):
                del rest[name]
                found.notes.append(tell.tied(head, embed[0], label))


def _pair(ours: View, a: Side, b: Side, level: str, found: _Sorted) -> None:
    """Take out of the missing and the unexpected what is one tensor under two names."""
    for name, (entry, layout) in ours.respelt.items():
        other = found.missing.get(name)
        taken = [key for key, one in found.unexpected.items() if one.keys == entry.keys]
        if other is not None and taken and (other.shape, other.dtype) == (entry.shape, entry.dtype):
            del found.missing[name], found.unexpected[taken[0]]
            why = f"as `{layout}` spells it"
            found.pairs.append(
                Pair(ours=taken[0], theirs=name, our_key=entry.key, their_key=other.key, why=why)
            )
    if a.detection and b.detection and not (are_comparable(a, b) and have_one_family(a, b)):
        return  # the names of another model are no misspellings
    has_bytes = not a.is_model and not b.is_model
    reads = level != "keys" and has_bytes and a.manifest.is_local and b.manifest.is_local
    for pair in find_renamed(found.unexpected, found.missing, reads=reads):
        del found.unexpected[pair.ours], found.missing[pair.theirs]
        found.pairs.append(pair)


def _compare(a: Side, b: Side, level: str, found: _Sorted) -> dict[str, list[Finding]]:
    """Name -> findings, of what both sides have and have differently."""
    if level == "keys":
        return {}
    different = {
        name: [finding]
        for name, mine, other in found.both
        if (finding := tell.header(mine, other, b)) is not None
    }
    if level == "bits":
        from flamingo_ckpt.diff.bits import compare_bits

        alike: Sequence[tuple[str, Entry, Entry]] = [
            one for one in found.both if one[0] not in different
        ]
        different |= compare_bits(a, b, alike)
    return different


def summary_of(result: DiffResult) -> dict[str, Any]:
    """The counts of the JSON report."""
    counted: dict[str, Iterable[Any]] = {
        "same": result.same,
        "changed": result.changed,
        "renamed": result.renamed,
        "missing": result.missing,
        "unexpected": result.unexpected,
        "expected_absent": result.expected_absent,
    }
    return {name: len(list(keys)) for name, keys in counted.items()}
