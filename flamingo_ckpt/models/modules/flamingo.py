"""Flamingo itself: vision tower, resampler, language model with gated cross-attention in it.

`Flamingo` has the names of upstream's `state_dict`, with both of its alias trees. Its twin with
those of the ports to Hugging Face classes, `FlamingoForConditionalGeneration`, is in `hf_flamingo`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flamingo_ckpt.models.modules.base import FlamingoBase
from flamingo_ckpt.models.modules.conditioning import (
    Conditioning,
    MakeBlock,
    insert_cross_attention,
)
from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock
from flamingo_ckpt.models.modules.perceiver import PerceiverResampler


class Flamingo(FlamingoBase):
    """A Flamingo under upstream's names.

    Args:
        vision: open_clip's vision tower, or any module that gives `[n, tokens, vis_dim]` for what
            stands in `vision_x` after its first three axes.
        perceiver: the resampler, its layers in pairs, `vis_dim` wide.
        language: the causal language model; changed in place.
        layers, every, make_block: as for `insert_cross_attention`.
        keep_decoders: register the frozen decoder layers a second time, as version 2 does.
        media_token_id: the token that stands for an image; None for a model that only loads.
        eoc_token_id: the token that ends a chunk, where `generate` stops.
        gradient_checkpointing: as `use_gradient_checkpointing` does it.
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
        eoc_token_id: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.conditioning = Conditioning(media_token_id)
        self.eoc_token_id = eoc_token_id
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
        self.use_gradient_checkpointing(gradient_checkpointing)

    @classmethod
    def from_towers(
        cls,
        vision: nn.Module,
        language: nn.Module,
        *,
        vis_dim: int,
        layers: str,
        every: int = 1,
        media_token_id: int | None = None,
        eoc_token_id: int | None = None,
        max_num_frames: int | None = None,
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> Flamingo:
        """A Flamingo of any two towers, with resampler and blocks of upstream's sizes, untrained.

        Args:
            vision: gives `[n, tokens, vis_dim]` for what stands in `vision_x` after three axes.
            language: a causal language model of transformers; changed in place.
            vis_dim: width of the visual tokens.
            layers: path of the decoder layers, such as `model.layers`.
            every: `cross_attn_every_n_layers`.
            media_token_id: the token that stands for an image, or whatever the encoder takes.
            eoc_token_id: the token that ends a chunk.
            max_num_frames: frames that get an embedding; None for single pictures.
            attn_implementation: `sdpa` or `eager`, of resampler and blocks.
            gradient_checkpointing: as `use_gradient_checkpointing` does it.

        >>> import torch, transformers
        >>> class BrainEncoder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.proj = torch.nn.Linear(50, 32)
        ...
        ...     def forward(self, voxels):  # [n, regions, 50] to [n, regions, 32]
        ...         return self.proj(voxels)
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=100,
        ...     hidden_size=16,
        ...     intermediate_size=32,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = Flamingo.from_towers(
        ...     BrainEncoder(),
        ...     transformers.LlamaForCausalLM(config),
        ...     vis_dim=32,
        ...     layers="model.layers",
        ...     media_token_id=99,
        ... )
        >>> scans = torch.randn(1, 2, 1, 7, 50)  # two scans of seven regions
        >>> model(scans, torch.tensor([[99, 5, 99, 6]])).logits.shape
        torch.Size([1, 4, 100])
        """
        # What upstream hard-codes.
        sizes: dict[str, Any] = {"dim_head": 64, "heads": 8, "ff_mult": 4}
        width = language.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        config = getattr(language, "config", None)
        width = getattr(config, "hidden_size", width)
        perceiver = PerceiverResampler(
            dim=vis_dim,
            depth=6,
            num_latents=64,
            max_num_frames=max_num_frames,
            attn_implementation=attn_implementation,
            **sizes,
        )
        return cls(
            vision=vision,
            perceiver=perceiver,
            language=language,
            layers=layers,
            every=every,
            make_block=lambda: GatedCrossAttentionBlock(
                dim=width, dim_visual=vis_dim, attn_implementation=attn_implementation, **sizes
            ),
            media_token_id=media_token_id,
            eoc_token_id=eoc_token_id,
            gradient_checkpointing=gradient_checkpointing,
        )

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
            past_key_values: the language model's cache. Text goes on where the call ended that
                filled it: images are numbered from the beginning of the text.
            use_cache: whether to give a cache back.

        Raises:
            RuntimeError: no media token is known.
            ValueError: images are given although some are cached, or neither.
        """
        with self.looking_at(vision_x, forget=clear_conditioned_layers):
            return self.lang_encoder(
                input_ids=lang_x,
                attention_mask=attention_mask,
                labels=labels,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )

    def generate(
        self,
        vision_x: torch.Tensor | None,
        lang_x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Go on writing, with the language model's own `generate`.

        Images are encoded once. Each row of them serves all beams and samples of its row.

        Args:
            vision_x: as for `forward`; None after `cache_media`.
            lang_x: the prompt, token ids `[batch, tokens]`, padded on the left.
            attention_mask: `[batch, tokens]`.
            **kwargs: of `generate` in transformers: `max_new_tokens`, `num_beams`, `do_sample`,
                `num_return_sequences`, ... `eos_token_id` is the end of a chunk by default, and
                `use_cache` is on.

        Returns:
            As transformers': the prompt with what was written, `[rows, tokens]`.

        Raises:
            RuntimeError: no media token is known.
            ValueError: images are given although some are cached, or neither.
        """
        language: Any = self.lang_encoder
        kwargs = self.generation_defaults(kwargs)
        with torch.no_grad(), self.looking_at(vision_x), self.announcing():
            return language.generate(input_ids=lang_x, attention_mask=attention_mask, **kwargs)
