"""Put a model together from its config, in the key layout that is asked for.

One way for both uses: on the meta device, to read off what a checkpoint has to hold, and on a real
one, to compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.config import ModelConfig
from flamingo_ckpt.models.families import Family, find_family
from flamingo_ckpt.models.fields import Fields

if TYPE_CHECKING:
    from torch import nn

# `logging.ERROR`
_ERRORS_ONLY = 40
#: What the perceiver and the gated blocks compute with, where nobody says.
_ATTENTION = "sdpa"


def assemble(
    config: ModelConfig,
    layout: str,
    *,
    device: Any = "meta",
    attn_implementation: str | None = None,
) -> nn.Module:
    """The module of a config in a layout that it has a form in, its weights random or on meta.

    Args:
        config: the model.
        layout: the key layout of its names.
        device: torch's, or its name.
        attn_implementation: `eager` or `sdpa`; None for what each part does by default.

    Raises:
        CkptError: FC405 where the classes refuse the config or a library is not installed, FC403
            where transformers has no class for it.
    """
    try:
        from flamingo_ckpt.models.torchvision_compat import import_torchvision

        import_torchvision()
        import torch

        with quiet_libraries(), torch.device(device), torch.no_grad():
            return _MAKERS[layout](config, layout, attn_implementation)
    except CkptError as error:
        raise error.at(config.where) from None
    except ImportError as error:
        raise CkptError(
            f"cannot construct the model: {error}",
            code="FC405",
            where=config.where,
            hint="torch, transformers and open_clip_torch have to be installed",
        ) from error
    except Exception as error:  # whatever the classes of three libraries raise
        raise CkptError(
            f"cannot construct the model: {type(error).__name__}: {_first_line(error)}",
            code="FC405",
            where=config.where,
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No advice of the libraries about their own defaults: nobody here chose them."""
    from transformers.utils import logging as advice

    level = advice.get_verbosity()
    advice.set_verbosity(_ERRORS_ONLY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        advice.set_verbosity(level)


def _first_line(error: Exception) -> str:
    """What it says; where the first line only announces it, the next one too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])


def language_config(config: ModelConfig) -> tuple[dict[str, Any], Family | None, str]:
    """The language model's config, its family where it is a known one, path of its layers."""
    data, by_hand = config.data, config.data.get("decoder_layers_attr_name")
    text = dict(data["text_config"] if config.kind == "flamingo" else data)
    tied = data.get("tie_word_embeddings")
    if text.get("tie_word_embeddings") is None and tied is not None:
        text["tie_word_embeddings"] = tied
    family = find_family(Fields(text, "text_config.", config.where), by_hand)
    return text, family, family.layers if family is not None else str(by_hand)


def _flamingo(config: ModelConfig, layout: str, attention: str | None) -> nn.Module:
    from flamingo_ckpt.models import backbones
    from flamingo_ckpt.models.modules.flamingo import Flamingo

    data = config.data
    text, family, layers = language_config(config)
    language, width = backbones.language_model(text, family, attention)
    tower = backbones.open_clip_vision_tower(
        data["vision_config"], data["vision_tokens"], config.where
    )
    return Flamingo(
        vision=tower,
        perceiver=resampler(data, paired=True, attn_implementation=attention),
        language=language,
        layers=layers,
        every=data["cross_attn_every_n_layers"],
        make_block=block_maker(data, width, is_hf=False, attn_implementation=attention),
        keep_decoders=layout == "openflamingo",
        media_token_id=data.get("media_token_id"),
        eoc_token_id=data.get("eoc_token_id"),
    )


def _hf_flamingo(config: ModelConfig, layout: str, attention: str | None) -> nn.Module:  # noqa: ARG001
    from flamingo_ckpt.models.modules.hf_flamingo import of_config

    return of_config(config.data, attention)


def resampler(data: Mapping[str, Any], *, paired: bool, attn_implementation: str | None) -> Any:
    """The perceiver resampler of a completed Flamingo config."""
    from flamingo_ckpt.models.modules.perceiver import PerceiverResampler

    return PerceiverResampler(
        dim=data["vision_config"]["hidden_size"],
        **_options(data, "perceiver_", "depth dim_head heads num_latents ff_mult"),
        max_num_frames=data.get("max_num_frames"),
        max_num_media=data.get("max_num_media"),
        paired=paired,
        attn_implementation=attn_implementation or _ATTENTION,
    )


def block_maker(
    data: Mapping[str, Any], width: int, *, is_hf: bool, attn_implementation: str | None
) -> Callable[[], Any]:
    """Makes gated blocks of a completed Flamingo config; `width` is the language model's."""
    from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock

    def block() -> GatedCrossAttentionBlock:
        return GatedCrossAttentionBlock(
            dim=width,
            dim_visual=data["vision_config"]["hidden_size"],
            **_options(data, "cross_attn_", "dim_head heads ff_mult"),
            ff_name="feed_forward" if is_hf else "ff",
            attn_implementation=attn_implementation or _ATTENTION,
        )

    return block


def _options(data: Mapping[str, Any], prefix: str, names: str) -> dict[str, Any]:
    return {name: data[prefix + name] for name in names.split()}


def _open_clip(config: ModelConfig, layout: str, attention: str | None) -> nn.Module:  # noqa: ARG001
    from flamingo_ckpt.models import backbones, clip_config

    is_native = "vision_cfg" in config.data
    data = config.data if is_native else clip_config.open_clip_config(config.data, config.where)
    return backbones.open_clip_model(data)


def _hf_clip(config: ModelConfig, layout: str, attention: str | None) -> nn.Module:  # noqa: ARG001
    from flamingo_ckpt.models import backbones, clip_config

    data = config.data
    if config.kind == "clip_vision":
        projected = "CLIPVisionModelWithProjection" in (data.get("architectures") or [])
        return backbones.hf_vision_tower(data, projection=projected, attn_implementation=attention)
    if "vision_cfg" in data:
        data = clip_config.hf_clip_config(data, config.where)
    return backbones.hf_clip(data, attention)


def _paligemma(config: ModelConfig, layout: str, attention: str | None) -> nn.Module:  # noqa: ARG001
    from flamingo_ckpt.models import backbones

    return backbones.paligemma(config.data, attention)


def _language(config: ModelConfig, layout: str, attention: str | None) -> nn.Module:  # noqa: ARG001
    from flamingo_ckpt.models import backbones

    text, family, _ = language_config(config)
    module, _ = backbones.language_model(text, family, attention)
    return module


_MAKERS: Mapping[str, Callable[[ModelConfig, str, str | None], nn.Module]] = {
    "openflamingo": _flamingo,
    "openflamingo-v1": _flamingo,
    "hf-flamingo": _hf_flamingo,
    "open_clip": _open_clip,
    "hf-clip": _hf_clip,
    "paligemma": _paligemma,
    "language-model": _language,
}
