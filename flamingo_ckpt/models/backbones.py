"""Language models and vision towers by the classes of transformers and open_clip.

Everything here imports torch inside functions and builds on whatever device is current, which is
the meta device for an expectation. What a class computes with (epsilons, activations, rotary bases)
goes into it too, under the name that transformers 5 has for it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.families import Family

if TYPE_CHECKING:
    from torch import nn

#: Fields that say nothing about the module tree and that a class may stumble over.
_NOISE = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
#: Names of transformers 4, which the configs of version 5 still take and translate.
_LEGACY = ("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor")
#: Here null is a value: no cap, no window.
_NULLS = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
_CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
_CLIP_VISION_FIELDS = (*_CLIP_FIELDS, "image_size", "patch_size", "num_channels")
_CLIP_TEXT_FIELDS = (
    *_CLIP_FIELDS,
    *("vocab_size", "max_position_embeddings"),
    # where the text is pooled
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def language_model(
    text: Mapping[str, Any], family: Family | None, attn_implementation: str | None = None
) -> tuple[nn.Module, int]:
    """A causal language model and its hidden size.

    Args:
        text: its config, checked.
        family: where it is a known one; otherwise transformers' class for its `model_type`.
        attn_implementation: `eager` or `sdpa`; a class without the latter computes as it does.

    Raises:
        CkptError: FC403 for a `model_type` that transformers has no causal language model for.
    """
    if family is not None and family.name == "mosaic_gpt":
        from flamingo_ckpt.models.modules.mosaic_gpt import MosaicGPT, mosaic_config

        mosaic = mosaic_config(text)
        # as transformers' own classes, which choose the fused kernel where they have it
        mosaic._attn_implementation = attn_implementation or "sdpa"
        return MosaicGPT(mosaic), text["d_model"]

    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model_type = text["model_type"] if family is None else family.name
    if model_type not in CONFIG_MAPPING:
        raise CkptError(
            f"transformers has no model of the type `{model_type}`",
            code="FC403",
            hint="models that bring their own code are not run; `pip install -U transformers` may "
            "know a newer type",
        )
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_language_fields(text, family, config_class))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CkptError(
            f"transformers has no causal language model of the type `{model_type}`", code="FC403"
        )
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if attn_implementation == "sdpa" and not model_class._supports_sdpa:
        attn_implementation = None
    model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=attn_implementation
    )
    return model, config.hidden_size


def _language_fields(
    text: Mapping[str, Any], family: Family | None, config_class: type
) -> dict[str, Any]:
    """What the class is given: copies, because transformers' configs change what they get."""
    if family is None:
        fields = {k: v for k, v in text.items() if k not in _NOISE and not k.startswith("_")}
        fields.pop("model_type")
        fields.pop("decoder_layers_attr_name", None)
        return copy.deepcopy(fields)
    fields = copy.deepcopy(take(text, (*_own_fields(config_class), *_LEGACY)))
    if family.name == "mpt" and isinstance(fields.get("attn_config"), dict):
        fields["attn_config"] = _mpt_attention(fields["attn_config"])
    pad = fields.get("pad_token_id")
    if isinstance(pad, int) and pad < 0:  # LLaMA 1 says -1 for "none"
        del fields["pad_token_id"]
    return fields


def _mpt_attention(given: Mapping[str, Any]) -> dict[str, Any]:
    """MPT's attention as transformers' class takes it.

    Which kernel MosaicML's own class was to use is of no consequence; `attn_pdrop`, checked to be
    0, may be 0.0, which the class does not take for a whole number.
    """
    names = ("clip_qkv", "softmax_scale", "alibi", "alibi_bias_max")
    return take(given, names)


def _own_fields(config_class: type) -> list[str]:
    """The fields that a class of config adds to what every config of transformers has."""
    from transformers import PretrainedConfig

    own = config_class.__mro__[: config_class.__mro__.index(PretrainedConfig)]
    shared = {"model_type", "keys_to_ignore_at_inference", "attribute_map", "sub_configs"}
    shared |= {"base_model_tp_plan", "base_model_pp_plan", "base_config_key"}
    return [name for one in own for name in inspect.get_annotations(one) if name not in shared]


def take(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields that are there and not null."""
    return {name: mapping[name] for name in names if mapping.get(name) is not None}


def _attention(name: str | None) -> dict[str, Any]:
    """The argument of transformers' configs; without it each class has its own default."""
    return {} if name is None else {"attn_implementation": name}


def hf_vision_tower(
    vision: Mapping[str, Any], *, projection: bool = False, attn_implementation: str | None = None
) -> nn.Module:
    """The vision tower of transformers, for a completed `vision_config`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    fields = take(vision, (*_CLIP_VISION_FIELDS, "projection_dim"))
    config = CLIPVisionConfig(**fields, **_attention(attn_implementation))
    return CLIPVisionModelWithProjection(config) if projection else CLIPVisionModel(config)


def hf_clip(data: Mapping[str, Any], attn_implementation: str | None = None) -> nn.Module:
    """The whole CLIP of transformers, for a completed config."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config=take(data["vision_config"], _CLIP_VISION_FIELDS),
        text_config=take(data["text_config"], _CLIP_TEXT_FIELDS),
        projection_dim=data["projection_dim"],
        **_attention(attn_implementation),
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


def open_clip_vision_tower(vision: Mapping[str, Any], tokens: str, where: str = "") -> nn.Module:
    """The vision tower of open_clip, with its projection, for a completed `vision_config`.

    It gives a pair: what is pooled, and the patch tokens, which is what a Flamingo takes.

    Args:
        vision: as transformers has it.
        tokens: `before_ln_post`, where every OpenFlamingo was trained, or `after_ln_post`, which is
            what open_clip since 2.23 does by itself.
        where: the config's name, for messages.

    Raises:
        CkptError: FC405 for an activation that open_clip does not have.
    """
    from flamingo_ckpt.models.clip_config import is_quick_gelu, open_clip_vision

    data = {
        "embed_dim": vision.get("projection_dim") or 512,
        "quick_gelu": is_quick_gelu(vision, "vision_config.", where),
        "vision_cfg": {
            **open_clip_vision(vision),
            "output_tokens": True,
            "final_ln_after_pool": tokens == "before_ln_post",
        },
        # The class has no tower alone; the smallest text tower is built beside it and dropped.
        "text_cfg": {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1},
    }
    tower: nn.Module = open_clip_model(data).get_submodule("visual")
    return tower


def paligemma(data: Mapping[str, Any], attn_implementation: str | None = None) -> nn.Module:
    """PaliGemma of transformers, for a completed config."""
    from transformers import CONFIG_MAPPING, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    vision, text = data["vision_config"], data["text_config"]
    # Version 5 writes the inner field's default beside an upper `false`, version 4 the other way.
    tied = False not in (text.get("tie_word_embeddings"), data.get("tie_word_embeddings"))
    image_token = data.get("image_token_index")
    image_token = data.get("image_token_id") if image_token is None else image_token
    config = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **take(vision, (*_CLIP_VISION_FIELDS, "vision_use_head")),
        },
        text_config={
            **_gemma_fields(text, CONFIG_MAPPING[text["model_type"]]),
            "model_type": text["model_type"],
            "tie_word_embeddings": tied,
        },
        projection_dim=data["projection_dim"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=tied,
        **_attention(attn_implementation),
        **({} if image_token is None else {"image_token_index": image_token}),
    )
    return PaliGemmaForConditionalGeneration(config)


def _gemma_fields(text: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    names = _own_fields(config_class)
    fields = copy.deepcopy(take(text, (*names, *_LEGACY)))
    fields |= {
        name: None for name in _NULLS if name in names and name in text and text[name] is None
    }
    if text["model_type"] == "gemma" and text.get("hidden_activation"):
        # transformers 4 had both names, and `hidden_act` lost.
        fields["hidden_act"] = text["hidden_activation"]
    return fields
