"""The two sides of a comparison: a checkpoint or a model, taken apart as far as its keys allow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.layouts.mapping import (
    Assembled,
    Assembly,
    Piece,
    Reading,
    assemble,
    joined,
    read_atoms,
)
from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.layouts.rules import Table
from flamingo_ckpt.plan import Step
from flamingo_ckpt.provenance import PARTIAL_KEY
from flamingo_ckpt.selection import PlanOptions, choose_tensors
from flamingo_ckpt.tensors import DType, Manifest, TensorInfo

if TYPE_CHECKING:
    from flamingo_ckpt.models.config import ModelConfig

#: group -> the base that supplies it where it is absent by design.
BASE_OF_GROUP: Mapping[str, str] = {
    "vision": "vision",
    "lm.layers": "language",
    "lm.rest": "language",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A or B.

    Attributes:
        uri: what the user named.
        manifest: of a checkpoint; of a model, its keys without bytes.
        is_model: whether it has shapes only.
        tensors: name without wrapper prefixes -> tensor, with the name as stored.
        detection: its layout; None where its keys show none.
        reading: its keys taken apart by that layout.
        ties: of a model: canonical name -> a tensor that it keeps under another name already, as
            the head that is the embedding; a file may hold it a second time.
        frozen: of a model: name -> (group, base) of what a base supplies, for language models that
            no table knows.
        groups: parts of a model that it holds something of.
        prefix: the wrapper prefixes that were removed, or None.
        findings: about its names.
    """

    uri: str
    manifest: Manifest
    is_model: bool
    tensors: Mapping[str, TensorInfo]
    detection: Detection | None
    reading: Reading | None
    ties: Mapping[str, Piece] = field(default_factory=dict)
    frozen: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    groups: frozenset[str] = frozenset()
    prefix: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def table(self) -> Table | None:
        """The rules of its own layout."""
        found = self.detection
        return found.layout.table(found.family) if found is not None else None

    def stored(self, name: str) -> str:
        """The key as stored, for a name without wrapper prefixes."""
        return self.tensors[name].name if name in self.tensors else name

    def lacks_by_design(self, canonical: str) -> str:
        """The base that supplies a tensor it does not hold; "" where it should hold it.

        A tower is absent as a whole or not by design. What else a language model has besides its
        layers goes by itself (training with FSDP saves the head and leaves out the last norm), but
        for a whole state dict.
        """
        if self.is_model or not self.is_partial():
            return ""
        group = group_of(canonical)
        is_there = ("vision" if group == "lm.rest" else group) in self.groups
        return "" if is_there else BASE_OF_GROUP.get(group, "")

    def is_partial(self) -> bool:
        """Whether files of its kind leave the frozen towers to their own releases."""
        if self.detection is None:
            return False
        layout = self.detection.layout
        if layout.space != "flamingo" or layout.name == "language-model":
            return False
        if not layout.hf_config:
            return True
        folder = self.manifest.folder
        claims_all = folder is not None and os.path.isfile(os.path.join(folder, "config.json"))
        return not claims_all or PARTIAL_KEY in self.manifest.metadata


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


def checkpoint_side(
    manifest: Manifest, dims: Mapping[str, int], source_layout: str | None = None
) -> Side:
    """A side from a checkpoint. No layout is no fault here.

    Raises:
        CkptError: FC201 without tensors, FC208 flat parameters, FC412 two layouts fit alike.
    """
    names, prefix, findings = _names(manifest)
    among = (layout_named(source_layout).name,) if source_layout else ()
    try:
        detection: Detection | None = detect(names, manifest.uri, among=among)
    except CkptError as error:
        if error.code != "FC411":
            raise
        detection = None
    side = _side(manifest, False, names, detection, dims)
    return replace(side, prefix=prefix, findings=findings)


def _names(
    manifest: Manifest,
) -> tuple[Mapping[str, TensorInfo], str | None, tuple[Finding, ...]]:
    """Name -> tensor, the prefix, and findings. What a conversion refuses is told here."""
    try:
        chosen = choose_tensors(manifest, PlanOptions(max_expansion=float("inf")))
    except CkptError as error:
        if error.code not in ("FC202", "FC505"):
            raise
        told = replace(error.as_finding(), severity="warning")
        return _names_as_they_are(manifest), None, (told,)
    return chosen.names, chosen.prefix, chosen.findings


def _names_as_they_are(manifest: Manifest) -> dict[str, TensorInfo]:
    """Prefixes removed where that leaves no two tensors with one name."""
    bare = [strip_wrappers(tensor.name)[0] for tensor in manifest.tensors]
    counts = Counter(bare)
    return {
        name if counts[name] == 1 else tensor.name: tensor
        for name, tensor in zip(bare, manifest.tensors, strict=True)
    }


def model_side(config: ModelConfig, layout: str, dims: Mapping[str, int]) -> Side:
    """A side from what a model should hold, each tensor once."""
    from flamingo_ckpt.models.expectation import ALIAS_TREES, expect

    expectation = expect(config, layout)
    tensors = tuple(one.info() for one in expectation.canonical() if one.kind == "parameter")
    ties = [
        one.info()
        for one in expectation.tensors
        if one.alias_of is not None and not one.name.startswith(ALIAS_TREES)
    ]
    manifest = Manifest(uri=config.where, format="model", tensors=tensors, files=())
    names = {tensor.name: tensor for tensor in tensors}
    detection = detect(names, config.where, among=(layout,))
    side = _side(manifest, True, names, detection, dims)
    table = detection.layout.table(detection.family)
    frozen = {one.name: (one.group, one.base) for one in expectation.tensors if one.base}
    return replace(side, ties=read_atoms(ties, table, dims).atoms, frozen=frozen)


def _side(
    manifest: Manifest,
    is_model: bool,
    names: Mapping[str, TensorInfo],
    detection: Detection | None,
    dims: Mapping[str, int],
) -> Side:
    reading = None
    if detection is not None:
        tensors = [_renamed(tensor, name) for name, tensor in names.items()]
        reading = read_atoms(tensors, detection.layout.table(detection.family), dims)
    return Side(
        uri=manifest.uri,
        manifest=manifest,
        is_model=is_model,
        tensors=names,
        detection=detection,
        reading=reading,
        groups=frozenset(group_of(name) for name in reading.atoms) if reading else frozenset(),
    )


def _renamed(tensor: TensorInfo, name: str) -> TensorInfo:
    return tensor if tensor.name == name else replace(tensor, name=name)


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
    tensors = [_renamed(side.tensors[name], name) for name in found.elsewhere[1]]
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
