"""Language models and vision towers by the classes of transformers and open_clip.

Everything here imports torch inside functions and builds on whatever device is current, which is
the meta device for an expectation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.families import Family

if TYPE_CHECKING:
    from torch import nn

#: Fields that say nothing about the module tree and that a class may stumble over.
_NOISE = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
_CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)
_CLIP_VISION_FIELDS = (*_CLIP_FIELDS, "image_size", "patch_size", "num_channels")
_CLIP_TEXT_FIELDS = (*_CLIP_FIELDS, "vocab_size", "max_position_embeddings")
_GEMMA_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "attention_bias",
)


def language_model(text: Mapping[str, Any], family: Family | None) -> tuple[nn.Module, int]:
    """A causal language model and its hidden size.

    Args:
        text: its config, checked.
        family: where it is a known one; otherwise transformers' class for its `model_type`.

    Raises:
        CkptError: FC403 for a `model_type` that transformers has no causal language model for.
    """
    if family is not None and family.name == "mosaic_gpt":
        from flamingo_ckpt.models.modules.mosaic_gpt import MosaicGPT

        return MosaicGPT(text), text["d_model"]

    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if family is None:
        model_type = text["model_type"]
        fields = {k: v for k, v in text.items() if k not in _NOISE and not k.startswith("_")}
        fields.pop("model_type")
        fields.pop("decoder_layers_attr_name", None)
    else:
        model_type, fields = family.name, _known_fields(text, family)
    if model_type not in CONFIG_MAPPING:
        raise CkptError(
            f"transformers has no model of the type `{model_type}`",
            code="FC403",
            hint="models that bring their own code are not run; `pip install -U transformers` may "
            "know a newer type",
        )
    config = CONFIG_MAPPING[model_type](**fields)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CkptError(
            f"transformers has no causal language model of the type `{model_type}`", code="FC403"
        )
    model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model, config.hidden_size


def _known_fields(text: Mapping[str, Any], family: Family) -> dict[str, Any]:
    names = [
        family.hidden_size,
        family.num_layers,
        family.num_heads,
        family.mlp,
        "vocab_size",
        "tie_word_embeddings",
        *family.optional,
    ]
    return take(text, names)


def take(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields that are there and not null."""
    return {name: mapping[name] for name in names if mapping.get(name) is not None}


def hf_vision_tower(vision: Mapping[str, Any], *, projection: bool = False) -> nn.Module:
    """The vision tower of transformers, for a completed `vision_config`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**take(vision, (*_CLIP_VISION_FIELDS, "projection_dim")))
    return CLIPVisionModelWithProjection(config) if projection else CLIPVisionModel(config)


def hf_clip(data: Mapping[str, Any]) -> nn.Module:
    """The whole CLIP of transformers, for a completed config."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config=take(data["vision_config"], _CLIP_VISION_FIELDS),
        text_config=take(data["text_config"], _CLIP_TEXT_FIELDS),
        projection_dim=data["projection_dim"],
    )
    return CLIPModel(config)


def open_clip_model(data: Mapping[str, Any]) -> nn.Module:
    """The whole CLIP of open_clip, for a config in its own form."""
    from open_clip.model import (  # type: ignore[import-untyped]
        CLIP,
        CLIPTextCfg,
        CLIPVisionCfg,
        CustomTextCLIP,
    )

    options = take(data, ("quick_gelu", "init_logit_bias", "nonscalar_logit_scale"))
    vision = {**data["vision_cfg"], "timm_model_pretrained": False}  # no download
    model: nn.Module = (CustomTextCLIP if data.get("custom_text") else CLIP)(
        embed_dim=data["embed_dim"],
        vision_cfg=CLIPVisionCfg(**vision),
        text_cfg=CLIPTextCfg(**data["text_cfg"]),
        **options,
    )
    return model


def open_clip_vision_tower(vision: Mapping[str, Any]) -> nn.Module:
    """The vision tower of open_clip, with its projection, for a completed `vision_config`."""
    from flamingo_ckpt.models.clip_config import open_clip_vision

    data = {
        "embed_dim": vision.get("projection_dim") or 512,
        "quick_gelu": vision.get("hidden_act", "quick_gelu") == "quick_gelu",
        "vision_cfg": open_clip_vision(vision),
        # The class has no tower alone; the smallest text tower is built beside it and dropped.
        "text_cfg": {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1},
    }
    tower: nn.Module = open_clip_model(data).get_submodule("visual")
    return tower


def paligemma(data: Mapping[str, Any]) -> nn.Module:
    """PaliGemma of transformers, for a completed config."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    vision, text = data["vision_config"], data["text_config"]
    tied = text.get("tie_word_embeddings")
    tied = data.get("tie_word_embeddings") if tied is None else tied
    tied = True if tied is None else tied
    fields = (*_CLIP_VISION_FIELDS, "vision_use_head")
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **take(vision, fields)},
        text_config={**take(text, _GEMMA_FIELDS), "tie_word_embeddings": tied},
        projection_dim=data["projection_dim"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=tied,
    )
    return PaliGemmaForConditionalGeneration(config)
