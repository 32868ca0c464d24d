"""What a model computes that no tensor shows: activation, epsilon, heads, which tokens are taken.

Two checkpoints with the same bits compute differently where these differ, so `inspect` tells them
and `diff` compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.clip_config import hf_clip_config
from flamingo_ckpt.models.config import ModelConfig

#: Which tokens of the tower the perceiver is given: those that OpenFlamingo was trained on.
TOKENS_FIELD = "vision_tokens"
TRAINED_TOKENS = "before_ln_post"

Settings = Mapping[str, str | int | float | bool]

# What transformers' classes take where a config says nothing.
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TOWER = ("hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size")
_CLIP_TEXT = ("hidden_act", "layer_norm_eps", "num_attention_heads")
#: Fields of language models that change the arithmetic; compared where both sides have them.
_LANGUAGE = (
    *("hidden_act", "hidden_activation", "activation_function"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("num_attention_heads", "num_key_value_heads", "n_heads", "n_head"),
    *("rope_theta", "rotary_pct", "rotary_emb_base", "rotary_dim", "use_parallel_residual"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("alibi_bias_max", "do_layer_norm_before"),
)


def settings_of(config: ModelConfig) -> Settings:
    """The settings of a model by dotted names, such as `vision.hidden_act`.

    Those that the config leaves to a class of transformers have that class's default; of a
    language model only those that are given.
    """
    data = config.data
    if config.kind == "flamingo":
        return {
            **_section("vision", data["vision_config"], _TOWER, _CLIP),
            "vision.tokens": data.get(TOKENS_FIELD) or TRAINED_TOKENS,
            **_language(data["text_config"]),
        }
    if config.kind == "clip":
        return _clip(data, config.where)
    if config.kind == "clip_vision":
        return _section("vision", data, _TOWER, _CLIP)
    if config.kind == "paligemma":
        return {
            **_section("vision", data["vision_config"], _TOWER, _SIGLIP),
            **_language(data["text_config"]),
        }
    return _language(data) if config.kind == "language" else {}


def _language(text: Mapping[str, Any]) -> Settings:
    rope = text.get("rope_parameters")  # transformers 5's place for what was `rope_theta`
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    given = {"rope_theta": theta, **text}
    if text.get("model_type") == "gemma":
        # The first Gemma's configs have either name, say `gelu`, and mean its tanh form.
        told = text.get("hidden_activation") or text.get("hidden_act")
        given["hidden_act"] = "gelu_pytorch_tanh" if told == "gelu" else told
        given["hidden_activation"] = None
    return _section("language", given, _LANGUAGE, {})


def _clip(data: Mapping[str, Any], where: str) -> Settings:
    if "vision_cfg" in data:
        try:
            data = hf_clip_config(data, where)
        except CkptError:  # a tower that transformers has not: open_clip's own words are all there
            return {"vision.hidden_act": "quick_gelu" if data.get("quick_gelu") else "gelu"}
    return {
        **_section("vision", data["vision_config"], _TOWER, _CLIP),
        **_section("text", data["text_config"], _CLIP_TEXT, _CLIP),
    }


def _section(
    part: str, data: Mapping[str, Any], names: tuple[str, ...], defaults: Mapping[str, Any]
) -> dict[str, str | int | float | bool]:
    given = {name: data[name] for name in names if data.get(name) is not None}
    told = {**{name: defaults[name] for name in names if name in defaults}, **given}
    return {
        f"{part}.{name}": value
        for name in names
        if isinstance(value := told.get(name), str | int | float | bool)
    }


def differing(ours: Settings, theirs: Settings) -> dict[str, tuple[Any, Any]]:
    """Name -> both values, where both sides tell a setting and not alike."""
    return {
        name: (ours[name], theirs[name])
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    }
