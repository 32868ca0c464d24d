"""The configs of the Hugging Face ports, as objects of transformers.

Source: the `config.json` of the published folders (`luodian/OTTER-*`, `luodian/openflamingo-*`),
and of those that `convert --to hf-flamingo` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PretrainedConfig

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import backbones
from flamingo_ckpt.models.check_config import FLAMINGO_DEFAULTS
from flamingo_ckpt.models.families import find_family
from flamingo_ckpt.models.fields import Fields
from flamingo_ckpt.models.modules.mosaic_gpt import MosaicGPTConfig, mosaic_config

#: The published classes are one and the same under two names.
MODEL_TYPES = ("flamingo", "otter")
#: Fields of a section that are about its file, not about its model.
_NOT_FIELDS = ("model_type", "auto_map", "transformers_version", "_name_or_path", "torch_dtype")


class FlamingoConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """What a `FlamingoForConditionalGeneration` is made of.

    The fields are read and completed when a model is made (`load_config` tells the same before).
    `use_media_placement_augmentation`, which published configs set, is kept and never obeyed: under
    it, upstream's forward attends to the image before or to the image after by the toss of a coin.

    Args:
        vision_config: of transformers' `CLIPVisionModel`.
        text_config: of the language model; its `model_type` or `architectures` tells the family.
        cross_attn_every_n_layers: a gated block stands before every n-th decoder layer.
        decoder_layers_attr_name: path of the decoder layers, for a language model of transformers
            that is of no known family.
        media_token_id: the token that stands for an image. Published configs do not tell it; a
            model needs it at the first forward with images.
        eoc_token_id: `<|endofchunk|>`, at which generation ends.
        max_num_frames, max_num_media: of the resampler's embeddings; None for none.
        **kwargs: the sizes of resampler and gated blocks where they are not upstream's
            (`perceiver_depth`, `cross_attn_heads`, ...), and the fields of every config.

    Raises:
        CkptError: FC401, FC408, FC403 for a language model that is not known, FC467 where
            `transformers_weights` names a pickle.
    """

    model_type = "flamingo"
    has_no_defaults_at_init = True
    sub_configs = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Mapping[str, Any] | PretrainedConfig | None = None,
        text_config: Mapping[str, Any] | PretrainedConfig | None = None,
        cross_attn_every_n_layers: int = 4,
        *,
        decoder_layers_attr_name: str | None = None,
        media_token_id: int | None = None,
        eoc_token_id: int | None = None,
        max_num_frames: int | None = None,
        max_num_media: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.cross_attn_every_n_layers = cross_attn_every_n_layers
        self.decoder_layers_attr_name = decoder_layers_attr_name
        self.media_token_id = media_token_id
        self.eoc_token_id = eoc_token_id
        self.max_num_frames = max_num_frames
        self.max_num_media = max_num_media
        for name, default in FLAMINGO_DEFAULTS.items():
            given = kwargs.pop(name, None)
            setattr(self, name, default if given is None else given)
        _check_weights(kwargs.get("transformers_weights"))
        tied = kwargs.pop("tie_word_embeddings", None)
        self.vision_config: Any = _vision_config(vision_config)
        self.text_config: Any = _text_config(text_config, decoder_layers_attr_name, tied)
        # The language model's own word, or its class's: this one is for whoever reads the file.
        tied = getattr(self.text_config, "tie_word_embeddings", tied)
        kwargs["tie_word_embeddings"] = bool(tied)
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', where either name of the ports is this class's."""
        found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found.get("model_type") in MODEL_TYPES:
            found = {**found, "model_type": cls.model_type}
        return found, unused


class OtterConfig(FlamingoConfig):  # type: ignore[no-untyped-call]
    """What an `OtterForConditionalGeneration` is made of: a `FlamingoConfig` by another name."""

    model_type = "otter"

    # Said again: transformers gives a config class without one of its own a generated one.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def _check_weights(name: object) -> None:
    """A config may name the file that transformers loads, which would unpickle an adapter's."""
    if name is not None and not str(name).endswith((".safetensors", ".safetensors.index.json")):
        raise CkptError(
            f"`transformers_weights` is {name!r}, which is no safetensors file",
            code="FC467",
            hint="`flamingo-ckpt convert` reads pickled weights safely",
        )


def _vision_config(given: Mapping[str, Any] | PretrainedConfig | None) -> PretrainedConfig | None:
    if given is None or isinstance(given, PretrainedConfig):
        return given
    return CLIPVisionConfig(**_fields(given))


def _text_config(
    given: Mapping[str, Any] | PretrainedConfig | None, layers: str | None, tied: bool | None
) -> PretrainedConfig | None:
    if given is None or isinstance(given, PretrainedConfig):
        return given
    text = dict(given)
    if text.get("tie_word_embeddings") is None and tied is not None:
        text["tie_word_embeddings"] = tied
    family = find_family(Fields(text, "text_config.", "FlamingoConfig"), layers)
    model_type = text["model_type"] if family is None else family.name
    if model_type == MosaicGPTConfig.model_type:
        config: PretrainedConfig = mosaic_config(text)
    elif model_type in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[model_type]
        config = kind(**backbones._language_fields(text, family, kind))
    else:
        raise CkptError(f"transformers has no model of the type `{model_type}`", code="FC403")
    config.architectures = text.get("architectures")
    config.dtype = _dtype(text)
    return config


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in given.items() if name not in _NOT_FIELDS}
    return fields | {"dtype": _dtype(given)}


def _dtype(given: Mapping[str, Any]) -> torch.dtype | None:
    name = given.get("dtype") or given.get("torch_dtype")
    return getattr(torch, name.removeprefix("torch.")) if isinstance(name, str) else name
