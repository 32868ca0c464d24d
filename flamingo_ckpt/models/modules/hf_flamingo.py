"""The Hugging Face ports of Flamingo, as classes of transformers.

Their modules are named as in the published folders (`luodian/OTTER-*`, `luodian/openflamingo-*`)
and in those of `flamingo-ckpt convert --to hf-flamingo`; they compute what `Flamingo` does.
Importing this module makes them known to `AutoConfig`, `AutoModel` and to
`AutoModelForImageTextToText`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    PretrainedConfig,
)

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.assemble import block_maker, language_config, resampler
from flamingo_ckpt.models.config import parse_config
from flamingo_ckpt.models.modules.base import FlamingoBase
from flamingo_ckpt.models.modules.conditioning import (
    Conditioning,
    FlamingoLayer,
    insert_cross_attention,
)
from flamingo_ckpt.models.modules.cross_attention import MaskedCrossAttention
from flamingo_ckpt.models.modules.hf_config import FlamingoConfig, OtterConfig
from flamingo_ckpt.models.modules.hf_pretrained import FlamingoPreTrainedModel
from flamingo_ckpt.models.modules.mosaic_gpt import MosaicGPT, MosaicGPTConfig
from flamingo_ckpt.models.modules.perceiver import PerceiverAttention


class VisionEncoder(nn.Module):
    """The level above CLIP's tower that files have, and transformers' class lost in 5.6."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_model = tower

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """As the tower's."""
        return self.vision_model(pixel_values, **kwargs)


class FlamingoForConditionalGeneration(  # type: ignore[misc, no-untyped-call]
    FlamingoPreTrainedModel, FlamingoBase, GenerationMixin
):
    """A Flamingo under the names of the published Hugging Face folders.

    Called in the ports' style, `model(vision_x=..., lang_x=..., attention_mask=...)`, or in
    transformers', `model(input_ids=..., pixel_values=..., attention_mask=...)`; so is `generate`.

    Args:
        config: what it is made of; completed in place where it leaves sizes to upstream's code.

    Raises:
        CkptError: FC401 to FC405 for a config that is no Flamingo's.

    Example:
        >>> from flamingo_ckpt.models import FlamingoConfig, FlamingoForConditionalGeneration
        >>> text = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16}
        >>> text |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
        >>> config = FlamingoConfig(vision, text, 2, media_token_id=31, perceiver_depth=1)
        >>> model = FlamingoForConditionalGeneration(config).eval()
        >>> picture, words = torch.randn(1, 1, 3, 8, 8), torch.tensor([[31, 5, 6]])
        >>> model(input_ids=words, pixel_values=picture).logits.shape
        torch.Size([1, 3, 32])
    """

    lang_encoder: Any
    vision_encoder: Any

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        checked = parse_config(config.to_dict(), config.name_or_path or type(config).__name__)
        data, (_, _, layers) = checked.data, language_config(checked)
        attention = "sdpa" if config._attn_implementation == "sdpa" else "eager"
        self.conditioning = Conditioning(config.media_token_id)
        self._is_generating = False
        self._normalises_tokens = data["vision_tokens"] == "after_ln_post"
        language = _language_model(config.text_config)
        self._takes_positions = "position_ids" in inspect.signature(language.forward).parameters
        insert_cross_attention(
            language,
            layers,
            config.cross_attn_every_n_layers,
            block_maker(
                data, config.text_config.hidden_size, is_hf=True, attn_implementation=attention
            ),
            self.conditioning,
        )
        self.lang_encoder = language
        self.vision_encoder = _vision_encoder(config.vision_config)
        self.perceiver = resampler(data, paired=False, attn_implementation=attention)
        self._end_at_eoc()
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def media_token_id(self) -> int | None:
        """The token that stands for an image, also the config's; None where it is not known."""
        return self.conditioning.media_token_id

    @media_token_id.setter
    def media_token_id(self, value: int | None) -> None:
        """Tell it, to the config too."""
        self.conditioning.media_token_id = self.config.media_token_id = value

    @property
    def eoc_token_id(self) -> int | None:
        """The token that ends a chunk, also the config's; generation stops at it."""
        token: int | None = self.config.eoc_token_id
        return token

    @eoc_token_id.setter
    def eoc_token_id(self, value: int | None) -> None:
        """Tell it, to the config and to generation too."""
        self.config.eoc_token_id = value
        self._end_at_eoc()

    def visual_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """The patch tokens `[n, patches, dim_visual]`.

        They are those before `post_layernorm`, as trained on, unless the config's `vision_tokens`
        says `after_ln_post`.
        """
        tokens: torch.Tensor = self.vision_encoder(pictures).last_hidden_state[:, 1:]
        if self._normalises_tokens:
            tokens = self.vision_encoder.vision_model.post_layernorm(tokens)
        return tokens

    def forward(
        self,
        vision_x: torch.Tensor | None = None,
        lang_x: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        clear_conditioned_layers: bool = True,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the language model gives, each token having seen the image before it.

        Args:
            vision_x: `[batch, images, frames, channels, height, width]`; None after `cache_media`.
            lang_x: token ids `[batch, tokens]`, one media token for each image.
            attention_mask: `[batch, tokens]`, of the language model alone.
            labels: `[batch, tokens]`, for the loss.
            past_key_values: the language model's cache. Text goes on where the call ended that
                filled it.
            use_cache: whether to give a cache back.
            clear_conditioned_layers: forget the images afterwards.
            input_ids: `lang_x` by transformers' name.
            pixel_values: `vision_x` by transformers' name; the axis of frames may be left out, and
                with it that of images.
            position_ids: `[batch, tokens]`, for language models that have positions.
            **kwargs: the language model's own.

        Raises:
            RuntimeError: no media token is known.
            ValueError: images are given although some are cached, or neither; one thing by two
                names; shapes that do not belong together.
        """
        vision_x = _pictures(vision_x, pixel_values)
        if position_ids is not None and self._takes_positions:
            kwargs["position_ids"] = position_ids
        arguments = {
            "input_ids": _one_of("lang_x", lang_x, "input_ids", input_ids),
            "attention_mask": attention_mask,
            "labels": labels,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        if use_cache is None and self.perceiver.uses_checkpointing and torch.is_grad_enabled():
            arguments["use_cache"] = False  # what fills a cache cannot be computed twice
        if self._is_generating:
            return self.lang_encoder(**arguments)
        self._check_media_token()
        with self.looking_at(vision_x, forget=clear_conditioned_layers):
            return self.lang_encoder(**arguments)

    def generate(  # type: ignore[override]
        self,
        vision_x: torch.Tensor | None = None,
        lang_x: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        inputs: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Go on writing. Images are encoded once, and each row of them serves its row's beams.

        Args:
            vision_x: as for `forward`; None after `cache_media`.
            lang_x: the prompt, token ids `[batch, tokens]`, padded on the left.
            attention_mask: `[batch, tokens]`.
            inputs: `lang_x` by transformers' name for the first argument.
            input_ids: the same by the name of the language model's argument.
            pixel_values: `vision_x` by transformers' name, as for `forward`.
            **kwargs: of `generate` in transformers. `use_cache` is on by default, whatever the
                config of the language model says.

        Returns:
            As transformers': the prompt with what was written, `[rows, tokens]`.

        Raises:
            RuntimeError: no media token is known.
            ValueError: as for `forward`.
        """
        lang_x = _one_of("lang_x", lang_x, "input_ids", input_ids, "inputs", inputs)
        vision_x = _pictures(vision_x, pixel_values)
        if kwargs.get("generation_config") is None:
            kwargs.setdefault("use_cache", True)
        self._check_media_token()
        with torch.no_grad(), self.looking_at(vision_x), self._generating():
            parent: Any = super()
            return parent.generate(input_ids=lang_x, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers'; the whole text tells the gated blocks where in it a step is."""
        self.conditioning.announce(input_ids)
        parent: Any = super()
        return parent.prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """As transformers'; without a `generation_config.json` it ends where the config says."""
        parent: Any = super()
        parent.adjust_generation_fn(*args, **kwargs)
        if self.generation_config._from_model_config:
            self._end_at_eoc()

    def _end_at_eoc(self) -> None:
        if self.eoc_token_id is not None:
            self.generation_config.eos_token_id = self.eoc_token_id
            # from here on a config of its own, which a saved one is
            self.generation_config._from_model_config = False

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers'; the resampler and the gated blocks follow the word for the whole."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        own = "sdpa" if self.config._attn_implementation == "sdpa" else "eager"
        for part in self._own_parts():
            for module in part.modules():
                if isinstance(module, PerceiverAttention | MaskedCrossAttention):
                    module.attn_implementation = own

    def get_input_embeddings(self) -> Any:
        """The embedding of the language model's tokens."""
        return self.lang_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the language model another embedding."""
        self.lang_encoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The head; None for a language model that has none of its own."""
        return self.lang_encoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the language model another head."""
        self.lang_encoder.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        """The language model without its head."""
        return self.lang_encoder.get_decoder()

    def _check_media_token(self) -> None:
        if self.media_token_id is None:
            raise CkptError(
                "the config does not tell which token stands for an image",
                code="FC468",
                where=self.name_or_path or None,
                hint="`model.media_token_id = tokenizer.convert_tokens_to_ids('<image>')`, or "
                "`media_token_id` in config.json",
            )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """The images of this generation are looked at already; each step is a `forward`."""
        self._is_generating = True
        try:
            yield
        finally:
            self._is_generating = False

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        self.use_gradient_checkpointing(enable)
        for module in self.lang_encoder.modules():
            if isinstance(module, FlamingoLayer):
                # The wrapper computes it anew together with its gated block: once is enough.
                decoder: Any = module.decoder_layer
                decoder.gradient_checkpointing = False


class OtterForConditionalGeneration(FlamingoForConditionalGeneration):  # type: ignore[no-untyped-call]
    """A `FlamingoForConditionalGeneration` by the name that Otter's folders have."""

    config_class = OtterConfig


def of_config(
    data: Mapping[str, Any], attn_implementation: str | None = None
) -> FlamingoForConditionalGeneration:
    """The model of a checked `config.json`, random, where the current device is."""
    is_otter = data.get("model_type") == OtterConfig.model_type
    kind = OtterForConditionalGeneration if is_otter else FlamingoForConditionalGeneration
    fields = {name: value for name, value in data.items() if name != "model_type"}
    config = kind.config_class(**fields)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    return kind(config)


def _language_model(config: PretrainedConfig) -> Any:
    kind: Any = MosaicGPT
    if not isinstance(config, MosaicGPTConfig):
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CkptError(
                f"transformers has no causal language model of the type `{config.model_type}`",
                code="FC403",
            )
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if config._attn_implementation == "sdpa" and not kind._supports_sdpa:
        config._attn_implementation = "eager"  # MPT's and GPT-J's classes have no other
    return kind(config)


def _vision_encoder(config: CLIPVisionConfig) -> nn.Module:
    tower = CLIPVisionModel(config)
    return tower if hasattr(tower, "vision_model") else VisionEncoder(tower)


def _one_of(*named: Any) -> Any:
    """The one thing that was given by any of its names; None where none was."""
    given = {named[i]: named[i + 1] for i in range(0, len(named), 2) if named[i + 1] is not None}
    if len(given) > 1:
        raise ValueError("give one of " + ", ".join(f"`{name}`" for name in given))
    return next(iter(given.values()), None)


def _pictures(
    vision_x: torch.Tensor | None, pixel_values: torch.Tensor | None
) -> torch.Tensor | None:
    found: torch.Tensor | None = _one_of("vision_x", vision_x, "pixel_values", pixel_values)
    if pixel_values is None or found is None:
        return found
    if found.ndim == 4:  # one image a row
        found = found[:, None]
    return found[:, :, None] if found.ndim == 5 else found


def _register() -> None:
    for config, model in (
        (FlamingoConfig, FlamingoForConditionalGeneration),
        (OtterConfig, OtterForConditionalGeneration),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        register: Callable[..., None]
        for register in (AutoModel.register, AutoModelForImageTextToText.register):
            register(config, model, exist_ok=True)


_register()
