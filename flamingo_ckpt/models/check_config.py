"""The checks of each kind of config, and the sizes that each may leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flamingo_ckpt.models.families import check_language, find_family
from flamingo_ckpt.models.fields import MAX_HEADS, MAX_IMAGE, MAX_LAYERS, MAX_ROWS, Fields
from flamingo_ckpt.tensors import TORCH_DTYPES, escape

#: What upstream hard-codes: no published config says it.
FLAMINGO_DEFAULTS: Mapping[str, int] = {
    "perceiver_depth": 6,
    "perceiver_num_latents": 64,
    "perceiver_dim_head": 64,
    "perceiver_heads": 8,
    "perceiver_ff_mult": 4,
    "cross_attn_dim_head": 64,
    "cross_attn_heads": 8,
    "cross_attn_ff_mult": 4,
}
#: Which of the vision tower's tokens the perceiver is given; the first is what every OpenFlamingo
#: was trained on, and the default.
VISION_TOKENS = ("before_ln_post", "after_ln_post")
_FLAMINGO_BOUNDS = {"perceiver_depth": MAX_LAYERS, "perceiver_num_latents": 1 << 16}
#: transformers' defaults: its configs leave out what is equal to them.
CLIP_VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "num_channels": 3,
}
CLIP_TEXT_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
SIGLIP_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_GEMMAS = ("gemma", "gemma2")


def check_flamingo(fields: Fields, data: dict[str, Any]) -> None:
    """A Flamingo or Otter: a CLIP vision tower, a language model, and what joins them."""
    _check_dtype(fields)
    text = fields.section("text_config")
    family = find_family(text, fields.text("decoder_layers_attr_name"))
    layers = check_language(text, family)
    vision = fields.section("vision_config")
    _check_vision(vision)
    # The class's defaults, written down: no tensor tells them, and the file may outlive the class.
    defaults = {"num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    absent = {name: value for name, value in defaults.items() if vision.data.get(name) is None}
    data["vision_config"] = {**vision.data, **absent}
    every = fields.integer("cross_attn_every_n_layers", high=MAX_LAYERS)
    if layers is not None and every > layers:
        raise fields.contradiction(
            f"`cross_attn_every_n_layers` is {every}, but the language model has {layers} layers",
            "no layer would get gated cross-attention",
        )
    for name, default in FLAMINGO_DEFAULTS.items():
        data[name] = fields.integer(name, high=_FLAMINGO_BOUNDS.get(name, 1024), default=default)
    for name in ("max_num_frames", "max_num_media"):
        fields.optional(name, high=1 << 16)
    fields.flag("tie_word_embeddings")
    _check_token_ids(fields, text)
    data["vision_tokens"] = fields.text("vision_tokens") or VISION_TOKENS[0]
    if data["vision_tokens"] not in VISION_TOKENS:
        choices = " or ".join(f"`{one}`" for one in VISION_TOKENS)
        raise fields.wrong("vision_tokens", data["vision_tokens"], choices)
    if fields.data.get("lora_config"):
        raise fields.error(
            "`lora_config` is set: a language model with adapters has no module tree here",
            "FC405",
            "merge the adapters first, and remove `lora_config`",
        )


def _check_token_ids(fields: Fields, text: Fields) -> None:
    """The ids of `<image>` and `<|endofchunk|>`, where they are given."""
    rows = text.data.get("vocab_size")
    high = (rows if isinstance(rows, int) else MAX_ROWS) - 1
    image, end = (
        fields.optional(name, low=0, high=high) for name in ("media_token_id", "eoc_token_id")
    )
    if image is not None and image == end:
        raise fields.contradiction(f"`media_token_id` and `eoc_token_id` are both {image}")


def check_clip(fields: Fields, data: dict[str, Any]) -> None:
    """The config of transformers' CLIPModel."""
    _check_dtype(fields)
    data["projection_dim"] = shared = fields.integer("projection_dim", default=512)
    for name, defaults in (("vision", CLIP_VISION_DEFAULTS), ("text", CLIP_TEXT_DEFAULTS)):
        inner = fields.section(f"{name}_config").data
        data[f"{name}_config"] = {**defaults, "projection_dim": shared, **_given(inner)}
    _check_vision(Fields(data["vision_config"], "vision_config.", fields.where))
    _check_clip_text(Fields(data["text_config"], "text_config.", fields.where))


def check_clip_vision(fields: Fields, data: dict[str, Any]) -> None:
    """The config of transformers' CLIPVisionModel, with or without a projection."""
    _check_dtype(fields)
    data.update({**CLIP_VISION_DEFAULTS, **_given(data)})
    _check_vision(Fields(data, "", fields.where))


def check_open_clip(fields: Fields, data: dict[str, Any]) -> None:
    """open_clip's own form: `embed_dim`, `vision_cfg`, `text_cfg`."""
    fields.integer("embed_dim")
    fields.flag("quick_gelu")
    for name in ("multimodal_cfg", "audio_cfg"):
        if fields.data.get(name):
            raise fields.error(f"`{name}` is set: only CLIP and CustomTextCLIP are built", "FC405")
    vision, text = fields.section("vision_cfg"), fields.section("text_cfg")
    if text.data.get("hf_model_name"):
        raise text.error(
            "`text_cfg.hf_model_name` is set: that text tower is described on the hub only",
            "FC405",
        )
    name = vision.text("timm_model_name") or ""
    if ":" in name or "/" in name:
        # timm would fetch it from the hub, or read a folder that a config should not name
        raise vision.error(f"`vision_cfg.timm_model_name` is `{escape(name)}`, a place", "FC405")
    for part in (vision, text):
        if not part.data.get("timm_model_name"):
            _check_open_clip_tower(part)
    data["vision_cfg"], data["text_cfg"] = dict(vision.data), dict(text.data)


def _check_open_clip_tower(tower: Fields) -> None:
    layers = tower.data.get("layers")
    if isinstance(layers, list):  # a ResNet: blocks of each of its four stages
        if len(layers) != 4:
            raise tower.wrong("layers", layers, "a number, or the four stages of a ResNet")
        for index in range(4):
            stage = Fields({"layers": layers[index]}, tower.path, tower.where)
            stage.integer("layers", high=MAX_LAYERS)
    else:
        tower.integer("layers", high=MAX_LAYERS, default=12)
    width = tower.integer("width", default=512 if tower.path.startswith("text") else 768)
    for name, high in (
        ("head_width", 1 << 12),
        ("heads", MAX_HEADS),
        ("context_length", MAX_ROWS),
        ("vocab_size", MAX_ROWS),
    ):
        tower.optional(name, high=high)
    for name in ("image_size", "patch_size"):
        value = tower.data.get(name)
        for side in value if isinstance(value, list) and len(value) == 2 else [value]:
            Fields({name: side}, tower.path, tower.where).optional(name, high=MAX_IMAGE)
    ratio = tower.data.get("mlp_ratio", 4.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 64:
        raise tower.wrong("mlp_ratio", ratio, "a number from 0 to 64")
    if tower.path.startswith("text"):
        tower.divisible("width", width, "heads", tower.integer("heads", default=8))
    elif not isinstance(layers, list):
        tower.divisible("width", width, "head_width", tower.integer("head_width", default=64))


def check_paligemma(fields: Fields, data: dict[str, Any]) -> None:
    """PaliGemma 1 and 2: SigLIP, a projector, Gemma."""
    _check_dtype(fields)
    text = fields.section("text_config")
    model_type = text.text("model_type")
    if model_type not in _GEMMAS:
        raise text.wrong("model_type", model_type, " or ".join(f"`{name}`" for name in _GEMMAS))
    width = text.integer("hidden_size")
    heads = text.integer("num_attention_heads", high=MAX_HEADS)
    text.integer("num_hidden_layers", high=MAX_LAYERS)
    text.integer("intermediate_size", high=1 << 20)
    text.integer("vocab_size", high=MAX_ROWS)
    text.optional("head_dim")
    groups = text.optional("num_key_value_heads", high=MAX_HEADS)
    text.flag("tie_word_embeddings")
    fields.flag("tie_word_embeddings")
    text.divisible("num_attention_heads", heads, "num_key_value_heads", groups or 1)
    for name in ("image_token_index", "image_token_id"):
        fields.optional(name, low=0, high=MAX_ROWS)
    # A config without the field would get a pooling head from transformers' class, which no
    # PaliGemma has.
    inner = fields.section("vision_config").data
    data["vision_config"] = {**SIGLIP_DEFAULTS, "vision_use_head": False, **_given(inner)}
    vision = Fields(data["vision_config"], "vision_config.", fields.where)
    _check_vision(vision)
    vision.flag("vision_use_head")
    projection = fields.optional("projection_dim")
    projection = projection or vision.optional("projection_dim") or width
    if projection != width:
        raise fields.contradiction(
            f"`projection_dim` is {projection}, but `text_config.hidden_size` is {width}"
        )
    data["projection_dim"] = projection


def check_siglip(fields: Fields, data: dict[str, Any]) -> None:  # noqa: ARG001
    """Transformers' SiglipModel: read for the numbers of heads, which big_vision's shapes need."""
    for name in ("vision", "text"):
        tower = fields.section(f"{name}_config")
        width = tower.integer("hidden_size")
        heads = tower.integer("num_attention_heads", high=MAX_HEADS)
        tower.divisible("hidden_size", width, "num_attention_heads", heads)


def check_language_model(fields: Fields, data: dict[str, Any]) -> None:  # noqa: ARG001
    """A causal language model alone."""
    _check_dtype(fields)
    check_language(fields, find_family(fields, fields.text("decoder_layers_attr_name")))


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    """What is not null: null means the default, as it does for transformers."""
    return {key: value for key, value in data.items() if value is not None}


def _check_vision(vision: Fields) -> None:
    width = vision.integer("hidden_size")
    vision.integer("num_hidden_layers", high=MAX_LAYERS)
    vision.integer("intermediate_size", high=1 << 20)
    heads = vision.integer("num_attention_heads", high=MAX_HEADS)
    image = vision.integer("image_size", high=MAX_IMAGE)
    patch = vision.integer("patch_size", high=MAX_IMAGE)
    vision.optional("num_channels", high=1024)
    vision.optional("projection_dim")
    vision.divisible("hidden_size", width, "num_attention_heads", heads)
    if patch > image:
        raise vision.contradiction(
            f"`{vision.path}patch_size` is {patch}, larger than the image ({image})"
        )
    if (image // patch) ** 2 >= MAX_ROWS:
        raise vision.contradiction(
            f"`{vision.path}image_size` {image} has too many patches of {patch}"
        )


def _check_clip_text(text: Fields) -> None:
    width = text.integer("hidden_size")
    text.integer("num_hidden_layers", high=MAX_LAYERS)
    text.integer("intermediate_size", high=1 << 20)
    text.integer("vocab_size", high=MAX_ROWS)
    text.integer("max_position_embeddings", high=MAX_ROWS)
    heads = text.integer("num_attention_heads", high=MAX_HEADS)
    text.divisible("hidden_size", width, "num_attention_heads", heads)


def _check_dtype(fields: Fields) -> None:
    names = [fields.text(name) for name in ("dtype", "torch_dtype")]
    for field_name, name in zip(("dtype", "torch_dtype"), names, strict=True):
        dtype = TORCH_DTYPES.get((name or "float32").removeprefix("torch."))
        if dtype is None or not dtype.is_real_float:
            raise fields.wrong(field_name, name, "a floating-point dtype of torch")
    if all(names) and names[0] != names[1]:
        raise fields.contradiction(f"`dtype` is `{names[0]}`, but `torch_dtype` is `{names[1]}`")


def config_dtype(data: Mapping[str, Any]) -> str:
    """The dtype that a config names, as safetensors spells it; F32 where it names none.

    >>> config_dtype({"torch_dtype": "bfloat16"})
    'BF16'
    """
    name = data.get("dtype") or data.get("torch_dtype") or "float32"
    return TORCH_DTYPES[name.removeprefix("torch.")].name
