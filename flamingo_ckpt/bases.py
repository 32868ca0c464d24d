"""Fill what a checkpoint lacks by design from the releases that it was trained on top of.

A partial OpenFlamingo checkpoint holds neither its CLIP tower nor its language model. The
checkpoint always wins: a base supplies only what is not there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from flamingo_ckpt.errors import CkptError, name_some
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.families import FAMILIES
from flamingo_ckpt.layouts.layout import group_of
from flamingo_ckpt.layouts.mapping import Piece, Reading, read_atoms
from flamingo_ckpt.selection import PlanOptions, choose_tensors
from flamingo_ckpt.tensors import Manifest, TensorInfo, escape
from flamingo_ckpt.vocabulary import EMBED, HEAD

#: option -> the layouts that it reads, and the groups that it may fill.
_SPACES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vision": (
        (
            "open_clip",
            "open_clip-custom",
            "open_clip-visual",
            "hf-clip",
            "timm-clip",
            "openflamingo-full",
            "hf-flamingo",
        ),
        ("vision",),
    ),
    "language": (
        ("language-model", "openflamingo-full", "hf-flamingo"),
        ("lm.embed", "lm.layers", "lm.rest"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A release that supplies what a checkpoint lacks.

    Attributes:
        kind: `vision` or `language`, as in `--base-vision`.
    """

    kind: str
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """What a base can supply.

    Attributes:
        atoms: canonical name -> piece, of the groups that the base is for.
        copies: two stored tensors that must be equal for that: a tied model's two names, untied by
            whoever saved it.
    """

    base: Base
    detection: Detection
    atoms: Mapping[str, Piece]
    copies: tuple[tuple[TensorInfo, TensorInfo], ...] = ()


def read_base(base: Base, families: Collection[str], dims: Mapping[str, int]) -> Supply:
    """Take a base apart into canonical tensors.

    Args:
        base: what the user named.
        families: that the checkpoint's language model may be of; none where nothing is known.
        dims: sizes that no shape tells.

    Raises:
        CkptError: FC411 no layout fits, FC413 keys without a rule, FC420 another language model.
    """
    manifest = base.manifest
    layouts, groups = _SPACES[base.kind]
    chosen = choose_tensors(manifest, PlanOptions())
    detection = detect(chosen.names, manifest.uri)
    if detection.layout.name not in layouts:
        raise CkptError(
            f"--base-{base.kind} is `{detection.title}`, which has no "
            + ("CLIP image tower" if base.kind == "vision" else "language model of Flamingo's"),
            code="FC420",
            where=manifest.uri,
            hint="it reads " + ", ".join(layouts),
        )
    if base.kind == "language" and families and not {*families} & {*detection.families}:
        raise CkptError(
            f"the checkpoint's language model is {' or '.join(families)}, the base's is "
            f"{' or '.join(detection.families)}",
            code="FC420",
            where=manifest.uri,
            hint="name the release that the checkpoint was trained on",
        )
    if detection.unknown:
        raise CkptError(
            f"{len(detection.unknown)} keys fit no rule of `{detection.title}`: "
            + name_some([escape(name) for name in detection.unknown]),
            code="FC413",
            where=manifest.uri,
            key=detection.unknown[0],
        )
    named = [_named(tensor, name) for name, tensor in chosen.names.items()]
    reading = read_atoms(named, detection.layout.table(detection.family), dims)
    if reading.bent:
        name, fault = next(iter(reading.bent.items()))
        raise CkptError(
            f"`{escape(name)}` does not fit `{detection.title}`: {fault}",
            code="FC415",
            where=manifest.uri,
            key=name,
        )
    atoms = {name: piece for name, piece in reading.atoms.items() if group_of(name) in groups}
    embed, head = atoms.get(EMBED), atoms.get(HEAD[0])
    tied = embed is not None and (head is None or head.identity == embed.identity)
    copies: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    if not tied and embed is not None and head is not None and is_tied_family(detection.family):
        tied = True
        copies = tuple(zip(_sources(embed), _sources(head), strict=True))
    if tied:
        atoms.pop(HEAD[0], None)
    return Supply(base=base, detection=detection, atoms=atoms, copies=copies)


def _sources(piece: Piece) -> list[TensorInfo]:
    return [piece.source] if piece.source is not None else []


def is_tied_family(family: str) -> bool:
    """Whether the head of a language model is its input embedding by default."""
    return family in FAMILIES and FAMILIES[family].is_tied


def _named(tensor: TensorInfo, name: str) -> TensorInfo:
    return tensor if tensor.name == name else replace(tensor, name=name)


def check_fit(atoms: Mapping[str, Piece], supply: Supply) -> None:
    """Refuse a base of another size: nothing that it supplies would fit the checkpoint.

    Raises:
        CkptError: FC420 naming the two widths, or the layer that the base does not have.
    """
    ours, theirs = _width(atoms, supply.base.kind), _width(supply.atoms, supply.base.kind)
    if ours and theirs and ours != theirs:
        raise CkptError(
            f"the checkpoint was trained on a {supply.base.kind} model of width {ours}, the base's "
            f"is {theirs}",
            code="FC420",
            where=supply.base.manifest.uri,
            hint="name the release that the checkpoint was trained on",
        )
    if supply.base.kind == "language":
        layers = {int(name.split(".")[2]) for name in supply.atoms if _LAYER in name}
        gated = {int(name.split(".")[1]) for name in atoms if name.startswith("xattn.")}
        wanted = _gated_of(gated, layers)
        if layers and (gated - layers or gated < wanted):
            raise CkptError(
                f"the checkpoint has gated cross-attention before layer {max(gated)} at last, and "
                f"the base has {len(layers)} layers",
                code="FC420",
                where=supply.base.manifest.uri,
                hint="name the release that the checkpoint was trained on",
            )


def _gated_of(gated: set[int], layers: set[int]) -> set[int]:
    """The layers of a base that have gated blocks, at the interval that the checkpoint shows."""
    if not gated or not layers:
        return set()
    every = min(gated) + 1
    is_regular = gated == {*range(every - 1, max(gated) + 1, every)}
    return {*range(every - 1, max(layers) + 1, every)} if is_regular else set()


_LAYER = "lm.layers."
#: kind -> canonical names of which one axis is the base's width: (start of the name, axis).
_WIDTHS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "vision": (("perceiver.latents", 1), ("vision.class_embedding", 0)),
    "language": (("lm.embed_tokens.weight", 1), ("xattn.", 1)),
}


def _width(atoms: Mapping[str, Piece], kind: str) -> int:
    """The width of the language model or of the vision tower; 0 where nothing tells it."""
    for start, axis in _WIDTHS[kind]:
        for name, piece in atoms.items():
            fits = name == start or (name.startswith(start) and name.endswith(".attn.q.weight"))
            if fits and len(piece.shape) > axis:
                return piece.shape[axis]
    return 0


def fill(reading: Reading, supplies: Sequence[Supply]) -> tuple[dict[str, Piece], dict[str, str]]:
    """All canonical tensors, and which of them a base supplies (name -> kind)."""
    atoms = dict(reading.atoms)
    supplied: dict[str, str] = {}
    tied = any(is_tied_family(supply.detection.family) for supply in supplies)
    if tied and EMBED not in atoms and HEAD[0] in atoms:
        # a frozen embedding is saved under its second name alone, with the rows of new tokens
        atoms[EMBED] = atoms[HEAD[0]]
    for supply in supplies:
        for name, piece in supply.atoms.items():
            if name not in atoms:
                atoms[name] = piece
                supplied[name] = supply.base.kind
    return atoms, supplied
