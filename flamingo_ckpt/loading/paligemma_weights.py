"""What a PaliGemma folder's weights are, read from headers before a model is built for them."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.formats.extract import BLOCK_BYTES
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.mapping import Piece, Reading, read_atoms
from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.plan import Step
from flamingo_ckpt.selection import PlanOptions, choose_tensors
from flamingo_ckpt.stream import Derived
from flamingo_ckpt.tensors import Manifest, TensorInfo, escape
from flamingo_ckpt.verify import first_difference
from flamingo_ckpt.vocabulary import EMBED

if TYPE_CHECKING:
    from flamingo_ckpt.loading.paligemma_config import PaliGemmaSettings

_HEAD = "lm.head.weight"
#: SigLIP's pooling head, whose output no PaliGemma uses.
_POOLING_HEAD = re.compile(r"(model\.)?vision_tower\.(vision_model\.)?head\..+")
_POSITIONS = "vision.position_embedding.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A checkpoint that fits a config, as far as its header tells.

    Attributes:
        manifest: with the embedding under its own name, and a tied head left out.
        layout: its name.
        dtype: of its floating-point tensors, as torch spells it; None where they have several.
        num_rows: of its embedding; fewer than the config's only in files of big_vision.
        notes: what was done about the heads.
    """

    manifest: Manifest
    layout: str
    dtype: str | None
    num_rows: int
    notes: tuple[Finding, ...]


def examine(
    manifest: Manifest, settings: PaliGemmaSettings, layout: str | None, *, will_cast: bool
) -> Weights:
    """Check what `load_into` cannot know: ties, dtypes, rows of the vocabulary, the picture's size.

    Args:
        manifest: of the weights.
        settings: of the config beside them.
        layout: of the keys, by name; None: by evidence.
        will_cast: whether a dtype was asked for.

    Raises:
        CkptError: FC205 another picture size, FC416 another kind of model, FC418 another number of
            rows, FC457 ties, FC458 several dtypes, FC459 adapters or quantised weights.
    """
    manifest, unused = _without_pooling_head(manifest)
    names = choose_tensors(manifest, PlanOptions()).names
    among = (layout_named(layout).name,) if layout else ()
    detection = detect(names, manifest.uri, among=among)
    if detection.layout.space != "paligemma":
        raise CkptError(
            f"the keys are `{detection.title}`, those of a {detection.layout.space} model, and the "
            "config beside them is PaliGemma's",
            code="FC416",
            where=manifest.uri,
            hint="`load_checkpoint` fills a model of any kind",
        )
    tensors = [replace(tensor, name=name) for name, tensor in names.items()]
    table = detection.layout.table(detection.family)
    reading = read_atoms(tensors, table, {})
    _refuse_adapters(reading, detection, manifest.uri)
    atoms = reading.atoms
    dtype = _dtype(atoms, settings, manifest.uri, will_cast=will_cast)
    _check_positions(atoms, settings, manifest.uri)
    embedding = table.place(EMBED)
    assert embedding is not None, "every layout of PaliGemma has an embedding"
    manifest, notes = _settle_head(manifest, names, atoms, settings, embedding.name)
    return Weights(
        manifest=manifest,
        layout=detection.layout.name,
        dtype=dtype,
        num_rows=_num_rows(atoms, detection, settings, manifest.uri),
        notes=(*unused, *notes),
    )


def _without_pooling_head(manifest: Manifest) -> tuple[Manifest, tuple[Finding, ...]]:
    """Classes build (and save) one wherever a config forgets to turn it off."""
    heads = [
        tensor.name
        for tensor in manifest.tensors
        if _POOLING_HEAD.fullmatch(strip_wrappers(tensor.name)[0])
    ]
    if not heads:
        return manifest, ()
    kept = tuple(tensor for tensor in manifest.tensors if tensor.name not in set(heads))
    note = Finding(
        code="FC209",
        severity="info",
        key=heads[0],
        detail=f"{len(heads)} tensors of the vision tower's pooling head are left out: PaliGemma "
        "does not use what it computes",
    )
    return replace(manifest, tensors=kept), (note,)


def _refuse_adapters(reading: Reading, detection: Detection, where: str) -> None:
    if not reading.dropped:
        return
    key, reason = next(iter(reading.dropped.items()))
    raise CkptError(
        f"the file holds {len(reading.dropped)} tensors of an adapter, without which the model "
        f"computes something else: `{escape(key)}` is {reason}",
        code="FC459",
        where=where,
        key=key,
        hint="merge it with PEFT (`merge_and_unload`) and save the result; `convert` takes the "
        f"base layers of a `{detection.layout.name}` alone",
    )


def _dtype(
    atoms: Mapping[str, Piece], settings: PaliGemmaSettings, where: str, *, will_cast: bool
) -> str | None:
    for name, piece in atoms.items():
        if not piece.dtype.is_real_float or piece.dtype.bits < 16:
            raise CkptError(
                f"`{escape(_stored(piece, name))}` is {piece.dtype}: the weights are quantised, "
                "and mean nothing without their scales",
                code="FC459",
                where=where,
                key=_stored(piece, name),
            )
    counts = Counter(piece.dtype for piece in atoms.values())
    if len(counts) <= 1:
        return next((dtype.torch for dtype in counts), None)
    if will_cast:
        return None
    told = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    raise CkptError(
        f"the weights have several dtypes ({told}), in which no PaliGemma computes",
        code="FC458",
        where=where,
        hint="say which to cast to: dtype="
        + repr(settings.dtype or str(max(counts, key=lambda one: one.bits).torch)),
    )


def _check_positions(atoms: Mapping[str, Piece], settings: PaliGemmaSettings, where: str) -> None:
    vision = settings.model.data["vision_config"]
    wanted, table = vision["num_image_tokens"], atoms.get(_POSITIONS)
    if table is None or table.shape[0] == wanted:
        return
    have, patch = table.shape[0], vision["patch_size"]
    side = round(have**0.5)
    size = f' "image_size": {side * patch}' if side * side == have else " another `image_size`"
    raise CkptError(
        f"the file has {have} positions of image patches, and by the config pictures of "
        f"{vision['image_size']} pixels have {wanted}",
        code="FC205",
        where=where,
        key=_stored(table, _POSITIONS),
        hint=f"{settings.where} is of another release; this one's `vision_config` has{size}",
    )


def _num_rows(
    atoms: Mapping[str, Piece], detection: Detection, settings: PaliGemmaSettings, where: str
) -> int:
    """Rows of the file's embedding; those that are missing must be padding."""
    piece = atoms.get(EMBED) or atoms.get(_HEAD)
    have, want = (piece.shape[0] if piece else settings.num_rows), settings.num_rows
    if have == want or (have < want and detection.layout.ends_with_tokens):
        return have
    raise CkptError(
        f"the file's embedding has {have} rows, and `text_config.vocab_size` is {want}",
        code="FC418",
        where=where,
        key=_stored(piece, EMBED),
        hint=f"{settings.where} is of another release, or tokens were added without saving it",
    )


def _stored(piece: Piece | None, otherwise: str) -> str:
    return piece.source.name if piece is not None and piece.source is not None else otherwise


# --- the head -------------------------------------------------------------------------------------


def _settle_head(
    manifest: Manifest,
    names: Mapping[str, TensorInfo],
    atoms: Mapping[str, Piece],
    settings: PaliGemmaSettings,
    embedding: str,
) -> tuple[Manifest, tuple[Finding, ...]]:
    """Config and file must say the same of the head; a tied one is the embedding, once."""
    head, embed = atoms.get(_HEAD), atoms.get(EMBED)
    if not settings.tied:
        if head is None:
            raise CkptError(
                f"by {settings.tie_told_by} the model has an output head of its own, and the file "
                "has none",
                code="FC457",
                where=manifest.uri,
                hint=f'"tie_word_embeddings": true in {settings.where}, if the head is the '
                "embedding",
            )
        return manifest, ()
    if head is None or head.source is None:
        return manifest, ()
    if embed is None or embed.source is None:
        note = _note(head.source, "the output head is the embedding, which the file has not")
        return _renamed(manifest, names[head.source.name], head.source.name, embedding), (note,)
    if head.identity != embed.identity and not _same_bits(head.source, embed.source):
        raise CkptError(
            f"`{escape(head.source.name)}` differs from `{escape(embed.source.name)}`, and by "
            f"{settings.tie_told_by} they are one tensor",
            code="FC457",
            where=manifest.uri,
            key=head.source.name,
            hint=f'"tie_word_embeddings": false in {settings.where}, if the head was trained; '
            "without the head in the file, if it was not",
        )
    dropped = names[head.source.name].name
    kept = tuple(tensor for tensor in manifest.tensors if tensor.name != dropped)
    note = _note(head.source, f"equal to `{embed.source.name}`, bit for bit; stored twice")
    return replace(manifest, tensors=kept), (note,)


def _note(tensor: TensorInfo, detail: str) -> Finding:
    return Finding(code="FC210", severity="info", key=tensor.name, detail=detail)


def _renamed(manifest: Manifest, tensor: TensorInfo, bare: str, name: str) -> Manifest:
    """The manifest with one tensor under another name, behind the same wrapper prefix."""
    prefix = tensor.name.removesuffix(bare) if tensor.name.endswith(bare) else ""
    tensors = tuple(
        replace(one, name=prefix + name) if one is tensor else one for one in manifest.tensors
    )
    return replace(manifest, tensors=tensors)


def _same_bits(a: TensorInfo, b: TensorInfo) -> bool:
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    mine, other = (Step(source=one, name=one.name, dtype=one.dtype) for one in (a, b))
    buffer, stop = bytearray(BLOCK_BYTES), threading.Event()
    return first_difference(mine, other, buffer, Derived(), lambda _: None, stop) is None
