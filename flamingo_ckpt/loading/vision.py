"""Vision towers for a Flamingo: open_clip's, from any of the places that CLIP weights come from.

Only the vision half of a CLIP is built and read. It gives the patch tokens before `ln_post`, which
OpenFlamingo was trained on and which open_clip stopped giving in 2.23, and it has QuickGELU where
the weights say that they need it: a tag of open_clip's table, a config. A file of weights alone
does not say it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from flamingo_ckpt import hub
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.image_processor import image_processor, preprocess_of
from flamingo_ckpt.loading.places import (
    HF_WEIGHTS,
    HUB_PREFIX,
    LOCAL_PREFIX,
    OPEN_CLIP_WEIGHTS,
    Access,
    config_folder,
    fetch_file,
    fetch_weights,
    local_path,
)
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from torch import nn

_logger = logging.getLogger(__name__)

_OPEN_CLIP_CONFIG = "open_clip_config.json"
#: What to call the tower, and how its keys begin in a file: open_clip and OpenAI, transformers, a
#: whole Flamingo of OpenFlamingo's.
_PREFIXES: Final = (
    ("visual", ("visual.",)),
    ("visual", ("vision_model.", "visual_projection.")),
    ("vision_encoder", ("vision_encoder.",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTower:
    """A tower with what belongs to it.

    Attributes:
        module: open_clip's `VisionTransformer`, in evaluation mode.
        width: of its tokens: a Flamingo's `vis_dim`.
        image_processor: turns a PIL picture into `[3, height, width]`.
        config: its `vision_config`, as a Flamingo's config has it.
    """

    module: nn.Module
    width: int
    image_processor: Any
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What a tower is made of: open_clip's `model_cfg` and `preprocess_cfg`, and the weights.

    `is_told`: whether the activation is known to be that of the weights.
    """

    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    weights: str | None
    where: str
    has_projection: bool = True
    is_told: bool = True


def load_vision_tower(
    path: str,
    pretrained: str | None,
    access: Access,
    *,
    force_quick_gelu: bool | None = None,
    device: str | torch.device | None = None,
) -> VisionTower:
    """Build a tower and fill it.

    Args:
        path: a model name of open_clip; a folder (or `local-dir:` folder) with an
            `open_clip_config.json` or with a CLIP's `config.json` of transformers; a repository
            with one of them, `owner/name` with or without `hf-hub:`.
        pretrained: with a model name: a tag of open_clip's table, or a file in any format and
            layout that holds the tower (a whole CLIP does). With a folder or repository: None for
            its own weights, or such a file. None with a model name leaves the tower RANDOM, as
            open_clip does; a warning is logged.
        access: how files are looked for.
        force_quick_gelu: the activation, against what name, tag or config say.
        device: where to put it; None is the CPU.

    Raises:
        CkptError: FC450 no such place, FC451 no tower that gives tokens, FC452 no such tag; what
            the config check, the hub and the loading engine raise.
    """
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    source = _find(path, pretrained, access, force_quick_gelu)
    module = _build(source, on_meta=source.weights is not None)
    if source.weights is None:
        _logger.warning(
            "the vision tower `%s` has RANDOM weights: no `clip_vision_encoder_pretrained` is "
            "given",
            path,
        )
    else:
        _fill(module, source, device)
    module = module.to(device) if device is not None else module
    return VisionTower(
        module=module.eval(),
        width=_width(source.model),
        image_processor=_processor(source),
        config=_vision_config(source),
    )


# --- where it comes from --------------------------------------------------------------------------


def _find(path: str, pretrained: str | None, access: Access, quick_gelu: bool | None) -> _Source:
    config = None if _is_place(path) else _named(path)
    if config is not None:
        source = _of_name(path, config, pretrained, access)
    else:
        source = _of_place(path, pretrained, access)
    if quick_gelu is not None:
        return replace(source, model={**source.model, "quick_gelu": quick_gelu})
    if not source.is_told:
        _mention_quick_gelu(path, source.model)
    return source


def _is_place(path: str) -> bool:
    return path.startswith((HUB_PREFIX, LOCAL_PREFIX)) or os.path.isdir(path)


def _named(name: str) -> Mapping[str, Any] | None:
    """The config of a model of open_clip's own list; None for a repository's `owner/name`."""
    import open_clip  # type: ignore[import-untyped]

    config: Mapping[str, Any] | None = open_clip.get_model_config(name.replace("/", "-"))
    if config is None and not ("/" in name and hub.is_repo_id(name)):
        raise CkptError(
            f"open_clip has no model `{escape(name)}`, and there is no such folder",
            code="FC450",
            hint="`open_clip.list_models()` lists the names; a repository of the hub is "
            f"`{HUB_PREFIX}owner/name`",
        )
    return config


def _of_name(
    name: str, config: Mapping[str, Any], pretrained: str | None, access: Access
) -> _Source:
    """A model of open_clip's own list, with a tag or a file."""
    import open_clip

    source = _Source(model=config, preprocess={}, weights=None, where=name)
    if not pretrained:
        return source
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        return _of_tag(source, tag, pretrained, access)
    weights = _file(pretrained, open_clip.list_pretrained_tags_by_model(name), name)
    return replace(source, weights=weights, is_told=False)


def _of_tag(source: _Source, tag: Mapping[str, Any], name: str, access: Access) -> _Source:
    place = tag.get("hf_hub") or ""
    if not place:
        raise CkptError(
            f"the tag `{name}` of `{source.where}` is kept outside the hub: {tag.get('url')}",
            code="FC452",
            hint="download that file, and name it in place of the tag",
        )
    repo_id, _, filename = place.rpartition("/")
    repo_id = HUB_PREFIX + repo_id
    if filename:
        weights = fetch_file(repo_id, filename, access)
    else:
        weights = fetch_weights(
            repo_id, config_folder(repo_id, access, "CLIP"), access, OPEN_CLIP_WEIGHTS
        )
    # open_clip itself only warns where the tag's weights were trained with the other activation
    quick_gelu = bool(tag.get("quick_gelu") or source.model.get("quick_gelu"))
    model = {**source.model, "quick_gelu": quick_gelu}
    return replace(source, model=model, preprocess=tag, weights=weights)


def _mention_quick_gelu(name: str, config: Mapping[str, Any]) -> None:
    """A file does not say its activation, and a wrong one is invisible in the keys."""
    import open_clip

    if not config.get("quick_gelu") and open_clip.get_model_config(f"{name}-quickgelu"):
        _logger.warning(
            "the vision tower `%s` is built with GELU. Weights of OpenAI (and some others) need "
            "QuickGELU, and no file tells: name `%s-quickgelu` or give `force_quick_gelu` (True or "
            "False) to be certain",
            name,
            name,
        )


def _file(pretrained: str, tags: list[str], where: str) -> str:
    if os.path.exists(os.path.expanduser(pretrained)):
        return os.path.expanduser(pretrained)
    raise CkptError(
        f"`{escape(pretrained)}` is neither a file nor a tag of `{escape(where)}`",
        code="FC452",
        hint=("its tags: " + ", ".join(tags)) if tags else "name a file",
    )


def _of_place(path: str, pretrained: str | None, access: Access) -> _Source:
    """A folder or a repository that brings its config."""
    folder = config_folder(path, access, "CLIP")
    native = os.path.join(folder, _OPEN_CLIP_CONFIG)
    source = _of_open_clip(native) if os.path.isfile(native) else _of_transformers(folder)
    if pretrained:
        weights = _file(pretrained, [], path)
    elif os.path.isfile(native):
        weights = fetch_weights(path, folder, access, OPEN_CLIP_WEIGHTS)
    elif local_path(path, "CLIP") is None:
        weights = fetch_weights(path, folder, access, HF_WEIGHTS)
    else:
        weights = folder
    return replace(source, weights=weights)


def _of_open_clip(path: str) -> _Source:
    from flamingo_ckpt.models.config import read_config, read_json

    config = read_config(path)
    document = read_json(path)
    preprocess = document.get("preprocess_cfg") or {}
    return _Source(model=config.data, preprocess=preprocess, weights=None, where=path)


def _of_transformers(folder: str) -> _Source:
    from flamingo_ckpt.models.clip_config import is_quick_gelu, open_clip_vision
    from flamingo_ckpt.models.config import config_in, read_json

    config = config_in(folder)
    if config.kind not in ("clip", "clip_vision"):
        raise CkptError(
            f"`model_type` is `{escape(str(config.data.get('model_type')))}`, which is no CLIP",
            code="FC451",
            where=config.where,
            hint="another tower can be set as `vision_encoder` of a `Flamingo`, with its own "
            "`vis_dim`",
        )
    vision = config.data["vision_config"] if config.kind == "clip" else config.data
    path = os.path.join(folder, "preprocessor_config.json")
    model = {
        # CLIPModel goes by the outer one; LAION's configs have another one inside
        "embed_dim": config.data.get("projection_dim") or 512,
        "quick_gelu": is_quick_gelu(vision, "", config.where),
        "vision_cfg": open_clip_vision(vision),
    }
    return _Source(
        model=model,
        preprocess=preprocess_of(read_json(path), path) if os.path.isfile(path) else {},
        weights=None,
        where=config.where,
        has_projection=config.kind == "clip"
        or "CLIPVisionModelWithProjection" in (config.data.get("architectures") or []),
    )


# --- the module -----------------------------------------------------------------------------------


def _build(source: _Source, *, on_meta: bool) -> nn.Module:
    """The tower alone: open_clip has no function for it, so the smallest text tower goes along."""
    import contextlib

    import torch

    from flamingo_ckpt.models.backbones import open_clip_model

    _refuse_other_towers(source)
    smallest = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    data = {
        "embed_dim": source.model["embed_dim"],
        "quick_gelu": bool(source.model.get("quick_gelu")),
        "vision_cfg": dict(source.model["vision_cfg"]),
        "text_cfg": smallest,
    }
    try:
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            tower: Any = open_clip_model(data).get_submodule("visual")
    except Exception as error:  # whatever open_clip makes of fields that it does not know
        raise _unusable("the vision tower cannot be constructed", "FC405", source, error) from error
    if not source.has_projection:
        tower.proj = None  # nothing uses it, and there is nothing to put in
    tower.output_tokens = True
    # the tokens that OpenFlamingo was trained on, as open_clip gave them until 2.22
    tower.final_ln_after_pool = True
    return tower  # type: ignore[no-any-return]


def _refuse_other_towers(source: _Source) -> None:
    vision = source.model["vision_cfg"]
    for is_other, what in (
        (vision.get("timm_model_name"), "a tower of timm"),
        (isinstance(vision.get("layers"), list), "a ResNet"),
        (vision.get("attentional_pool"), "a tower with attentional pooling"),
    ):
        if is_other:
            raise CkptError(
                f"`{escape(source.where)}` is {what}, which gives no patch tokens",
                code="FC451",
                where=escape(source.where),
                hint="take a vision transformer such as ViT-L-14, or set any module that gives "
                "`[batch, tokens, vis_dim]` as `vision_encoder` of a `Flamingo`",
            )


def _fill(module: nn.Module, source: _Source, device: str | torch.device | None) -> None:
    """Everything of the tower has to be there; a whole CLIP's other half is not read.

    The tower is filled under the name that it has in the file, because its own names alone
    (`transformer.resblocks.0`) are those of the text tower too.
    """
    from torch import nn

    from flamingo_ckpt.formats import open_checkpoint
    from flamingo_ckpt.layouts.prefixes import strip_wrappers
    from flamingo_ckpt.loading.engine import load_into
    from flamingo_ckpt.loading.options import LoadOptions

    assert source.weights is not None
    manifest = open_checkpoint(source.weights)
    names = [strip_wrappers(tensor.name)[0] for tensor in manifest.tensors]
    for holder, prefixes in _PREFIXES:
        if any(name.startswith(prefixes) for name in names):
            named = type(type(module).__name__, (nn.ModuleDict,), {})  # messages tell its name
            module = named({holder: module})
            include: tuple[str, ...] = tuple(f"*{prefix}*" for prefix in prefixes)
            break
    else:
        include = ()
    report = load_into(module, manifest, LoadOptions(device=device, include=include))
    for table in report.resized:
        _logger.warning("`%s`: %s", source.where, table.as_finding().detail)


def _width(model: Mapping[str, Any]) -> int:
    return int(model["vision_cfg"].get("width", 768))


def _vision_config(source: _Source) -> Mapping[str, Any]:
    from flamingo_ckpt.models.clip_config import hf_clip_config

    text = {"width": 64, "heads": 1, "layers": 1}
    config = hf_clip_config({**source.model, "text_cfg": text}, source.where)
    vision: Mapping[str, Any] = config["vision_config"]
    return vision


def _processor(source: _Source) -> Any:
    try:
        return image_processor(source.preprocess, source.model["vision_cfg"].get("image_size", 224))
    except Exception as error:  # open_clip asserts its choices
        raise _unusable("the image preprocessing is not one", "FC401", source, error) from error


def _unusable(what: str, code: str, source: _Source, error: Exception) -> CkptError:
    reason = escape(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")[:300]
    return CkptError(f"{what}: {reason}", code=code, where=escape(source.where))
