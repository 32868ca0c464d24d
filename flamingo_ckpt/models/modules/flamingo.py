"""Flamingo itself: vision tower, resampler, language model with gated cross-attention in it.

`OpenFlamingo` has the names of upstream's `state_dict`, with both of its alias trees;
`HFFlamingo` has those of the ports to Hugging Face classes (`FlamingoForConditionalGeneration`,
`OtterForConditionalGeneration`), which have no aliases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import nn

from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock, text_times
from flamingo_ckpt.models.modules.perceiver import PerceiverResampler

MakeBlock = Callable[[], GatedCrossAttentionBlock]


class Conditioning:
    """What the gated blocks of one model look at: set before the language model runs.

    Attributes:
        media: latents `[batch, images, num_latents, dim_visual]`, or None.
        locations: booleans `[batch, tokens]`, true where a token stands for an image, or None.
        is_continuation: whether the tokens come after all of `locations`.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the images."""
        self.media: torch.Tensor | None = None
        self.locations: torch.Tensor | None = None
        self.is_continuation = False


class FlamingoLayer(nn.Module):
    """A decoder layer with the gated cross-attention that goes before it, if there is one."""

    def __init__(
        self,
        gated: GatedCrossAttentionBlock | None,
        decoder_layer: nn.Module,
        conditioning: Conditioning,
    ) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated
        self.decoder_layer = decoder_layer
        self.conditioning = conditioning

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the decoder layer gives, a tensor or a tuple, untouched.

        Args:
            hidden_states: `[batch, tokens, dim]`; some language models pass it by keyword.
            *args: the decoder layer's own.
            **kwargs: the decoder layer's own. Its attention mask is not looked at: it is None,
                booleans of either meaning or numbers, depending on the language model.

        Raises:
            RuntimeError: there is a gated block, and nothing for it to look at.
        """
        if self.gated_cross_attn_layer is not None:
            seen = self.conditioning
            if seen.media is None or seen.locations is None:
                raise RuntimeError("the model has seen no images: call it with `vision_x`")
            times = text_times(
                seen.locations, hidden_states.shape[1], is_continuation=seen.is_continuation
            )
            hidden_states = self.gated_cross_attn_layer(hidden_states, seen.media, times)
        return self.decoder_layer(hidden_states, *args, **kwargs)


def insert_cross_attention(
    language: nn.Module,
    layers: str,
    every: int,
    make_block: MakeBlock,
    conditioning: Conditioning,
) -> tuple[nn.ModuleList, list[GatedCrossAttentionBlock | None]]:
    """Put a block before each `every`-th decoder layer (the last of each run of `every`).

    Args:
        language: the language model; changed in place.
        layers: path of its list of decoder layers.
        every: `cross_attn_every_n_layers`.
        make_block: gives a fresh block.
        conditioning: what all blocks will look at.

    Returns:
        The decoder layers as they were, and the block of each or None.

    Raises:
        AttributeError: there is nothing at `layers`.
        TypeError: what is there is no list of layers.
    """
    parent_path, _, name = layers.rpartition(".")
    parent = language.get_submodule(parent_path)
    decoders = getattr(parent, name)
    if not isinstance(decoders, nn.ModuleList):
        raise TypeError(f"`{layers}` is a {type(decoders).__name__}, not a list of layers")
    blocks = [make_block() if (i + 1) % every == 0 else None for i in range(len(decoders))]
    pairs = zip(blocks, decoders, strict=True)
    wrapped = [FlamingoLayer(block, layer, conditioning) for block, layer in pairs]
    setattr(parent, name, nn.ModuleList(wrapped))
    return decoders, blocks


class OpenFlamingo(nn.Module):
    """A Flamingo under upstream's names.

    Args:
        vision: open_clip's vision tower.
        perceiver: the resampler, its layers in pairs.
        language: the causal language model; changed in place.
        layers, every, make_block: as for `insert_cross_attention`.
        keep_decoders: register the frozen decoder layers a second time, as version 2 does.
        media_token_id: the token that stands for an image; None for a model that only loads.
    """

    def __init__(
        self,
        *,
        vision: nn.Module,
        perceiver: PerceiverResampler,
        language: nn.Module,
        layers: str,
        every: int,
        make_block: MakeBlock,
        keep_decoders: bool = True,
        media_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.conditioning = Conditioning()
        self.media_token_id = media_token_id
        self._has_cached_media = False
        decoders, blocks = insert_cross_attention(
            language, layers, every, make_block, self.conditioning
        )
        if keep_decoders:
            language.add_module("old_decoder_blocks", decoders)
        # Layers without a block keep their place in the list, and so their number.
        # (torch takes None for "no module here"; its annotation does not say so.)
        language.add_module(
            "gated_cross_attn_layers",
            nn.ModuleList(blocks),  # type: ignore[arg-type]
        )
        self.vision_encoder = vision
        self.perceiver = perceiver
        self.lang_encoder = language

    def forward(
        self,
        vision_x: torch.Tensor | None,
        lang_x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        clear_conditioned_layers: bool = True,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        """What the language model gives, each token having seen the image before it.

        Args:
            vision_x: `[batch, images, frames, channels, height, width]`; None after `cache_media`.
            lang_x: token ids `[batch, tokens]`, one media token for each image.
            attention_mask: `[batch, tokens]`, of the language model alone.
            labels: `[batch, tokens]`, for the loss.
            clear_conditioned_layers: forget the images afterwards. What `cache_media` keeps stays
                until `uncache_media`.
            past_key_values: the language model's cache.
            use_cache: whether to give a cache back.

        Raises:
            RuntimeError: no media token is known.
            ValueError: images are given although some are cached, or neither.
        """
        if self._has_cached_media:
            if vision_x is not None:
                raise ValueError("images are cached: `uncache_media()` first, or pass None")
            self._continue(lang_x)
        elif vision_x is None:
            raise ValueError("give `vision_x`, or keep images with `cache_media` first")
        else:
            self._look(vision_x, lang_x)
        output = self.lang_encoder(
            input_ids=lang_x,
            attention_mask=attention_mask,
            labels=labels,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        if clear_conditioned_layers and not self._has_cached_media:
            self.conditioning.clear()
        return output

    def cache_media(self, input_ids: torch.Tensor, vision_x: torch.Tensor) -> None:
        """Keep images for several calls, as for the log-likelihood of many continuations.

        Calls without a media token then attend to the last of the images.

        Args:
            input_ids: `[batch, tokens]`, the prompt that the images belong to.
            vision_x: as for `forward`.
        """
        self._look(vision_x, input_ids)
        self._has_cached_media = True

    def uncache_media(self) -> None:
        """Forget the images that `cache_media` keeps."""
        self._has_cached_media = False
        self.conditioning.clear()

    def encode_vision(self, vision_x: torch.Tensor) -> torch.Tensor:
        """The perceiver's latents: `[batch, images, num_latents, dim_visual]`; arguments as above.

        The frozen tower may be any module that gives tokens `[n, tokens, dim_visual]`, or a pair
        of which they are the second, as open_clip's with `output_tokens`.
        """
        batch, images, frames = vision_x.shape[:3]
        with torch.no_grad():
            tokens = self.vision_encoder(rearrange(vision_x, "b m f c h w -> (b m f) c h w"))
        tokens = tokens[1] if isinstance(tokens, tuple) else tokens
        apart = rearrange(tokens, "(b m f) n d -> b m f n d", b=batch, m=images, f=frames)
        latents: torch.Tensor = self.perceiver(apart)
        return latents

    def _look(self, vision_x: torch.Tensor, lang_x: torch.Tensor) -> None:
        self.conditioning.locations = self._media_locations(lang_x)
        self.conditioning.is_continuation = False
        self.conditioning.media = self.encode_vision(vision_x)

    def _continue(self, lang_x: torch.Tensor) -> None:
        """Text after cached images: with media tokens of its own it is read from its beginning."""
        locations = self._media_locations(lang_x)
        self.conditioning.is_continuation = not bool(locations.any())
        if not self.conditioning.is_continuation:
            self.conditioning.locations = locations

    def _media_locations(self, lang_x: torch.Tensor) -> torch.Tensor:
        if self.media_token_id is None:
            raise RuntimeError("the model was made without a media token")
        return lang_x == self.media_token_id


class HFFlamingo(nn.Module):
    """A Flamingo under the names of the published Hugging Face ports.

    Args:
        vision: a CLIP vision tower.
        perceiver: the resampler, its layers in one module each.
        language: the causal language model; changed in place.
        layers, every, make_block: as for `insert_cross_attention`.
    """

    def __init__(
        self,
        *,
        vision: nn.Module,
        perceiver: PerceiverResampler,
        language: nn.Module,
        layers: str,
        every: int,
        make_block: MakeBlock,
    ) -> None:
        super().__init__()
        self.conditioning = Conditioning()
        insert_cross_attention(language, layers, every, make_block, self.conditioning)
        self.lang_encoder = language
        self.vision_encoder = vision
        self.perceiver = perceiver
