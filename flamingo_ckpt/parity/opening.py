"""The two sides of a parity check: what each file is, which model it describes, what it lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flamingo_ckpt.bases import Base
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.layout import BASE_OF_GROUP, group_of
from flamingo_ckpt.layouts.mapping import read_atoms
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.prepare import PARTIAL_FIELD
from flamingo_ckpt.selection import PlanOptions, choose_tensors
from flamingo_ckpt.tensors import Manifest, escape

if TYPE_CHECKING:
    from flamingo_ckpt.models.config import ModelConfig

#: What no Flamingo's tower computes with, and some towers that stand alone have not.
PROJECTION = "vision.projection.weight"
#: Layout of a file -> the layout whose class computes it. What has no class of its own is carried
#: through the map into the class of its relatives.
_COMPUTED_AS: Mapping[str, str] = {
    "openflamingo": "openflamingo",
    "openflamingo-full": "openflamingo",
    "openflamingo-v1": "openflamingo",
    "hf-flamingo": "hf-flamingo",
    "open_clip": "open_clip",
    "open_clip-custom": "open_clip",
    "open_clip-visual": "open_clip",
    "timm-clip": "open_clip",
    "mobileclip": "open_clip",
    "hf-clip": "hf-clip",
}
_UNKNOWN_PRESET = {
    "flamingo": "openflamingo-3b-vitl-mpt1b",
    "clip": "vit-l-14-quickgelu",
    "paligemma": "paligemma-3b-pt-224",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a parity check.

    Attributes:
        name: `A`, the reference, or `B`.
        manifest: of the checkpoint.
        detection: the layout that its keys show.
        config: of the model; None until another place than its own folder tells it.
        has_own_config: whether the config lies beside the weights.
        bases: that fill what it lacks.
        computed_as: the layout whose class computes it.
        is_upstream: whether upstream's own classes compute it.
        is_tower: whether CLIP's image tower alone is computed, because one side has no more.
        is_projected: whether such a tower ends with its projection: both sides have one.
        wanted_bases: kinds of base that it lacks and that nobody gave.
    """

    name: str
    manifest: Manifest
    detection: Detection
    config: ModelConfig | None
    has_own_config: bool
    bases: tuple[Base, ...] = ()
    computed_as: str
    is_upstream: bool = False
    is_tower: bool = False
    is_projected: bool = False
    wanted_bases: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        """As the user named it."""
        return self.manifest.uri

    @property
    def kind(self) -> str:
        """`flamingo`, `clip`, `tower` (CLIP's image tower) or `paligemma`."""
        return "tower" if self.is_tower else self.space

    @property
    def space(self) -> str:
        """The kind of model that its keys name, and its config describes."""
        return self.detection.layout.space

    @property
    def model(self) -> ModelConfig:
        """The config; for a side that has one by now."""
        assert self.config is not None
        return self.config


def open_pair(
    a: str,
    b: str,
    *,
    config: str | None = None,
    bases: Sequence[Base] = (),
    source_layout: str | None = None,
    wrapper_key: str | None = None,
    npy_bfloat16: bool = False,
    upstream: bool = False,
) -> tuple[Side, Side]:
    """Open both sides and give each what it lacks.

    Args:
        a: the reference.
        b: what is compared with it.
        config: a `config.json`, a folder with one or a preset, for sides without a config.
        bases: fill what a side lacks, and replace nothing.
        source_layout: A's layout, by name; None goes by the evidence.
        wrapper_key: the weights of torch files are under this key.
        npy_bfloat16: read 2-byte void elements of `.npz` as bfloat16.
        upstream: whether A is computed by OpenFlamingo's own package.

    Raises:
        CkptError: where a side cannot be read, is of a kind that is not computed here (FC416), or
            has no config (FC421).
    """
    sides = [
        _open(name, uri, layout, wrapper_key, npy_bfloat16)
        for name, uri, layout in (("A", a, source_layout), ("B", b, None))
    ]
    first, second = sides
    if first.space != second.space:
        raise CkptError(
            f"A is `{first.detection.layout.name}`, a {first.kind} model, and B is "
            f"`{second.detection.layout.name}`, a {second.kind} model",
            code="FC416",
            hint="parity compares two forms of one model",
        )
    if upstream:
        if first.kind != "flamingo":
            raise CkptError(
                f"A is `{first.detection.layout.name}`, which the package open_flamingo does not "
                "compute",
                code="FC006",
                where=first.uri,
                hint="leave --reference out",
            )
        sides[0] = replace(first, computed_as="openflamingo", is_upstream=True)
    sides = _with_configs(sides, config)
    if first.space == "clip" and not all(_has_text(side) for side in sides):
        projected = all(PROJECTION in _atoms(side) for side in sides)
        sides = [replace(side, is_tower=True, is_projected=projected) for side in sides]
    return _with_bases(sides[0], bases), _with_bases(sides[1], bases)


def _open(
    name: str, uri: str, layout: str | None, wrapper_key: str | None, npy_bfloat16: bool
) -> Side:
    manifest = open_checkpoint(uri, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    chosen = choose_tensors(manifest, PlanOptions(max_expansion=float("inf")))
    among = (layout_named(layout).name,) if layout else ()
    detection = detect(chosen.names, manifest.uri, among=among)
    found = detection.layout
    computed_as = "paligemma" if found.space == "paligemma" else _COMPUTED_AS.get(found.name)
    if computed_as is None or found.refused:
        raise CkptError(
            f"`{found.name}` ({found.title}) is not computed here",
            code="FC416",
            where=manifest.uri,
            hint="parity computes " + ", ".join([*_COMPUTED_AS, "paligemma and its relatives"]),
        )
    own = _own_config(manifest, is_its_folders=found.hf_config)
    if own is not None and own.kind.partition("_")[0] != found.space:
        if found.hf_config:
            raise CkptError(
                f"the folder's config is of a {own.kind} model, and its keys are those of a "
                f"{found.space} model",
                code="FC416",
                where=own.where,
            )
        own = None  # the language model's beside a training checkpoint, say
    return Side(
        name=name,
        manifest=manifest,
        detection=detection,
        config=own,
        has_own_config=own is not None,
        computed_as=computed_as,
    )


def _own_config(manifest: Manifest, *, is_its_folders: bool) -> ModelConfig | None:
    """The config in a checkpoint's own folder.

    One that cannot be used is not replaced by another: nothing loads the folder as it is.

    Args:
        manifest: of the checkpoint.
        is_its_folders: whether a config that lies there has to be this model's.

    Raises:
        CkptError: what is wrong with it.
    """
    from flamingo_ckpt.models.config import config_in, read_json

    if manifest.folder is None:
        return None
    try:
        return config_in(manifest.folder)
    except CkptError as error:
        if error.code == "FC404" or (error.code == "FC403" and not is_its_folders):
            return None  # there is none, or it is of a kind of model that is not known here
        path = os.path.join(manifest.folder, "config.json")
        mark = read_json(path).get(PARTIAL_FIELD) if os.path.isfile(path) else None
        if isinstance(mark, dict) and mark.get("partial") is True:
            return None  # it holds what the shapes of a partial model prove, and no more
        raise


def _with_configs(sides: Sequence[Side], given: str | None) -> list[Side]:
    """The config of each side: its own, else what was named, else the other side's."""
    from flamingo_ckpt.models.config import read_config

    named = None
    if given is not None:
        named = read_config(given)
        if named.kind.partition("_")[0] != sides[0].space:
            raise CkptError(
                f"the config is of a {named.kind} model, and the checkpoints are of a "
                f"{sides[0].kind} model",
                code="FC416",
                where=named.where,
                hint="--config wants the config of the model that is compared",
            )
    found: list[Side] = []
    for side, other in zip(sides, reversed(sides), strict=True):
        config = side.config or named or other.config
        if config is None:
            raise CkptError(
                "neither side has a config, and what no shape tells (heads, activation, epsilon) "
                "is not known",
                code="FC421",
                where=side.uri,
                hint="--config names its config.json or a preset, such as --config "
                + _UNKNOWN_PRESET[side.kind],
            )
        found.append(replace(side, config=config))
    return found


def _has_text(side: Side) -> bool:
    """Whether a CLIP is more than its image tower, by its keys and by its config."""
    if side.model.kind == "clip_vision" or side.detection.layout.name == "open_clip-visual":
        return False
    return any(group_of(name) == "text" for name in _atoms(side))


def _with_bases(side: Side, bases: Sequence[Base]) -> Side:
    lacking = lacking_bases(side)
    used = tuple(base for base in bases if base.kind in lacking)
    have = {base.kind for base in used}
    return replace(
        side, bases=used, wanted_bases=tuple(kind for kind in lacking if kind not in have)
    )


def lacking_bases(side: Side) -> tuple[str, ...]:
    """The kinds of base that a partial Flamingo needs: `vision`, `language`, both or none."""
    if side.kind != "flamingo":
        return ()
    groups = {group_of(name) for name in _atoms(side)}
    return tuple(BASE_OF_GROUP[group] for group in ("vision", "lm.layers") if group not in groups)


def _atoms(side: Side) -> set[str]:
    """Canonical names of what a checkpoint holds."""
    chosen = choose_tensors(side.manifest, PlanOptions(max_expansion=float("inf")))
    table = side.detection.layout.table(side.detection.family)
    tensors = [replace(one, name=name) for name, one in chosen.names.items()]
    return set(read_atoms(tensors, table, {}).atoms)


def describe_config(side: Side) -> str:
    """Where a side's config comes from, for people."""
    where, folder = side.model.where, side.manifest.folder
    if "://" in side.uri and folder is not None and where.startswith(os.path.abspath(folder)):
        # a copy in the hub's cache, whose place means nothing to anybody
        return escape(f"{side.uri.rstrip('/')}/{os.path.basename(where)}")
    near = os.path.relpath(where) if os.path.isabs(where) else where
    return escape(where if near.startswith(os.pardir) else near)
