"""Two sides in one key space: B's layout where both have one, the keys as stored elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flamingo_ckpt.diff.sides import Side, renamed
from flamingo_ckpt.layouts.mapping import (
    Assembled,
    Assembly,
    Piece,
    assemble,
    joined,
    read_atoms,
)
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.layouts.rules import Table
from flamingo_ckpt.plan import Step
from flamingo_ckpt.tensors import DType, TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a side under the name that both sides are compared by.

    Attributes:
        keys: as stored; several, where several stored tensors make it up.
        canonical: the canonical names in it; empty where its layout is not known.
        pieces: the same tensors as pieces.
        step: how its bytes are read.
        why: what is wrong with it by itself; "" for nothing.
    """

    keys: tuple[str, ...]
    dtype: DType
    shape: tuple[int, ...]
    step: Step
    canonical: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()
    why: str = ""

    @property
    def key(self) -> str:
        """The first of its keys."""
        return self.keys[0]

    @property
    def identity(self) -> tuple[object, ...] | None:
        """Equal for two entries that are the same elements of the same bytes; None for a model."""
        runs = self.step.runs
        if any(run.storage is None for run in runs):
            return None
        return (self.dtype.name, self.shape, *(run.identity for run in runs))

    def describe(self) -> str:
        """`BF16 64x1024`."""
        return TensorInfo(name=self.key, dtype=self.dtype, shape=self.shape).describe()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A key that cannot be made although parts of it are there.

    Attributes:
        why: what keeps it from being made.
        parts: what is there, by the names it has.
    """

    why: str
    parts: Mapping[str, Entry]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A side in the key space that both are compared in.

    Attributes:
        entries: name -> entry.
        tied: name -> entry of a model's second name for a tensor; it may be there or not.
        respelt: name -> entry of a key that another layout spells so, and that layout's name.
        strangers: keys that no rule knows, by the key itself; they fit nothing on the other side.
        faults: name -> why the side cannot give it although it has parts of it.
        left_out: key -> why the other side's layout has no place for it, where that is no loss.
    """

    entries: Mapping[str, Entry]
    tied: Mapping[str, Entry] = field(default_factory=dict)
    respelt: Mapping[str, tuple[Entry, str]] = field(default_factory=dict)
    strangers: Mapping[str, Entry] = field(default_factory=dict)
    faults: Mapping[str, Fault] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def are_comparable(a: Side, b: Side) -> bool:
    """Whether both are of one kind of model, so that a map leads from one to the other."""
    if a.detection is None or b.detection is None:
        return False
    one, other = a.detection.layout, b.detection.layout
    return one is other or (one.space == other.space and not (one.refused or other.refused))


def have_one_family(a: Side, b: Side) -> bool:
    """Whether some kind of language model has the keys of both; true where a side shows none."""
    families = [set(side.detection.families) if side.detection else set() for side in (a, b)]
    return not all(families) or bool(families[0] & families[1])


def views(a: Side, b: Side, dims: Mapping[str, int]) -> tuple[View, View]:
    """Both sides under names that can be compared: those of B's layout, else as stored."""
    if not are_comparable(a, b):
        return _as_stored(a), _as_stored(b)
    assert a.detection is not None
    assert b.detection is not None
    assert a.reading is not None
    assert b.reading is not None
    target = b.detection.layout
    known = {**a.reading.dims, **b.reading.dims, **dims}
    common = [name for name in b.detection.families if name in a.detection.families]
    ours, theirs = (
        _carried(side, target.table(family if target.rules_of else ""), known)
        for side, family in (
            # the names of another language model stay its own
            (a, common[0] if common else a.detection.family or b.detection.family),
            (b, common[0] if common else b.detection.family),
        )
    )
    return ours, theirs


def _as_stored(side: Side) -> View:
    return View(entries={name: _stored_entry(side, name) for name in side.tensors})


def _carried(side: Side, table: Table, dims: Mapping[str, int]) -> View:
    reading = side.reading
    assert reading is not None
    assembly = assemble(reading.atoms, table, dims)
    strangers = {name: _stored_entry(side, name) for name in reading.unknown}
    strangers |= {name: _stored_entry(side, name, why) for name, why in reading.bent.items()}
    left_out: dict[str, str] = {}
    for name in assembly.unplaced:
        piece = reading.atoms[name]
        key = piece.source.name if piece.source is not None else name
        if piece.loss:
            left_out[side.stored(key)] = piece.loss
        else:
            strangers[key] = _stored_entry(side, key)
    respelt = _respelt(side, table, dims)
    return View(
        entries={one.name: _entry(side, one) for one in assembly.tensors},
        tied={one.name: _entry(side, one) for one in assemble(side.ties, table, dims).tensors},
        respelt=respelt,
        strangers=strangers,
        faults=_faults(side, assembly, table),
        left_out=left_out,
    )


def _faults(side: Side, assembly: Assembly, table: Table) -> dict[str, Fault]:
    if not assembly.faults:
        return {}
    assert side.reading is not None
    parts: dict[str, dict[str, Entry]] = {}
    for name, piece in side.reading.atoms.items():
        place = table.place(name)
        if place is not None and place.name in assembly.faults and piece.source is not None:
            key = piece.source.name
            parts.setdefault(place.name, {})[key] = _stored_entry(side, key)
    return {
        name: Fault(why=why, parts=parts.get(name, {})) for name, why in assembly.faults.items()
    }


def _respelt(side: Side, table: Table, dims: Mapping[str, int]) -> dict[str, tuple[Entry, str]]:
    """Keys that another layout of the same kind of model knows, by the names wanted here."""
    found = side.detection
    if found is None or found.elsewhere is None:
        return {}
    layout = layout_named(found.elsewhere[0])
    if layout.space != found.layout.space:
        return {}
    family = found.family or next(iter(layout.families))
    tensors = [renamed(side.tensors[name], name) for name in found.elsewhere[1]]
    reading = read_atoms(tensors, layout.table(family if layout.rules_of else ""), dims)
    return {
        one.name: (_entry(side, one), layout.name)
        for one in assemble(reading.atoms, table, dims).tensors
    }


def _stored_entry(side: Side, name: str, why: str = "") -> Entry:
    tensor = side.tensors[name]
    return Entry(
        keys=(tensor.name,),
        dtype=tensor.dtype,
        shape=tensor.shape,
        step=Step(source=tensor, name=name, dtype=tensor.dtype),
        why=why,
    )


def _entry(side: Side, one: Assembled) -> Entry:
    sources = [piece.source for piece in one.pieces if piece.source is not None]
    runs = joined(one.pieces, one.name)
    return Entry(
        keys=tuple(dict.fromkeys(side.stored(source.name) for source in sources)),
        dtype=one.dtype,
        shape=one.shape,
        step=Step(
            source=sources[0], name=one.name, dtype=one.dtype, parts=runs, arranged=one.shape
        ),
        canonical=one.canonical,
        pieces=one.pieces,
    )
