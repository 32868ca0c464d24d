"""What a conversion to another layout refuses, each with the key and the way on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flamingo_ckpt.errors import CkptError, Finding, name_some
from flamingo_ckpt.layouts.clip import ALWAYS_THERE, UNSUPPORTED
from flamingo_ckpt.layouts.detect import Detection
from flamingo_ckpt.layouts.layout import Layout, group_of
from flamingo_ckpt.layouts.mapping import Assembled, Piece
from flamingo_ckpt.layouts.rules import split_numbers
from flamingo_ckpt.layouts.timm_clip import ZEROS
from flamingo_ckpt.tensors import escape, format_shape
from flamingo_ckpt.vocabulary import EMBED, HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One key of the model that the destination should hold.

    Attributes:
        canonical: the first canonical name in it.
    """

    name: str
    shape: tuple[int, ...]
    canonical: str


def check_interchangeable(source: Layout, target: Layout, where: str) -> None:
    """Raise FC416 where no conversion between two layouts exists, with the reason."""
    reason, hint = "", "`flamingo-ckpt layouts` lists what can be converted to what"
    for layout in (source, target):
        if layout.refused:
            reason = (
                f"`{layout.name}` is not interchangeable with any other layout: {layout.refused}"
            )
    if not reason and source.space != target.space:
        reason = (
            f"`{source.name}` names the tensors of a {source.space} model, "
            f"`{target.name}` those of a {target.space} model"
        )
    if not reason and target.read_only and source is not target:
        reason = f"`{target.name}` is read and never written: {target.read_only}"
    if reason:
        raise CkptError(reason, code="FC416", where=where, hint=hint)


def unknown_keys(detection: Detection, where: str) -> CkptError:
    """The refusal of keys that no rule knows; says so where another layout knows them."""
    if detection.elsewhere is not None:
        other, names = detection.elsewhere
        return CkptError(
            f"{detection.num_fit} of {detection.num_keys} keys are `{detection.title}`, and "
            f"{len(names)} are `{other}`: " + name_some([escape(name) for name in names]),
            code="FC417",
            where=where,
            key=names[0],
            hint="the file holds two namings; take one apart with --include or --exclude",
        )
    names = detection.unknown
    shown = _form_of(names)
    return CkptError(
        f"{len(names)} of {detection.num_keys} keys fit no rule of `{detection.title}`: "
        + name_some([escape(name) for name in names])
        + (f"; they show {shown}" if shown else ""),
        code="FC413",
        where=where,
        key=names[0],
        hint=f"`flamingo-ckpt layouts {detection.layout.name}` prints its rules; leave keys out "
        "with --exclude",
    )


def unknown_kept(detection: Detection) -> list[Finding]:
    """The same keys where nothing is converted: a word, and no refusal."""
    return [
        Finding(
            code="FC413",
            severity="warning",
            key=name,
            detail=f"`{escape(name)}` fits no rule of `{detection.title}`; it is kept",
        )
        for name in detection.unknown
    ]


def _form_of(names: Sequence[str]) -> str:
    """What kind of model keys without a rule show; "" where that is not known."""
    for name in names:
        template = split_numbers(name)[0]
        for prefix, form in UNSUPPORTED.items():
            if template.startswith(prefix):
                return form
    return ""


def check_needs(atoms: Mapping[str, Piece], target: Layout, where: str) -> None:
    """Raise FC414 where a source lacks what only another generation of the model lacks."""
    lacking = [form for name, form in ALWAYS_THERE.items() if name not in atoms]
    if target.name == "hf-clip" and lacking and any(name.startswith("vision.") for name in atoms):
        raise CkptError(
            f"the image tower has {lacking[0]}: `{target.name}` has no such form",
            code="FC414",
            where=where,
        )
    templates = {split_numbers(name)[0] for name in atoms}
    lacking = [template for template in target.needs if template not in templates]
    if lacking:
        raise CkptError(
            f"the source has no `{lacking[0].replace('#', '*')}`, which `{target.name}` is made "
            "for: it is another generation of the model",
            code="FC414",
            where=where,
            hint="`flamingo-ckpt layouts` lists its relatives",
        )


def unplaced_reasons(
    names: Sequence[str], atoms: Mapping[str, Piece], target: Layout, where: str
) -> dict[str, str]:
    """Reasons for what the target has no place for; an error where there is none."""
    embed = atoms.get(EMBED)
    tied = [
        name
        for name in names
        if name in HEAD and embed is not None and atoms[name].identity == embed.identity
    ]
    bad = [
        name for name in names if not atoms[name].loss and name not in tied and name not in ZEROS
    ]
    if bad:
        sources = [escape(_source_name(atoms[name])) for name in bad]
        raise CkptError(
            f"`{target.name}` has no place for " + name_some(list(dict.fromkeys(sources))),
            code="FC414",
            where=where,
            key=_source_name(atoms[bad[0]]),
            hint="if it is not needed there, leave it out with --exclude",
        )
    return {
        name: atoms[name].loss or ZEROS.get(name, "the output embedding is the input embedding")
        for name in names
    }


def _source_name(piece: Piece) -> str:
    return piece.source.name if piece.source is not None else ""


def refuse_faults(faults: Mapping[str, str], target: Layout, where: str) -> None:
    """Raise FC415 for a tensor that cannot be put together."""
    for name, fault in faults.items():
        raise CkptError(
            f"`{escape(name)}` of `{target.name}` cannot be made: {fault}",
            code="FC415",
            where=where,
            key=name,
            hint="--config tells sizes that no shape does, such as the number of heads"
            if "not known" in fault
            else "`flamingo-ckpt diff` against the model lists what is missing or differs",
        )


def in_rows(expected: Sequence[Expected], rows: int | None) -> tuple[Expected, ...]:
    """The same keys with another number of rows in the vocabulary; None keeps it."""
    return tuple(
        one
        if rows is None or one.canonical not in (EMBED, *HEAD)
        else replace(one, shape=(rows, *one.shape[1:]))
        for one in expected
    )


def check_expected(
    tensors: Sequence[Assembled],
    expected: Sequence[Expected],
    optional: Collection[str],
    told_by: str,
    where: str,
) -> tuple[str, ...]:
    """Compare with the model's own keys; returns those that are absent by design.

    Args:
        tensors: of the destination.
        expected: the model's keys; empty where no config was given.
        optional: groups that the destination may lack.
        told_by: the config, for messages.
        where: the source, for messages.

    Raises:
        CkptError: FC203 a key that nothing supplies, FC204 a key that the model lacks, FC205
            another shape, FC217 gated blocks at another interval.
    """
    if not expected:
        return ()
    hint = f"the config is {told_by}; `flamingo-ckpt diff` lists every key"
    # by canonical names: a head may keep another spelling than the model's
    wanted = {one.canonical: one for one in expected}
    there = {name for one in tensors for name in one.canonical}
    _refuse_interval(there, expected, told_by, where)
    for one in tensors:
        like = wanted.get(one.canonical[0])
        if like is not None and like.shape != one.shape:
            have, want = format_shape(one.shape), format_shape(like.shape)
            told = f"`{escape(one.name)}` is {have}, and the model's is {want}"
            raise CkptError(told, code="FC205", where=where, key=one.name, hint=hint)
    known = {*wanted, *_tied_heads(tensors)}
    extra = [one.name for one in tensors if one.canonical[0] not in known]
    if extra:
        told = f"the model has no {name_some([escape(name) for name in extra])}"
        raise CkptError(told, code="FC204", where=where, key=extra[0], hint=hint)
    absent = [one for name, one in wanted.items() if name not in there]
    holes = [one.name for one in absent if group_of(one.canonical) not in optional]
    if holes:
        raise CkptError(
            f"the model has {name_some([escape(name) for name in holes])}, and neither the "
            "checkpoint nor a base supplies it",
            code="FC203",
            where=where,
            key=holes[0],
            hint=hint,
        )
    return tuple(one.name for one in absent)


def refuse_family(detection: Detection, family: str, told_by: str) -> None:
    """Raise FC204 where a config names another language model than the keys do."""
    if family and detection.families and family not in detection.families:
        raise CkptError(
            f"the checkpoint's language model is {' or '.join(detection.families)}, and the "
            f"config's is {family}",
            code="FC204",
            where=told_by,
            hint="--config names the config of the model that is converted",
        )


def _tied_heads(tensors: Sequence[Assembled]) -> list[str]:
    """Heads that are second names of the embedding: a model's keys name it once."""
    parts = {one.canonical[0]: [piece.identity for piece in one.pieces] for one in tensors}
    return [name for name in HEAD if name in parts and parts[name] == parts.get(EMBED)]


def _refuse_interval(
    there: Iterable[str], expected: Sequence[Expected], told_by: str, where: str
) -> None:
    have, want = _gated(there), _gated(one.canonical for one in expected)
    if have and want and have != want:
        ours, theirs = (", ".join(map(str, layers)) for layers in (have, want))
        raise CkptError(
            f"gated cross-attention stands before the decoder layers {ours}, and by the config "
            f"before {theirs}",
            code="FC217",
            where=where,
            hint=f"correct `cross_attn_every_n_layers` in {told_by}, or the number of layers",
        )


def _gated(names: Iterable[str]) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in names if group_of(name) == "xattn"})


def optional_groups(target: Layout, atoms: Mapping[str, Piece]) -> set[str]:
    """Groups that the destination may lack: towers that are withheld, or that nobody gave."""
    if target.space != "flamingo":
        return set()
    lacking = {"vision", "lm.layers"} - {group_of(name) for name in atoms}
    # what a language model has besides its layers comes and goes with them
    return lacking | set(target.withheld) | ({"lm.rest"} if "lm.layers" in lacking else set())


def is_partial(target: Layout, atoms: Mapping[str, Piece]) -> bool:
    """Whether a Flamingo lacks a tower, where the target layout is a whole model's."""
    groups = {group_of(name) for name in atoms}
    return target.name == "hf-flamingo" and not {"vision", "lm.layers", "perceiver"} <= groups
