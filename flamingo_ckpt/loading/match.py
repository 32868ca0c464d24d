"""Which tensor of a file goes into which tensor of a module, from headers alone.

Where names are equal, by names. Where both sides' names show layouts of one kind of model, by the
canonical names that stand behind them; what neither table knows goes by equal names all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.layouts.axes import AxesError
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.layouts.mapping import Assembled, Reading, joined, read_atoms
from flamingo_ckpt.layouts.refit import assemble_one
from flamingo_ckpt.layouts.registry import LAYOUTS, layout_named
from flamingo_ckpt.layouts.rules import Table
from flamingo_ckpt.layouts.timm_clip import ZEROS
from flamingo_ckpt.loading.targets import Target
from flamingo_ckpt.plan import Step
from flamingo_ckpt.selection import Chosen
from flamingo_ckpt.tensors import TensorInfo
from flamingo_ckpt.vocabulary import EMBED, padded_rows, with_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One tensor of the module and the bytes that go into it.

    Attributes:
        step: the bytes, in the file's dtype; its shape is the one that the file gives.
        keys: of the file, as stored.
    """

    target: Target
    step: Step
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Every tensor of both sides, and what becomes of it.

    Attributes:
        loads: what is loaded.
        missing: tensors of the module that the file has nothing for.
        unexpected: keys of the file, as stored, that the module has no place for.
        faults: key of the module -> why it cannot be made although parts of it are there.
        padding: key of the module -> its rows that are padding, and zero.
        aliases: key of the file -> the key that holds the same tensor.
        ignored: key of the file -> why it may be left out.
        equal: pairs that must hold the same bits: two names of one tensor.
        zeros: tensors that may be left out only if they are zero.
        recomputed: module keys that the module makes itself.
        groups: module key -> part of the model, where a layout tells it.
        file_groups: the same for keys of the file.
        file: the file's layout; None where its names show none, or nobody had to ask.
        model: the module's.
    """

    loads: tuple[Load, ...]
    missing: tuple[Target, ...]
    unexpected: tuple[str, ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict)
    padding: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    equal: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    zeros: tuple[TensorInfo, ...] = ()
    recomputed: frozenset[str] = frozenset()
    groups: Mapping[str, str] = field(default_factory=dict)
    file_groups: Mapping[str, str] = field(default_factory=dict)
    file: Detection | None = None
    model: Detection | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """The names of one side taken apart by its layout."""

    detection: Detection
    table: Table
    reading: Reading

    @property
    def strange(self) -> set[str]:
        """Names that its layout cannot carry anywhere."""
        return {*self.reading.unknown, *self.reading.bent, *self.reading.dropped}


def match(
    chosen: Chosen,
    targets: Sequence[Target],
    where: str,
    *,
    layout: str | None = None,
    dims: Mapping[str, int] | None = None,
) -> Matching:
    """Pair a file's names with a module's tensors.

    Args:
        chosen: of the file.
        targets: of the module.
        where: the file, for messages.
        layout: of the file, where the user says so.
        dims: numbers of heads, by axis name.

    Raises:
        CkptError: FC410 to FC412 where a named layout does not exist or has no evidence; FC416
            where the two sides' language models differ.
    """
    by_name = _by_names(chosen, targets)
    is_exact = not by_name.missing and not by_name.unexpected
    if is_exact and layout is None:
        return by_name
    file, model = _detections(chosen, targets, where, layout)
    told = replace(by_name, file=file, model=model)
    if file is None or model is None or not _are_comparable(file, model):
        return told
    by_layout = _by_layouts(chosen, targets, file, model, dims or {})
    is_worse = len(by_layout.loads) < len(by_name.loads)
    if layout is None and is_worse and not _crosses(by_name, by_layout):
        return told
    return by_layout


def _crosses(by_name: Matching, by_layout: Matching) -> bool:
    """Whether equal names stand for different parts: transformers names both CLIP towers alike."""
    parts = (
        (by_layout.groups.get(load.target.key), by_layout.file_groups.get(load.keys[0]))
        for load in by_name.loads
    )
    return any(model and file and model != file for model, file in parts)


def _by_names(chosen: Chosen, targets: Sequence[Target]) -> Matching:
    loads: list[Load] = []
    missing: list[Target] = []
    used: set[str] = set()
    aliases: dict[str, str] = {}
    equal: list[tuple[TensorInfo, TensorInfo]] = []
    for target in targets:
        hits = [name for name in target.names if name in chosen.names]
        if not hits:
            missing.append(target)
            continue
        first = chosen.names[hits[0]]
        loads.append(_named_load(target, first))
        used.update(hits)
        for name in hits[1:]:
            other = chosen.names[name]
            aliases[other.name] = first.name
            if other.identity != first.identity:
                equal.append((first, other))
    return Matching(
        loads=tuple(loads),
        missing=tuple(missing),
        unexpected=tuple(one.name for name, one in chosen.names.items() if name not in used),
        aliases=aliases,
        equal=tuple(equal),
    )


def _named_load(target: Target, tensor: TensorInfo) -> Load:
    step = Step(source=tensor, name=target.name, dtype=tensor.dtype)
    return Load(target=target, step=step, keys=(tensor.name,))


def _detections(
    chosen: Chosen, targets: Sequence[Target], where: str, layout: str | None
) -> tuple[Detection | None, Detection | None]:
    """The layouts of both sides; where one has two readings, the other side's kind decides."""
    names = [name for target in targets for name in target.names]
    model = _detected(names, "the module", ())
    if layout is not None:
        return detect(chosen.names, where, among=(layout_named(layout).name,)), model
    file = _detected(chosen.names, where, ())
    if file is None and model is not None:
        file = _detected(chosen.names, where, _relatives(model))
    if model is None and file is not None:
        model = _detected(names, "the module", _relatives(file))
    return file, model


def _detected(
    names: Mapping[str, object] | Sequence[str], where: str, among: Sequence[str]
) -> Detection | None:
    try:
        found = detect(names, where, among=among)
    except CkptError as error:
        if error.code not in ("FC411", "FC412"):
            raise
        return None
    return found if found.num_fit else None


def _relatives(detection: Detection) -> tuple[str, ...]:
    space = detection.layout.space
    return tuple(name for name, layout in LAYOUTS.items() if layout.space == space)


def _are_comparable(file: Detection, model: Detection) -> bool:
    one, other = file.layout, model.layout
    return one is other or (one.space == other.space and not (one.refused or other.refused))


def _side(detection: Detection, tensors: Sequence[TensorInfo], dims: Mapping[str, int]) -> _Side:
    table = detection.layout.table(detection.family)
    return _Side(detection=detection, table=table, reading=read_atoms(tensors, table, dims))


def _by_layouts(
    chosen: Chosen,
    targets: Sequence[Target],
    file_layout: Detection,
    model_layout: Detection,
    dims: Mapping[str, int],
) -> Matching:
    file = _side(
        file_layout,
        [
            one if one.name == name else replace(one, name=name)
            for name, one in chosen.names.items()
        ],
        dims,
    )
    known = {**dims, **file.reading.dims}
    model = _side(
        model_layout, [target.info(name) for target in targets for name in target.names], known
    )
    pairing = _Pairing(chosen, file, model, known)
    for target in targets:
        pairing.pair(target)
    return pairing.result(targets)


class _Pairing:
    """The work of `_by_layouts`: what is matched so far."""

    def __init__(self, chosen: Chosen, file: _Side, model: _Side, dims: Mapping[str, int]) -> None:
        self._chosen = chosen
        self._file = file
        self._model = model
        self._dims = dims
        self._loads: list[Load] = []
        self._missing: list[Target] = []
        self._atoms: set[str] = set()
        self._used: set[str] = set()
        self._equal: list[tuple[TensorInfo, TensorInfo]] = []
        self._faults: dict[str, str] = {}
        self._padding: dict[str, str] = {}

    def pair(self, target: Target) -> None:
        """Find what goes into one tensor of the module."""
        atoms = self._file.reading.atoms
        found: list[tuple[str, tuple[str, ...]]] = []
        for name in target.names:
            wanted = self._model.reading.names.get(name, ())
            there = [one for one in wanted if one in atoms]
            if wanted and len(there) == len(wanted):
                found.append((name, wanted))
            elif there:
                self._faults[target.key] = f"{len(there)} of its {len(wanted)} parts are there"
        if found:
            self._take(target, found)
        else:
            self._take_by_name(target)

    def _take(self, target: Target, found: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        atoms = self._file.reading.atoms
        runs: list[tuple[TensorInfo, ...]] = []
        for at, (name, wanted) in enumerate(found):
            if at and wanted == found[0][1]:
                continue
            try:
                one = assemble_one(name, wanted, atoms, self._model.table, self._dims, target.shape)
            except AxesError as error:
                self._faults[target.key] = str(error)
                self._missing.append(target)
                return
            one = self._padded(one, target)
            self._atoms.update(wanted)
            runs.append(joined(one.pieces, target.name))
            if at == 0:
                sources = [piece.source for piece in one.pieces if piece.source is not None]
                keys = dict.fromkeys(self._stored(source.name) for source in sources)
                step = Step(
                    source=sources[0],
                    name=target.name,
                    dtype=one.dtype,
                    parts=runs[0],
                    arranged=one.shape,
                )
                self._loads.append(Load(target=target, step=step, keys=tuple(keys)))
        for further in runs[1:]:  # a tied tensor, of which the file holds two
            for first, second in zip(runs[0], further, strict=False):
                if first.identity != second.identity:
                    self._equal.append((first, second))

    def _padded(self, one: Assembled, target: Target) -> Assembled:
        """Google's vocabulary ends with the last token, transformers' with rows that nobody uses.

        Rows beyond those that its own conversion adds are more than padding, and not made up.
        """
        ends = [side.detection.layout.ends_with_tokens for side in (self._file, self._model)]
        if one.canonical != (EMBED,) or ends != [True, False] or not target.shape:
            return one
        rows = target.shape[0]
        if rows != padded_rows(one.shape[0]):
            return one
        self._padding[target.key] = f"rows {one.shape[0]} to {rows - 1}, which are padding"
        return with_rows(one, rows)

    def _take_by_name(self, target: Target) -> None:
        """Names that a table cannot carry go by themselves."""
        strange = self._file.strange
        own = self._model.strange
        for name in target.names:
            tensor = self._chosen.names.get(name)
            if tensor is not None and (name in strange or name in own):
                self._loads.append(_named_load(target, tensor))
                self._used.add(name)
                self._faults.pop(target.key, None)
                return
        self._missing.append(target)

    def _stored(self, name: str) -> str:
        return self._chosen.names[name].name

    def result(self, targets: Sequence[Target]) -> Matching:
        """Account for every key of the file."""
        reading = self._file.reading
        aliases: dict[str, str] = {}
        ignored = {
            self._stored(name): why
            for name, why in reading.dropped.items()
            if name not in self._used
        }
        unexpected: list[str] = []
        zeros: list[TensorInfo] = []
        for name, atoms in reading.names.items():
            if name in self._used:
                continue
            if any(atom in self._atoms for atom in atoms):
                first = reading.atoms[atoms[0]].source
                if first is not None and first.name != name:
                    aliases[self._stored(name)] = self._stored(first.name)
            elif why := self._loss(atoms):
                ignored[self._stored(name)] = why
                zeros += [reading.atoms[one].as_tensor(one) for one in atoms if one in ZEROS]
            else:
                unexpected.append(self._stored(name))
        strangers = (*reading.unknown, *reading.bent)
        unexpected += [self._stored(name) for name in strangers if name not in self._used]
        order = {tensor.name: at for at, tensor in enumerate(self._chosen.names.values())}
        twins = [pair for pair in reading.equal if self._stored(pair[1].name) in aliases]
        own = self._model.reading
        return Matching(
            loads=tuple(self._loads),
            missing=tuple(self._missing),
            unexpected=tuple(sorted(unexpected, key=lambda key: order[key])),
            faults=self._faults,
            padding=self._padding,
            aliases=aliases,
            ignored=ignored,
            equal=(*self._equal, *twins),
            zeros=tuple(zeros),
            recomputed=frozenset(
                target.key for target in targets if any(n in own.dropped for n in target.names)
            ),
            groups={
                target.key: group_of(own.names[name][0])
                for target in targets
                for name in target.names[:1]
                if name in own.names
            },
            file_groups={
                self._stored(name): group_of(atoms[0]) for name, atoms in reading.names.items()
            },
            file=self._file.detection,
            model=self._model.detection,
        )

    def _loss(self, atoms: Sequence[str]) -> str:
        """Why a tensor without a place may be left out; "" where it may not."""
        reading, table = self._file.reading, self._model.table
        if all(name in ZEROS for name in atoms):
            return ZEROS[atoms[0]]
        losses = {reading.atoms[name].loss for name in atoms}
        has_place = any(table.place(name) is not None for name in atoms)
        is_tower = {group_of(name) for name in self._model.reading.atoms} == {"vision"}
        return losses.pop() if len(losses) == 1 and (is_tower or not has_place) else ""
