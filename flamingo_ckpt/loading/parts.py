"""The part of a Flamingo that a tensor belongs to, where no table knows the language model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from flamingo_ckpt.loading.targets import Target

#: Pattern of a name -> part; the first that fits. As OpenFlamingo's module names its parts.
_PARTS: Mapping[str, str] = {
    r"vision_encoder\.": "vision",
    r"perceiver\.": "perceiver",
    r"lang_encoder\..*\bgated_cross_attn_layers?\.": "xattn",
    r"lang_encoder\..*\bdecoder_layer\.": "lm.layers",
    r"lang_encoder\.old_decoder_blocks\.": "lm.layers",
    r"lang_encoder\.(.*\.)?(wte|embed_in|\w*embed(ding)?s?(_tokens)?)\.weight$": "lm.embed",
    r"lang_encoder\.": "lm.rest",
}


def parts_by_name(targets: Sequence[Target], known: Mapping[str, str]) -> dict[str, str]:
    """Module key -> part of a Flamingo, of all its tensors.

    Args:
        targets: of the module.
        known: what a layout tells; it wins.
    """
    return {target.key: known.get(target.key) or _part(target) for target in targets}


def _part(target: Target) -> str:
    parts = (part for name in target.names for form, part in _PARTS.items() if re.match(form, name))
    return next(parts, "")
