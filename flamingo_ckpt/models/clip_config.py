"""A CLIP's config in open_clip's form and in Hugging Face's: one from the other.

Where open_clip's form asks for something that transformers' classes lack, it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flamingo_ckpt.errors import CkptError

#: Options of a tower that change nothing for the weights, or nothing at all.
_HARMLESS = frozenset(
    "layers width heads head_width mlp_ratio image_size patch_size context_length vocab_size "
    "patch_dropout pos_embed_type final_ln_after_pool output_tokens hf_tokenizer_name "
    "tokenizer_mode tokenizer_kwargs pad_id eos_id act_kwargs norm_kwargs attn_pooler_queries "
    "attn_pooler_heads timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path "
    "timm_model_pretrained hf_model_pretrained hf_proj_type hf_pooler_type".split()
)
#: Options that have one value only which transformers' classes have too.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "pool_type": ("tok", "argmax", "eos"),
    "proj_type": ("linear",),
    "block_type": ("default",),
}


#: hidden_act of transformers -> (open_clip's `quick_gelu`, its `act_kwargs`).
_ACTIVATIONS: Mapping[str, tuple[bool, dict[str, Any] | None]] = {
    "quick_gelu": (True, None),
    "gelu": (False, None),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
}
_EPSILON = 1e-5
#: `eos_token_id` of transformers' CLIP that stands for no token: pool at the highest.
_HIGHEST = 2


def is_quick_gelu(tower: Mapping[str, Any], path: str, where: str) -> bool:
    """open_clip's `quick_gelu` for a tower of transformers.

    Raises:
        CkptError: FC405 for an activation that open_clip's towers do not have.
    """
    activation = tower.get("hidden_act") or "quick_gelu"
    if activation not in _ACTIVATIONS:
        raise CkptError(
            f"`{path}hidden_act` is {activation!r}, which open_clip's towers do not have; they "
            "have: " + ", ".join(_ACTIVATIONS),
            code="FC405",
            where=where,
        )
    return _ACTIVATIONS[activation][0]


def open_clip_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    """`vision_cfg` of open_clip for transformers' `vision_config`."""
    return {
        **_tower(vision),
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
    }


def open_clip_config(data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """open_clip's form of a completed config of transformers' CLIPModel.

    Raises:
        CkptError: FC405 for an activation that open_clip does not have, or not beside the other.
    """
    text = data["text_config"]
    quick = is_quick_gelu(data["vision_config"], "vision_config.", where)
    if is_quick_gelu(text, "text_config.", where) != quick:
        raise CkptError(
            "`hidden_act` differs between the towers: open_clip has one `quick_gelu` for both",
            code="FC405",
            where=where,
            hint="this model exists in the layout `hf-clip` only",
        )
    return {
        "embed_dim": data["projection_dim"],
        "quick_gelu": quick,
        "vision_cfg": open_clip_vision(data["vision_config"]),
        "text_cfg": {
            **_tower(text),
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            **_pooling(text),
        },
    }


def _pooling(text: Mapping[str, Any]) -> dict[str, Any]:
    """Where open_clip's text tower pools: at the highest token unless it is told another."""
    end = text.get("eos_token_id", _HIGHEST)
    if end in (_HIGHEST, text["vocab_size"] - 1) or type(end) is not int:
        return {}
    return {"pool_type": "eos", "eos_id": end}


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config["hidden_size"]
    activation = _ACTIVATIONS.get(config.get("hidden_act") or "quick_gelu", (False, None))
    epsilon = config.get("layer_norm_eps") or _EPSILON
    return {
        **({"act_kwargs": activation[1]} if activation[1] else {}),
        **({"norm_kwargs": {"eps": epsilon}} if epsilon != _EPSILON else {}),
        "width": width,
        "layers": config["num_hidden_layers"],
        # open_clip cuts width * ratio to a whole number; half a unit more keeps it from falling
        # one short of the width that is meant.
        "mlp_ratio": (config["intermediate_size"] + 0.5) / width,
    }


def hf_clip_config(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of transformers' CLIPModel for a config in open_clip's form.

    Raises:
        CkptError: FC405, naming the option that transformers' CLIP does not have.
    """
    vision, text = data["vision_cfg"], data["text_cfg"]
    for path, tower in (("vision_cfg", vision), ("text_cfg", text)):
        _refuse(path, tower, where)
    if isinstance(vision.get("layers"), list):
        raise _no_counterpart("vision_cfg.layers", vision["layers"], where)
    if data.get("init_logit_bias") is not None:
        raise _no_counterpart("init_logit_bias", data["init_logit_bias"], where)
    width, text_width = vision.get("width", 768), text.get("width", 512)
    return {
        "model_type": "clip",
        "projection_dim": data["embed_dim"],
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": _side(vision, "image_size", 224, where),
            "patch_size": _side(vision, "patch_size", 16, where),
            "num_channels": 3,
            "projection_dim": data["embed_dim"],
            **_arithmetic(data, "vision_cfg", where),
        },
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "vocab_size": text.get("vocab_size", 49408),
            "eos_token_id": _end_of_text(text, where),
            "bos_token_id": 0,
            "pad_token_id": 1,
            "max_position_embeddings": text.get("context_length", 77),
            "projection_dim": data["embed_dim"],
            **_arithmetic(data, "text_cfg", where),
        },
    }


def _end_of_text(text: Mapping[str, Any], where: str) -> int:
    """The token that transformers pools at where open_clip does.

    That is the highest one, which 2 asks for, as OpenAI's own configs do; so a model that means the
    token 2 (MetaCLIP 2) has no config there.
    """
    if text.get("pool_type") != "eos":
        return _HIGHEST
    end = text.get("eos_id", 2)
    if type(end) is not int or end == _HIGHEST:
        raise _no_counterpart("text_cfg.eos_id", end, where)
    return end


def _arithmetic(data: Mapping[str, Any], part: str, where: str) -> dict[str, Any]:
    """Activation and epsilon of a tower in open_clip's form, as transformers names them."""
    tower = data[part]
    quick, options = bool(data.get("quick_gelu")), tower.get("act_kwargs") or None
    name = next((n for n, form in _ACTIVATIONS.items() if form == (quick, options)), None)
    if name is None:
        raise _no_counterpart(f"{part}.act_kwargs", options, where)
    norm = dict(tower.get("norm_kwargs") or {})
    epsilon = norm.pop("eps", _EPSILON)
    if norm:
        raise _no_counterpart(f"{part}.norm_kwargs", norm, where)
    return {"hidden_act": name, **({"layer_norm_eps": epsilon} if epsilon != _EPSILON else {})}


def _refuse(path: str, tower: Mapping[str, Any], where: str) -> None:
    for name, value in tower.items():
        if name in _PLAIN:
            if value not in (None, *_PLAIN[name]):
                raise _no_counterpart(f"{path}.{name}", value, where)
        elif name not in _HARMLESS and value not in (None, False):
            raise _no_counterpart(f"{path}.{name}", value, where)


def _side(vision: Mapping[str, Any], name: str, default: int, where: str) -> int:
    value = vision.get(name, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise _no_counterpart(f"vision_cfg.{name}", value, where)
        value = value[0]
    return int(value)


def _no_counterpart(name: str, value: object, where: str) -> CkptError:
    return CkptError(
        f"`{name}` is {value!r}, which transformers' CLIP does not have",
        code="FC405",
        where=where,
        hint="this model exists in the layout `open_clip` only",
    )
