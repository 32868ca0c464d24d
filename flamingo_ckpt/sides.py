"""The two sides of a comparison: a checkpoint or a model, taken apart as far as its keys allow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.layouts.mapping import Assembled, Piece, Reading, assemble, joined, read_atoms
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
    """

    uri: str
    manifest: Manifest
    is_model: bool
    tensors: Mapping[str, TensorInfo]
    detection: Detection | None
    reading: Reading | None

    def holds(self, group: str) -> bool:
        """Whether any of its tensors belongs to a group."""
        atoms = self.reading.atoms if self.reading is not None else {}
        return any(group_of(name) == group for name in atoms)

    def lacks_by_design(self, canonical: str) -> str:
        """The base that supplies a tensor it does not hold; "" where it should hold it.

        A tower is absent as a whole or not by design. What else a language model has besides its
        layers goes by itself (training with FSDP saves the head and leaves out the last norm), but
        for a whole state dict.
        """
        if self.is_model or self.detection is None or not self._is_partial():
            return ""
        group = group_of(canonical)
        base = BASE_OF_GROUP.get(group, "")
        is_there = self.holds("vision") if group == "lm.rest" else self.holds(group)
        return "" if is_there else base

    def _is_partial(self) -> bool:
        """Whether files of its kind leave the frozen towers to their own releases."""
        assert self.detection is not None
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
        key: as stored; the first, where several stored tensors make it up.
        canonical: the canonical names in it; empty where its layout is not known.
        pieces: the same tensors as pieces.
        step: how its bytes are read.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    step: Step
    canonical: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()

    def describe(self) -> str:
        """`BF16 64x1024`."""
        return TensorInfo(name=self.key, dtype=self.dtype, shape=self.shape).describe()


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A side in the key space that both are compared in.

    Attributes:
        entries: name -> entry.
        strangers: keys that no rule knows, by the key itself; they fit nothing on the other side.
        faults: name -> why the side cannot give it although it has parts of it.
        left_out: key -> why the other side's layout has no place for it, where that is no loss.
    """

    entries: Mapping[str, Entry]
    strangers: Mapping[str, Entry] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def checkpoint_side(
    manifest: Manifest, dims: Mapping[str, int], source_layout: str | None = None
) -> Side:
    """A side from a checkpoint. No layout is no fault here.

    Raises:
        CkptError: what `choose_tensors` raises.
    """
    chosen = choose_tensors(manifest, PlanOptions(max_expansion=float("inf")))
    among = (layout_named(source_layout).name,) if source_layout else ()
    try:
        detection: Detection | None = detect(chosen.names, manifest.uri, among=among)
    except CkptError as error:
        if error.code != "FC411":
            raise
        detection = None
    return _side(manifest, False, chosen.names, detection, dims)


def model_side(config: ModelConfig, layout: str, dims: Mapping[str, int]) -> Side:
    """A side from what a model should hold, each tensor once."""
    from flamingo_ckpt.models.expectation import expect

    expectation = expect(config, layout)
    tensors = tuple(one.info() for one in expectation.canonical() if one.kind == "parameter")
    manifest = Manifest(uri=config.where, format="model", tensors=tensors, files=())
    names = {tensor.name: tensor for tensor in tensors}
    detection = detect(names, config.where, among=(layout,))
    return _side(manifest, True, names, detection, dims)


def _side(
    manifest: Manifest,
    is_model: bool,
    names: Mapping[str, TensorInfo],
    detection: Detection | None,
    dims: Mapping[str, int],
) -> Side:
    reading = None
    if detection is not None:
        named = [
            tensor if tensor.name == name else replace(tensor, name=name)
            for name, tensor in names.items()
        ]
        reading = read_atoms(named, detection.layout.table(detection.family), dims)
    return Side(
        uri=manifest.uri,
        manifest=manifest,
        is_model=is_model,
        tensors=names,
        detection=detection,
        reading=reading,
    )


def views(a: Side, b: Side, dims: Mapping[str, int]) -> tuple[View, View]:
    """Both sides under comparable names: B's layout where there is one, else as stored."""
    if a.detection is None or b.detection is None or a.reading is None or b.reading is None:
        return _as_stored(a), _as_stored(b)
    if a.detection.layout.space != b.detection.layout.space:
        return _as_stored(a), _as_stored(b)
    family = _family(a.detection, b.detection)
    target = b.detection.layout
    table = target.table(family if target.rules_of else "")
    known = {**a.reading.dims, **b.reading.dims, **dims}
    ours, theirs = _carried(a, table, known), _carried(b, table, known)
    # B's own names can always be given back; were one lost here, nobody would compare it.
    return (_as_stored(a), _as_stored(b)) if theirs.faults else (ours, theirs)


def _family(a: Detection, b: Detection) -> str:
    """A family that both sides can be, if there is one; B's otherwise."""
    common = [name for name in b.families if name in a.families]
    return common[0] if common else b.family


def _as_stored(side: Side) -> View:
    return View(
        entries={
            name: Entry(
                key=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                step=Step(source=tensor, name=name, dtype=tensor.dtype),
            )
            for name, tensor in side.tensors.items()
        }
    )


def _carried(side: Side, table: Table, dims: Mapping[str, int]) -> View:
    reading = side.reading
    assert reading is not None
    assembly = assemble(reading.atoms, table, dims)
    entries = {one.name: _entry(side, one) for one in assembly.tensors}
    strangers = {name: _stored_entry(side, name) for name in (*reading.unknown, *reading.bent)}
    left_out: dict[str, str] = {}
    for name in assembly.unplaced:
        piece = reading.atoms[name]
        key = piece.source.name if piece.source is not None else name
        if piece.loss:
            left_out[key] = piece.loss
        else:
            strangers[key] = _stored_entry(side, key)
    return View(entries=entries, strangers=strangers, faults=assembly.faults, left_out=left_out)


def _stored_entry(side: Side, name: str) -> Entry:
    tensor = side.tensors[name]
    return Entry(
        key=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        step=Step(source=tensor, name=name, dtype=tensor.dtype),
    )


def _entry(side: Side, one: Assembled) -> Entry:
    first = one.pieces[0].source
    assert first is not None
    runs = joined(one.pieces, one.name)
    return Entry(
        key=side.tensors[first.name].name,
        dtype=one.dtype,
        shape=one.shape,
        step=Step(source=first, name=one.name, dtype=one.dtype, parts=runs, arranged=one.shape),
        canonical=one.canonical,
        pieces=one.pieces,
    )
