"""A plan that carries a checkpoint to another layout, from headers alone.

Every key of every source is mapped, dropped with a reason, or refused before a byte moves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flamingo_ckpt.bases import Base, Supply, check_fit, fill, read_base
from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.layout import Layout, group_of
from flamingo_ckpt.layouts.mapping import (
    Assembled,
    Piece,
    Reading,
    assemble,
    joined,
    read_atoms,
    zero_filled,
)
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.layouts.rules import Table
from flamingo_ckpt.layouts.timm_clip import ZEROS
from flamingo_ckpt.map_checks import (
    Expected,
    check_expected,
    check_interchangeable,
    check_needs,
    in_rows,
    is_partial,
    optional_groups,
    refuse_family,
    refuse_faults,
    unknown_kept,
    unknown_keys,
    unplaced_reasons,
)
from flamingo_ckpt.plan import (
    Plan,
    Step,
    make_plan,
    target_dtype,
)
from flamingo_ckpt.provenance import (
    PARTIAL_KEY,
    base_findings,
    base_metadata,
    spelling_metadata,
    spelt_as_before,
    supplied_before,
)
from flamingo_ckpt.selection import Chosen, Dropped, PlanOptions, choose_tensors
from flamingo_ckpt.tensors import Manifest, TensorInfo, escape
from flamingo_ckpt.vocabulary import EMBED, HEAD, Rows, fit_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """Where to, and what is known beyond the files.

    Attributes:
        to: name of the target layout.
        source_layout: what `--from` says; None: by evidence.
        rows: of the vocabulary.
        dims: sizes that no shape tells, by axis name (numbers of heads).
        family: of the language model, where the config tells it and the keys do not.
        expected: the keys of the model in the target layout, where its config is known.
        where_expected: the config, for messages.
    """

    to: str
    source_layout: str | None = None
    rows: Rows = field(default_factory=Rows)
    dims: Mapping[str, int] = field(default_factory=dict)
    family: str = ""
    expected: tuple[Expected, ...] = ()
    where_expected: str = ""

    def rows_from(self, source: Layout, target: Layout) -> Rows:
        """The rows that are wanted; a file that stays in its layout has no way back to go."""
        if source is target and self.rows.is_remembered:
            return Rows()
        if self.rows.wanted is None and source.ends_with_tokens and not target.ends_with_tokens:
            return Rows(pads=True, why="as transformers pads a vocabulary")
        return self.rows


def make_map_plan(
    manifest: Manifest, options: PlanOptions, mapping: MapOptions, bases: Sequence[Base] = ()
) -> Plan:
    """Account for every key of the source and of the bases.

    Raises:
        CkptError: what `choose_tensors` raises, and FC202, FC203 to FC205 against the model, FC410
            to FC420.
    """
    target = layout_named(mapping.to)
    chosen = choose_tensors(manifest, options)
    among = (layout_named(mapping.source_layout).name,) if mapping.source_layout else ()
    detection = detect(chosen.names, manifest.uri, among=among)
    is_same = detection.layout is target
    if not is_same:
        check_interchangeable(detection.layout, target, manifest.uri)
    refuse_family(detection, mapping.family if mapping.expected else "", mapping.where_expected)
    rows = mapping.rows_from(detection.layout, target)
    if is_same and not bases and rows.wanted is None:
        return _kept(manifest, options, chosen, detection, mapping)
    reading = _read(manifest, chosen, detection, mapping.dims)
    supplies = [read_base(base, detection.families, mapping.dims) for base in bases]
    for supply in supplies:
        check_fit(reading.atoms, supply)
    atoms, supplied = fill(reading, supplies)
    remembered = supplied_before(manifest)
    atoms, withheld = _withhold(atoms, target, detection, remembered)
    check_needs(atoms, target, manifest.uri)
    table = target.table(_family(detection, supplies, mapping, target, manifest.uri))
    assembly = assemble(atoms, table, {**mapping.dims, **reading.dims})
    # what a base holds besides was not asked for: CLIP's projection, which no Flamingo uses
    own = [name for name in assembly.unplaced if name not in supplied]
    empty = _zero_only(own, atoms)
    placed_out = unplaced_reasons(own, atoms, target, manifest.uri)
    refuse_faults(assembly.faults, target, manifest.uri)
    tensors = spelt_as_before(zero_filled(assembly.tensors, target), manifest, table)
    resized = fit_rows(tensors, rows, frozenset(supplied), manifest.uri)
    steps = _steps(resized.tensors, table if target.writes_aliases else None, options, manifest.uri)
    absent = check_expected(
        resized.tensors,
        in_rows(mapping.expected, rows.wanted),
        optional_groups(target, atoms),
        mapping.where_expected,
        manifest.uri,
    )
    partial = is_partial(target, atoms)
    return Plan(
        source=manifest,
        steps=steps,
        dropped=(
            *chosen.dropped,
            *_dropped_keys(reading, {**withheld, **placed_out}, chosen),
        ),
        renamed=sum(step.name != step.source.name for step in steps),
        prefix=chosen.prefix,
        findings=(
            *chosen.findings,
            *resized.findings,
            *_withheld_findings(withheld.keys() - remembered, reading, target),
            *_loss_findings(placed_out, reading, target),
            *base_findings(supplies, supplied),
        ),
        layout=detection,
        target=target,
        transformed=sum(bool(step.parts) for step in steps),
        expected_absent=absent,
        equal=(*reading.equal, *(pair for supply in supplies for pair in supply.copies)),
        zeros=(*resized.zeros, *empty),
        metadata={
            **resized.metadata,
            **spelling_metadata(reading, detection.layout.table(detection.family)),
            **base_metadata(supplied, remembered & atoms.keys(), partial),
        },
        partial=partial,
        others={supply.base.kind: supply.base.manifest for supply in supplies},
    )


def _kept(
    manifest: Manifest,
    options: PlanOptions,
    chosen: Chosen,
    detection: Detection,
    mapping: MapOptions,
) -> Plan:
    """A file that is in the target layout already stays as it is."""
    if detection.elsewhere is not None or 2 * detection.num_fit < detection.num_keys:
        raise unknown_keys(detection, manifest.uri)
    plan, layout = make_plan(manifest, options), detection.layout
    if mapping.expected:
        reading = _read(manifest, chosen, detection, mapping.dims)
        dims = {**mapping.dims, **reading.dims}
        tensors = assemble(reading.atoms, layout.table(detection.family), dims).tensors
        optional, where = optional_groups(layout, reading.atoms), mapping.where_expected
        check_expected(tensors, mapping.expected, optional, where, manifest.uri)
    note = Finding(
        code="FC422",
        severity="info",
        detail=f"the keys are `{detection.title}` already and stay as they are "
        f"({detection.evidence})",
    )
    return replace(
        plan,
        layout=detection,
        target=detection.layout,
        findings=(*plan.findings, note, *unknown_kept(detection)),
        metadata={PARTIAL_KEY: "true"} if manifest.metadata.get(PARTIAL_KEY) else {},
        partial=bool(manifest.metadata.get(PARTIAL_KEY)),
    )


def _read(
    manifest: Manifest, chosen: Chosen, detection: Detection, dims: Mapping[str, int]
) -> Reading:
    if detection.unknown:
        raise unknown_keys(detection, manifest.uri)
    tensors = [
        tensor if tensor.name == name else replace(tensor, name=name)
        for name, tensor in chosen.names.items()
    ]
    reading = read_atoms(tensors, detection.layout.table(detection.family), dims)
    if reading.bent:
        name, fault = next(iter(reading.bent.items()))
        raise CkptError(
            f"`{escape(name)}` ({chosen.names[name].describe()}) does not fit "
            f"`{detection.title}`: {fault}",
            code="FC415",
            where=manifest.uri,
            key=name,
            hint="--from names another layout; --config tells sizes that no shape does",
        )
    return reading


def _withhold(
    atoms: Mapping[str, Piece], target: Layout, detection: Detection, remembered: frozenset[str]
) -> tuple[dict[str, Piece], dict[str, str]]:
    """Leave out what a file in the target layout does not hold (name -> reason)."""
    if not target.withheld:
        return dict(atoms), {}
    embed = atoms.get(EMBED)
    table = target.table(detection.family if target.rules_of else "")
    kept: dict[str, Piece] = {}
    withheld: dict[str, str] = {}
    for name, piece in atoms.items():
        reason = target.withheld.get(group_of(name), "")
        place = table.place(name)
        # Upstream's filter keeps whatever has "embed" in its key, GPT-NeoX's head among it, and a
        # second name of the embedding.
        is_kept = group_of(name).startswith("lm.") and (
            place is not None
            and ("embed" in place.name or (embed is not None and piece.identity == embed.identity))
        )
        # what only another layout has is lost, not withheld
        if reason and (place is not None or not piece.loss) and (not is_kept or name in remembered):
            withheld[name] = reason
        else:
            kept[name] = piece
    return kept, withheld


def _family(
    detection: Detection,
    supplies: Sequence[Supply],
    mapping: MapOptions,
    target: Layout,
    where: str,
) -> str:
    """The language model's family: a base's layers tell more than a partial checkpoint's keys."""
    if not target.rules_of:
        return ""
    for supply in supplies:
        if supply.base.kind == "language":
            # a base's own keys may fit several too
            both = (one for one in supply.detection.families if one in detection.families)
            return next(both, supply.detection.family)
    if mapping.family and (not detection.families or mapping.family in detection.families):
        return mapping.family
    if not detection.families:
        raise CkptError(
            f"`{detection.layout.name}` does not tell the language model, and the keys of "
            f"`{target.name}` depend on it",
            code="FC415",
            where=where,
            hint="--config names the model's config.json or a preset",
        )
    return detection.family


def _zero_only(names: Sequence[str], atoms: Mapping[str, Piece]) -> list[TensorInfo]:
    """What may be left out only where it is zero: checked before anything is written."""
    return [atoms[name].as_tensor(name) for name in names if name in ZEROS]


def _steps(
    tensors: Iterable[Assembled], aliases: Table | None, options: PlanOptions, where: str
) -> tuple[Step, ...]:
    """One step per distinct tensor; `aliases` is the table of a layout that writes every name."""
    steps: dict[tuple[object, ...], Step] = {}
    for one in tensors:
        runs = joined(one.pieces, one.name)
        first = next(piece.source for piece in one.pieces if piece.source is not None)
        identity: tuple[object, ...] = (tuple(piece.identity for piece in one.pieces), one.shape)
        further = tuple(aliases.aliases(one.canonical[0])) if aliases is not None else ()
        same = steps.get(identity)
        if same is not None and not options.untie:
            steps[identity] = replace(same, aliases=(*same.aliases, one.name, *further))
            continue
        is_whole = len(runs) == 1 and _is_same(runs[0], first) and one.shape == first.shape
        step = Step(
            source=first,
            name=one.name,
            dtype=target_dtype(first, options.dtype, where),
            aliases=further,
            parts=() if is_whole else runs,
            arranged=() if is_whole else one.shape,
        )
        if step.parts and first.dtype.bits < 8:
            raise CkptError(
                f"`{escape(first.name)}` is {first.dtype}, whose elements share bytes; it cannot "
                "be taken apart",
                code="FC305",
                where=where,
                key=first.name,
            )
        steps[identity if not options.untie else (one.name,)] = step
    return tuple(steps.values())


def _is_same(run: TensorInfo, stored: TensorInfo) -> bool:
    """Whether a run is a stored tensor as it lies there."""
    return (
        run.storage is stored.storage
        and run.offset_bytes == stored.offset_bytes
        and run.num_elements == stored.num_elements
        and run.strides == stored.strides
        and (run.strides is None or run.shape == stored.shape)
    )


def _dropped_keys(reading: Reading, reasons: Mapping[str, str], chosen: Chosen) -> list[Dropped]:
    """Keys, as stored, that are left out: by their rule, or with all their canonical tensors."""
    left_out = {
        key: reasons[names[0]]
        for key, names in reading.names.items()
        if names and all(name in reasons for name in names)
    }
    return [
        Dropped(name=chosen.names[key].name, reason=reason)
        for key, reason in {**reading.dropped, **left_out}.items()
    ]


def _loss_findings(placed_out: Collection[str], reading: Reading, target: Layout) -> list[Finding]:
    """Trained tensors that the target has no place for. No Flamingo uses its tower's projection."""
    return [
        Finding(
            code="FC414",
            severity="warning",
            key=key,
            detail=f"`{escape(key)}` has no place in `{target.name}`: the conversion loses it",
        )
        for key, names in reading.names.items()
        if any(name in placed_out and group_of(name) not in ("vision", "lm.rest") for name in names)
        or any(name in placed_out and "_added." in name for name in names)
    ]


def _withheld_findings(
    withheld: Collection[str], reading: Reading, target: Layout
) -> list[Finding]:
    """A head that may have been trained is not left out without a word."""
    return [
        Finding(
            code="FC209",
            severity="warning",
            key=key,
            detail=f"`{escape(key)}` has no place in `{target.name}`: if it was trained, the model "
            "that is put together from it will differ",
        )
        for key, names in reading.names.items()
        if any(name in HEAD and name in withheld for name in names)
    ]
