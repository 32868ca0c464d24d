"""Carry tensors from a layout's keys to canonical names and on to another layout's keys.

Nothing is read. A canonical tensor is a `Piece`: a way to walk over the bytes of a stored one. A
tensor of another layout is one or more pieces, one after the other; splitting, stacking and
transposing are then all the same to whoever copies bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flamingo_ckpt.layouts.axes import Arrangement, AxesError, Strided
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.rules import Match, Place, Table
from flamingo_ckpt.tensors import DType, TensorInfo, contiguous_strides

#: Axes whose size only some layouts' shapes tell.
HEAD_COUNTS = frozenset({"visionheads", "textheads", "lmheads", "kvheads"})


@dataclass(frozen=True, slots=True)
class Piece:
    """One canonical tensor.

    Attributes:
        source: the stored tensor that it lies in; None for zeros.
        dtype: of its elements.
        view: how it is walked, in elements of `source` from its first one.
        loss: why a layout without a place for it may leave it out.
    """

    source: TensorInfo | None
    dtype: DType
    view: Strided
    loss: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the canonical tensor."""
        return self.view.shape

    def as_tensor(self, name: str) -> TensorInfo:
        """The same bytes as a tensor with plain strides; its shape may have other axes."""
        if self.source is None:
            return TensorInfo(name=name, dtype=self.dtype, shape=(math.prod(self.shape),))
        offset, sizes, strides = self.view.flat()
        shape = sizes or ((1,) if self.shape else ())
        if not sizes or (len(sizes) == 1 and strides == (1,)):
            plain: tuple[int, ...] | None = None
        else:
            plain = strides
        return replace(
            self.source,
            shape=shape,
            strides=plain,
            offset_bytes=self.source.offset_bytes + offset * self.dtype.bits // 8,
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two pieces that are the same elements of the same bytes."""
        if self.source is None:
            return ("zeros", self.dtype.name, self.shape)
        if self.source.storage is None:
            return (id(self),)
        offset, sizes, strides = self.view.flat()
        start = self.source.offset_bytes + offset * self.dtype.bits // 8
        return (id(self.source.storage), start, self.dtype.name, sizes, strides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a table makes of a file's keys.

    Attributes:
        atoms: canonical name -> piece.
        names: key -> the canonical names in it.
        dropped: key -> why it is left out.
        unknown: keys that no rule knows.
        equal: pairs of tensors that must hold the same bits, since they are one tensor's two names.
        bent: key -> what is wrong with its shape.
        dims: sizes that some key's shape told and that other layouts' keys do not: `visionheads`.
    """

    atoms: Mapping[str, Piece]
    names: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str]
    unknown: tuple[str, ...]
    equal: tuple[tuple[TensorInfo, TensorInfo], ...]
    bent: Mapping[str, str]
    dims: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """One tensor of a layout, made of canonical ones.

    Attributes:
        canonical: their names, in the order of `pieces`.
        pieces: one after the other they are the tensor, row by row.
        kind: of the rule that stores it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    canonical: tuple[str, ...]
    pieces: tuple[Piece, ...]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What a layout makes of canonical tensors.

    Attributes:
        tensors: in the order in which their first part came.
        unplaced: canonical names that the layout has no key for.
        faults: key -> what keeps it from being made.
    """

    tensors: tuple[Assembled, ...]
    unplaced: tuple[str, ...]
    faults: Mapping[str, str]


@dataclass(slots=True)
class _Building:
    place: Place
    found: dict[tuple[int, ...], tuple[str, Piece]] = field(default_factory=dict)


def read_atoms(tensors: Iterable[TensorInfo], table: Table, dims: Mapping[str, int]) -> Reading:
    """Take a file's tensors apart into canonical ones.

    Args:
        tensors: with the names that the table knows (wrapper prefixes removed).
        table: of the layout that they are in.
        dims: sizes that no shape tells, by axis name.
    """
    atoms: dict[str, Piece] = {}
    names: dict[str, tuple[str, ...]] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    bent: dict[str, str] = {}
    equal: list[tuple[TensorInfo, TensorInfo]] = []
    told: dict[str, int] = {}
    for tensor in tensors:
        match = table.match(tensor.name)
        if match is None:
            unknown.append(tensor.name)
            continue
        if match.rule.drop:
            dropped[tensor.name] = match.rule.drop
            continue
        try:
            pieces = list(_taken_apart(tensor, match, dims, told))
        except AxesError as error:
            bent[tensor.name] = str(error)
            continue
        names[tensor.name] = tuple(name for name, _ in pieces)
        for name, piece in pieces:
            other = atoms.setdefault(name, piece)
            if other.identity != piece.identity and other.source is not None:
                equal.append((other.source, tensor))
    return Reading(
        atoms=atoms,
        names=names,
        dropped=dropped,
        unknown=tuple(unknown),
        equal=tuple(dict.fromkeys(equal)),
        bent=bent,
        dims=told,
    )


def _taken_apart(
    tensor: TensorInfo, match: Match, dims: Mapping[str, int], told: dict[str, int]
) -> Iterable[tuple[str, Piece]]:
    loss = match.rule.loss
    whole = Strided.over(tensor.shape, tensor.strides or contiguous_strides(tensor.shape))
    known = {**dims, **({"part": len(match.parts)} if match.parts else {})}
    form = form_of(tensor, match, known)
    if form is None:
        yield match.canonical({}), Piece(tensor, tensor.dtype, whole, loss)
        return
    sizes = form.solve(tensor.shape, known, native=True)
    for name in HEAD_COUNTS & sizes.keys():
        if told.setdefault(name, sizes[name]) != sizes[name]:
            raise AxesError(f"{sizes[name]} heads here, {told[name]} in other tensors")
    for index, view in form.parts(whole, sizes):
        name = match.canonical(dict(zip(form.index, index, strict=True)))
        yield name, Piece(tensor, tensor.dtype, view, loss)


def form_of(tensor: TensorInfo, match: Match, known: Mapping[str, int]) -> Arrangement | None:
    """How the tensor is stored: one of the rule's further ways where it fits, or the usual one."""
    for text in match.rule.also:
        form = Arrangement.parse(text)
        try:
            form.solve(tensor.shape, known, native=True)
        except AxesError:
            continue
        return form
    return match.arrangement


def assemble(atoms: Mapping[str, Piece], table: Table, dims: Mapping[str, int]) -> Assembly:
    """Put canonical tensors together as a layout stores them.

    Args:
        atoms: canonical name -> piece.
        table: of the layout that is wanted.
        dims: sizes that no shape tells, by axis name.
    """
    building: dict[str, _Building] = {}
    unplaced: list[str] = []
    for name, piece in atoms.items():
        place = table.place(name)
        if place is None:
            unplaced.append(name)
            continue
        entry = building.setdefault(place.name, _Building(place))
        entry.found[tuple(place.index.values())] = (name, piece)
    tensors: list[Assembled] = []
    faults: dict[str, str] = {}
    depths = _depths(building.values())
    for native, entry in building.items():
        try:
            tensors.append(_put_together(native, entry, dims, depths))
        except AxesError as error:
            faults[native] = str(error)
    return Assembly(tensors=tuple(tensors), unplaced=tuple(unplaced), faults=faults)


def _tower(entry: _Building) -> str:
    """The part of the model whose layers are stacked in a tensor."""
    return next(iter(entry.found.values()))[0].partition(".")[0]


def _depths(entries: Iterable[_Building]) -> dict[str, int]:
    """How many layers each tower has: a stack with fewer lacks some."""
    depths: dict[str, int] = {}
    for entry in entries:
        if "layer" in entry.place.index:
            at = list(entry.place.index).index("layer")
            deepest = 1 + max(index[at] for index in entry.found)
            depths[_tower(entry)] = max(depths.get(_tower(entry), 0), deepest)
    return depths


def _put_together(
    native: str, entry: _Building, dims: Mapping[str, int], depths: Mapping[str, int]
) -> Assembled:
    place, form = entry.place, entry.place.arrangement
    ordered = [entry.found[index] for index in sorted(entry.found)]
    first = ordered[0][1]
    if form is None:
        return Assembled(
            name=native,
            dtype=first.dtype,
            shape=first.shape,
            canonical=(ordered[0][0],),
            pieces=(first,),
            kind=place.rule.kind,
        )
    counts = _counts(place, entry.found, depths.get(_tower(entry), 0))
    known = {**dims, **counts}
    inner = {name: size for name, size in known.items() if name not in form.index}
    pieces: list[Piece] = []
    shapes: set[tuple[int, ...]] = set()
    sizes: dict[str, int] = {}
    for name, piece in ordered:
        if piece.dtype is not first.dtype:
            raise AxesError(
                f"its parts have several dtypes: `{ordered[0][0]}` is {first.dtype}, `{name}` is "
                f"{piece.dtype}"
            )
        sizes = {**form.solve(piece.shape, inner, native=False), **counts}
        shapes.add(form.shape(sizes, native=True))
        pieces.append(replace(piece, view=form.stored(piece.view, sizes)))
    if len(shapes) > 1:
        raise AxesError("its parts have several shapes")
    return Assembled(
        name=native,
        dtype=first.dtype,
        shape=form.shape(sizes, native=True),
        canonical=tuple(name for name, _ in ordered),
        pieces=tuple(pieces),
        kind=place.rule.kind,
    )


def _counts(
    place: Place, found: Mapping[tuple[int, ...], object], num_layers: int
) -> dict[str, int]:
    """How many entries each index axis has; all combinations must be there."""
    counts: dict[str, int] = {}
    for at, name in enumerate(place.index):
        counts[name] = max(index[at] for index in found) + 1
    if "layer" in counts:
        counts["layer"] = num_layers
    if "part" in counts:
        counts["part"] = place.num_parts
    wanted = math.prod(counts.values())
    if len(found) != wanted:
        raise AxesError(f"{len(found)} of its {wanted} parts are there")
    return counts


def zero_filled(tensors: tuple[Assembled, ...], target: Layout) -> tuple[Assembled, ...]:
    """Add what a class of the target wants and no source has: a bias of zeros says nothing."""
    there = {one.name: one for one in tensors}
    filled = [
        _zeros_beside(there[lead], name)
        for name, lead in target.zero_fill.items()
        if lead in there and name not in there
    ]
    return (*tensors, *filled)


def _zeros_beside(lead: Assembled, name: str) -> Assembled:
    """As many zeros as a tensor has rows: none of its own rows, and then the zeros."""
    (first, *_) = lead.pieces
    shape = (lead.shape[0],)
    zeros = Piece(None, lead.dtype, Strided.over(shape, (1,)))
    none = replace(first, view=first.view.narrow(0, 0))
    return replace(lead, name=name, shape=shape, pieces=(none, zeros), kind="pad")


def joined(pieces: Sequence[Piece], name: str) -> tuple[TensorInfo, ...]:
    """The runs of bytes that make up a tensor, with neighbours in one storage joined.

    Splitting a tensor and putting it together again gives back one run, which is a plain copy.
    """
    runs: list[TensorInfo] = []
    for piece in pieces:
        tensor = piece.as_tensor(name)
        if runs and _follows(runs[-1], tensor):
            before = runs[-1]
            runs[-1] = replace(before, shape=(before.num_elements + tensor.num_elements,))
        elif tensor.num_elements or not runs:
            runs.append(tensor)
    return tuple(runs)


def _follows(before: TensorInfo, after: TensorInfo) -> bool:
    if before.storage is None or after.storage is None:
        return before.storage is None and after.storage is None
    return (
        before.storage is after.storage
        and before.strides is None
        and after.strides is None
        and before.byteorder == after.byteorder
        and before.offset_bytes + before.num_bytes == after.offset_bytes
    )
