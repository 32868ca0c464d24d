"""Turn what a user asked of `convert` and `verify` into a plan: where layouts meet models.

A model's config tells what no shape does (numbers of heads), which keys the destination must have,
and what goes into the `config.json` beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.bases import Base
from flamingo_ckpt.diff.sides import Side, checkpoint_side, model_side
from flamingo_ckpt.errors import CkptError, Finding, name_some
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.mapping import assemble, read_atoms
from flamingo_ckpt.layouts.registry import layout_named
from flamingo_ckpt.map_checks import Expected
from flamingo_ckpt.map_plan import MapOptions, make_map_plan
from flamingo_ckpt.models.head_counts import head_counts
from flamingo_ckpt.plan import Plan, make_plan
from flamingo_ckpt.selection import PlanOptions
from flamingo_ckpt.tensors import DTYPES, Manifest, TensorInfo
from flamingo_ckpt.vocabulary import EMBED, ROWS_KEY, Rows

if TYPE_CHECKING:
    from flamingo_ckpt.models.config import ModelConfig

#: A preset to show, by what kind of model is converted.
_PRESET_OF_SPACE = {
    "flamingo": "openflamingo-3b-vitl-mpt1b",
    "clip": "vit-l-14-quickgelu",
    "paligemma": "paligemma-3b-pt-224",
}
#: What a folder's `config.json` says of a conversion that could not be complete.
PARTIAL_FIELD = "flamingo_ckpt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of `convert` and `verify` that concern layouts.

    Attributes:
        to: `--to`; None keeps the layout.
        source_layout: `--from`.
        vocab_rows: `--vocab-rows`.
        config: `--config`: a file, a folder with one, or a preset.
        bases: `--base-vision`, `--base-language`.
        is_folder: whether the destination is a folder, which gets a `config.json`.
        checks_config: whether a folder without a config is refused (`verify` does not write one).
    """

    to: str | None = None
    source_layout: str | None = None
    vocab_rows: int | None = None
    config: str | None = None
    bases: tuple[Base, ...] = ()
    is_folder: bool = False
    checks_config: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan, and the files that a folder gets beside the weights.

    Attributes:
        generated: name -> content.
    """

    plan: Plan
    generated: Mapping[str, bytes] = field(default_factory=dict)


def prepare(manifest: Manifest, options: PlanOptions, request: Request) -> Prepared:
    """Plan a conversion.

    Raises:
        CkptError: what `make_plan` and `make_map_plan` raise; FC006 options that need `--to`; FC421
            a whole model's folder without a config.
    """
    prepared = _prepare(manifest, options, request)
    if not request.is_folder or options.dtype == "keep":
        return prepared
    return _with_stated_dtype(prepared, manifest, options.dtype)


def _prepare(manifest: Manifest, options: PlanOptions, request: Request) -> Prepared:
    if request.to is None:
        _refuse_idle(request)
        return Prepared(plan=make_plan(manifest, options))
    target = layout_named(request.to)
    config = _config(manifest, request, target)
    rows = _rows(manifest, request, target, config)
    mapping = MapOptions(
        to=target.name,
        source_layout=request.source_layout,
        rows=rows,
        dims=head_counts(config),
        family=family_of(config),
        expected=_expected(config, target) if request.config else (),
        where_expected=config.where if config else "",
    )
    plan = make_map_plan(manifest, options, mapping, request.bases)
    if not (request.is_folder and target.hf_config):
        return Prepared(plan=plan)
    if request.config is None and config is not None and not _is_kept(plan):
        # A config that is written is checked as if it had been named.
        return _prepare(manifest, options, replace(request, config=_beside(manifest)))
    return _with_config(plan, manifest, request, config)


def _refuse_idle(request: Request) -> None:
    given = {
        "--from": request.source_layout,
        "--vocab-rows": request.vocab_rows,
        "--config": request.config,
    } | {f"--base-{base.kind}": base for base in request.bases}
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        raise CkptError(
            f"{', '.join(idle)} without --to: the layout is kept, so there is nothing to do for it",
            code="FC006",
            hint="`flamingo-ckpt layouts` lists what --to can name",
        )


def _config(manifest: Manifest, request: Request, target: Layout) -> ModelConfig | None:
    """The model's config: what was named, else the one in the source's own folder.

    Nobody named that one, so it counts only where it is of the kind of model that is written.
    """
    from flamingo_ckpt.models.config import read_config

    if request.config:
        return read_config(request.config)
    own = own_config(manifest)
    is_of_kind = own is not None and layout_named(own.layout).space == target.space
    return own if is_of_kind else None


def own_config(manifest: Manifest) -> ModelConfig | None:
    """The config in a checkpoint's own folder, where it describes a whole model."""
    from flamingo_ckpt.models.config import config_beside, read_config

    try:
        if manifest.folder is None:
            return config_beside(manifest)
        return read_config(_beside(manifest))
    except CkptError as error:
        if error.code.startswith("FC47"):
            raise  # the hub: that there is a config is known, and what it says is not
        return None  # a partial model's config, or another kind's; nothing was asked of it


def _beside(manifest: Manifest) -> str:
    """The source's folder, in a form that is no preset's name."""
    return os.path.abspath(manifest.folder or "")


def _rows(manifest: Manifest, request: Request, target: Layout, config: ModelConfig | None) -> Rows:
    if request.vocab_rows is not None:
        return Rows(wanted=request.vocab_rows, why="--vocab-rows")
    recorded = manifest.metadata.get(ROWS_KEY, "")
    if recorded.isascii() and recorded.isdigit() and len(recorded) < 10:
        return Rows(
            wanted=int(recorded),
            must_be_zero=True,
            is_remembered=True,
            why="as many as it had before",
        )
    if target.space != "paligemma" or config is None or config.kind != "paligemma":
        return Rows()
    # Google's files end with the last real token; Hugging Face's are padded.
    if target.name.endswith("-npz"):
        wanted = config.data.get("image_token_index")
    else:
        wanted = config.data["text_config"].get("vocab_size")
    if not isinstance(wanted, int):
        return Rows()
    return Rows(wanted=wanted, must_be_zero=True, why=f"as {config.where} says")


def family_of(config: ModelConfig | None) -> str:
    """The language model that a config names; "" where the tables know none of that name."""
    from flamingo_ckpt.layouts.families import FAMILIES

    name = config.data.get("text_config", {}).get("model_type") if config is not None else None
    return name if isinstance(name, str) and name in FAMILIES else ""


def _expected(config: ModelConfig | None, target: Layout) -> tuple[Expected, ...]:
    """The model's keys in the target layout, without second names and recomputed buffers."""
    if config is None or config.kind == "siglip":  # which tells heads, and constructs nothing
        return ()
    return tuple(
        Expected(name=tensor.name, canonical=canonical, shape=tensor.shape)
        for canonical, tensor in expected_tensors(config, target)
    )


def expected_tensors(config: ModelConfig, target: Layout) -> list[tuple[str, TensorInfo]]:
    """(first canonical name, key with its shape) of everything that a model has in a layout.

    Raises:
        CkptError: FC416 where the config is of another kind of model.
    """
    from flamingo_ckpt.models.expectation import expect

    expectation = expect(config, _fullest_layout(config, target))
    source = layout_named(expectation.layout)
    of_language_model = config.kind == "language"
    if source.space != target.space or of_language_model != (target.name == "language-model"):
        raise CkptError(
            f"the config is of a {config.kind} model, and `{target.name}` names the tensors of a "
            f"{target.space} model",
            code="FC416",
            where=config.where,
            hint="--config wants the config of the model that is converted",
        )
    tensors = [
        TensorInfo(name=one.name, dtype=DTYPES[str(one.dtype)], shape=one.shape)
        for one in expectation.tensors
        if one.alias_of is None and one.kind == "parameter"
    ]
    detection = detect([one.name for one in tensors], config.where, among=(source.name,))
    dims = head_counts(config)
    reading = read_atoms(tensors, source.table(detection.family), dims)
    assembly = assemble(
        reading.atoms, target.table(detection.family if target.rules_of else ""), dims
    )
    return [
        (one.canonical[0], TensorInfo(name=one.name, dtype=one.dtype, shape=one.shape))
        for one in assembly.tensors
    ]


def _fullest_layout(config: ModelConfig, target: Layout) -> str:
    """The layout to ask a model in: the target's, else one that has a place for everything."""
    from flamingo_ckpt.models.expectation import LAYOUTS

    known = LAYOUTS[config.kind]
    return next((one for one in (target.name, "openflamingo") if one in known), config.layout)


def _with_config(
    plan: Plan, manifest: Manifest, request: Request, config: ModelConfig | None
) -> Prepared:
    from flamingo_ckpt.models.infer import infer_config

    if _is_kept(plan) and request.config is None:
        return Prepared(plan=plan)
    shapes = _canonical_shapes(plan)
    if config is not None and config.kind != "language":
        content = _completed(_hf_form(config), shapes)
        if plan.partial:
            content[PARTIAL_FIELD] = {"partial": True}
        return Prepared(plan=plan, generated={"config.json": _json(content)})
    if not plan.partial and request.checks_config:
        preset = _PRESET_OF_SPACE.get(plan.target.space if plan.target else "", "")
        raise CkptError(
            "the result is a whole model, and what no shape tells (heads, activation, epsilon) is "
            "not known",
            code="FC421",
            where=manifest.uri,
            hint="--config names its config.json or a preset"
            + (f", such as --config {preset}" if preset else "")
            + "; a .safetensors file as destination needs none",
        )
    families = plan.layout.families if plan.layout else ()
    inferred = infer_config(shapes, family=families[0] if len(families) == 1 else None)
    content = {
        **inferred.config,
        PARTIAL_FIELD: {
            "partial": True,
            "unknown": list(inferred.unknown),
            "assumed": dict(inferred.assumed),
        },
    }
    note = Finding(
        code="FC421",
        severity="info",
        detail="the folder is marked partial: its config holds what the shapes prove; unknown are "
        + name_some(list(inferred.unknown)),
        hint="--base-vision, --base-language and --config make it self-contained",
    )
    return Prepared(
        plan=replace(plan, findings=(*plan.findings, note)),
        generated={"config.json": _json(content)},
    )


def _hf_form(config: ModelConfig) -> dict[str, Any]:
    """The config as transformers reads it."""
    from flamingo_ckpt.models.clip_config import hf_clip_config

    if config.layout == "open_clip":
        return hf_clip_config(config.data, config.where)
    return dict(config.data)


def _is_kept(plan: Plan) -> bool:
    """Whether the source's own config, if it has one, still describes the destination."""
    is_same = plan.layout is not None and plan.layout.layout is plan.target
    return is_same and not plan.others and not plan.transformed


def _canonical_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of what the destination will hold."""
    assert plan.target is not None
    tensors = [
        TensorInfo(name=step.name, dtype=step.dtype, shape=step.shape) for step in plan.steps
    ]
    family = plan.layout.family if plan.layout and plan.target.rules_of else ""
    reading = read_atoms(tensors, plan.target.table(family), {})
    return {name: piece.shape for name, piece in reading.atoms.items()}


def _with_stated_dtype(prepared: Prepared, manifest: Manifest, dtype: str) -> Prepared:
    """The same, with a config that states the dtype of the weights beside it."""
    from flamingo_ckpt.models.config import read_json
    from flamingo_ckpt.models.stated_dtype import with_dtype

    made = prepared.generated.get("config.json")
    path = os.path.join(manifest.folder or "", "config.json")
    if made is None and not (manifest.folder and os.path.isfile(path)):
        return prepared
    try:
        config = json.loads(made) if made is not None else read_json(path)
    except CkptError:
        return prepared  # it goes along as it is
    if not isinstance(config, Mapping) or (stated := with_dtype(config, dtype)) == config:
        return prepared
    return replace(prepared, generated={**prepared.generated, "config.json": _json(stated)})


def _completed(data: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config with the vocabulary rows that the destination really has."""
    embed = shapes.get(EMBED)
    text = data.get("text_config")
    if embed is None or not isinstance(text, dict):
        return data
    return {**data, "text_config": {**text, "vocab_size": embed[0]}}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")


def open_sides(
    a: str,
    b: str,
    *,
    source_layout: str | None = None,
    config: str | None = None,
    wrapper_key: str | None = None,
    npy_bfloat16: bool = False,
) -> tuple[Side, Side, dict[str, int]]:
    """Open what `diff` compares: (A, B, numbers of heads).

    A model is taken in the layout of the checkpoint on the other side, where it has that one.

    Raises:
        CkptError: where a side cannot be read, or a config is invalid.
    """
    from flamingo_ckpt.models.config import MODEL_PREFIX, read_config
    from flamingo_ckpt.models.settings import settings_of

    configs = [read_config(uri) if uri.startswith(MODEL_PREFIX) else None for uri in (a, b)]
    told = read_config(config) if config else next((one for one in configs if one), None)
    files = [
        None if model else open_checkpoint(uri, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
        for uri, model in zip((a, b), configs, strict=True)
    ]
    own = [own_config(file) if file else None for file in files]
    dims = head_counts(told or next(filter(None, own), None))
    sides: list[Side | None] = [
        checkpoint_side(file, dims, source_layout if at == 0 else None) if file else None
        for at, file in enumerate(files)
    ]
    found: list[Side] = []
    for at, model in enumerate(configs):
        side, other = sides[at], sides[1 - at]
        if side is None and model is not None:
            side = model_side(model, _layout_for(model, other), dims)
        assert side is not None
        described = model or own[at]
        found.append(replace(side, settings=settings_of(described)) if described else side)
    return found[0], found[1], dims


def _layout_for(model: ModelConfig, other: Side | None) -> str:
    from flamingo_ckpt.models.expectation import LAYOUTS

    name = other.detection.layout.name if other and other.detection else model.layout
    name = {"openflamingo-full": "openflamingo"}.get(name, name)
    known = LAYOUTS[model.kind]
    return name if name in known else model.layout if model.layout in known else known[0]
