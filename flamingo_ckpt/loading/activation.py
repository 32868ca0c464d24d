"""Whether a model's vision tower has the activation that its weights were trained with.

QuickGELU and GELU have no parameters, so a checkpoint fits either, and features are a little wrong
with the other one. Where a config lies beside the weights, it tells.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.tensors import Manifest, escape

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger(__name__)

#: Classes of modules, in open_clip, timm and transformers.
_QUICK = frozenset({"QuickGELU", "QuickGELUActivation"})
_EXACT = frozenset({"GELU", "GELUActivation"})
#: Where a model has its tower: open_clip's, a Flamingo's, transformers'.
_TOWERS = ("visual", "vision_encoder", "vision_model")


def activation_findings(module: nn.Module, manifest: Manifest) -> list[Finding]:
    """A warning where the config in an opened folder tells another activation than the model has.

    It is logged too: what `load_state_dict` returns has no place for it.
    """
    told, own = _told(manifest), _of_module(module)
    if told is None or own is None or told == own:
        return []
    _logger.warning(
        "`%s` says `%s` for the vision tower, and the model computes `%s`: no tensor shows it, and "
        "features differ",
        escape(str(manifest.folder)),
        told,
        own,
    )
    return [
        Finding(
            code="FC407",
            severity="warning",
            detail=f"the vision tower's activation is `{told}` in the config beside the weights, "
            f"and `{own}` in the model",
            hint="build the model with `quick_gelu` (open_clip) or `hidden_act` (transformers) as "
            "the config has it",
        )
    ]


def _told(manifest: Manifest) -> str | None:
    from flamingo_ckpt.models.config import config_in
    from flamingo_ckpt.models.settings import settings_of

    if manifest.folder is None:
        return None
    try:
        config = config_in(str(manifest.folder))
    except CkptError:
        return None  # nothing was asked of it
    if config.kind not in ("clip", "clip_vision", "flamingo"):
        return None
    told = str(settings_of(config).get("vision.hidden_act"))
    return told if told in ("quick_gelu", "gelu") else None


def _of_module(module: nn.Module) -> str | None:
    found = {name: one for name, one in module.named_modules() if name.split(".")[-1] in _TOWERS}
    tower = found[min(found, key=len)] if found else module
    names = {type(one).__name__ for one in tower.modules()}
    is_quick, is_exact = not names.isdisjoint(_QUICK), not names.isdisjoint(_EXACT)
    if is_quick == is_exact:
        return None
    return "quick_gelu" if is_quick else "gelu"
