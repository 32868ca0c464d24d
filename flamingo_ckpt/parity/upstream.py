"""OpenFlamingo's own package as one side: its classes, put together as its factory does it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError

if TYPE_CHECKING:
    from torch import nn

    from flamingo_ckpt.models.config import ModelConfig

#: What `--reference` may name.
REFERENCES = ("open-flamingo",)
#: What upstream's classes fix, by the config's names for it.
_FIXED = {
    "perceiver_dim_head": 64,
    "perceiver_heads": 8,
    "perceiver_num_latents": 64,
    "perceiver_ff_mult": 4,
    "cross_attn_dim_head": 64,
    "cross_attn_heads": 8,
    "cross_attn_ff_mult": 4,
}


def build_upstream(config: ModelConfig, dtype: str, device: str) -> nn.Module:
    """Upstream's `Flamingo` for a config, its weights random or on meta.

    Vision tower and language model are the installed open_clip's and transformers'; MPT-1B's own
    code is on no registry, so this package's class takes its place.

    Raises:
        CkptError: FC405 where the package is not installed, or fixes another size than the config
            has.
    """
    if importlib.util.find_spec("open_flamingo") is None:
        raise CkptError(
            "the package open_flamingo is not installed",
            code="FC405",
            hint="`pip install --no-deps open-flamingo==2.0.1 einops-exts`, or leave --reference "
            "out",
        )
    for name, fixed in _FIXED.items():
        if config.data.get(name, fixed) != fixed:
            raise CkptError(
                f"`{name}` is {config.data[name]}, and upstream's classes fix it at {fixed}",
                code="FC405",
                where=config.where,
                hint="leave --reference out: this package's own classes take any size",
            )
    import torch

    from flamingo_ckpt.models.assemble import quiet_libraries
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    with quiet_libraries(), torch.device(device), torch.no_grad():
        model = _flamingo(config)
    wanted = getattr(torch, dtype)
    for part in model.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(wanted)
    return model


def _flamingo(config: ModelConfig) -> nn.Module:
    from open_flamingo.src.flamingo import Flamingo  # type: ignore[import-untyped]
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin  # type: ignore[import-untyped]
    from open_flamingo.src.helpers import PerceiverResampler  # type: ignore[import-untyped]
    from open_flamingo.src.utils import extend_instance  # type: ignore[import-untyped]
    from torch import nn

    from flamingo_ckpt.models import backbones
    from flamingo_ckpt.models.assemble import language_config

    data = config.data
    text, family, layers = language_config(config)
    language: Any
    language, _ = backbones.language_model(text, family, None)
    _take_masks_by_name(language)
    extend_instance(language, FlamingoLMMixin)
    language.set_decoder_layers_attr_name(layers)
    holder: Any = nn.Module()  # upstream takes `.visual` of a whole CLIP
    holder.visual = backbones.open_clip_vision_tower(
        data["vision_config"], data["vision_tokens"], config.where
    )
    width = data["vision_config"]["hidden_size"]
    model = Flamingo(
        holder,
        language,
        data.get("eoc_token_id"),
        data.get("media_token_id"),
        vis_dim=width,
        cross_attn_every_n_layers=data["cross_attn_every_n_layers"],
    )
    model.perceiver = PerceiverResampler(
        dim=width,
        depth=data["perceiver_depth"],
        max_num_media=data.get("max_num_media"),
        max_num_frames=data.get("max_num_frames"),
    )
    model.perceiver._use_gradient_checkpointing = False
    return model  # type: ignore[no-any-return]


def _take_masks_by_name(language: nn.Module) -> None:
    """Upstream's layer hands its second argument on as `attention_mask`; MosaicGPT's is a bias."""
    from flamingo_ckpt.models.modules.mosaic_gpt import MosaicBlock

    class Named(MosaicBlock):  # type: ignore[no-untyped-call]
        def forward(  # type: ignore[override]
            self, hidden_states: Any, attention_mask: Any, **kwargs: Any
        ) -> Any:
            return super().forward(hidden_states, attention_mask, **kwargs)

    for part in language.modules():
        if type(part) is MosaicBlock:
            part.__class__ = Named
