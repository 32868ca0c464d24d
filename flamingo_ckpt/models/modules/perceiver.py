"""The perceiver resampler: from any number of visual tokens to a fixed number of latents.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022), figure 5. Names of
parameters as OpenFlamingo 2 has them, or as Otter's port to Hugging Face classes has them.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from flamingo_ckpt.models.modules.attention import (
    attend,
    check_implementation,
    merge_heads,
    split_heads,
)


def feed_forward(dim: int, mult: int) -> nn.Sequential:
    """LayerNorm, and two linear maps without bias around a GELU: [.., dim] to [.., dim]."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class PerceiverAttention(nn.Module):
    """Latents attend to the visual tokens and to themselves.

    Args:
        dim: width of tokens and latents.
        dim_head, heads: attention is `dim_head * heads` wide.
        attn_implementation: `sdpa` or `eager`.
    """

    def __init__(
        self, *, dim: int, dim_head: int, heads: int, attn_implementation: str = "sdpa"
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.attn_implementation = check_implementation(attn_implementation)
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        # Rows of the keys, then rows of the values.
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def attention(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the latents take from the tokens and from each other.

        Args:
            media: `[..., tokens, dim]`.
            latents: `[..., num_latents, dim]`.

        Returns:
            `[..., num_latents, dim]`, to be added to the latents.
        """
        latents = self.norm_latents(latents)
        # The latents stand last among what is attended to, already normalised.
        context = torch.cat((self.norm_media(media), latents), dim=-2)
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        queries = self.to_q(latents)
        found = attend(
            split_heads(queries, self.heads),
            split_heads(keys, self.heads),
            split_heads(values, self.heads),
            implementation=self.attn_implementation,
        )
        taken: torch.Tensor = self.to_out(merge_heads(found))
        return taken

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """As `attention`."""
        return self.attention(media, latents)


class PerceiverBlock(PerceiverAttention):
    """Attention and MLP in one module, as Otter has them; OpenFlamingo has a pair instead."""

    def __init__(
        self,
        *,
        dim: int,
        dim_head: int,
        heads: int,
        ff_mult: int,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__(
            dim=dim, dim_head=dim_head, heads=heads, attn_implementation=attn_implementation
        )
        self.feed_forward = feed_forward(dim, ff_mult)

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after attention and MLP, each with its residual."""
        latents = self.attention(media, latents) + latents
        after: torch.Tensor = self.feed_forward(latents) + latents
        return after


class PerceiverResampler(nn.Module):
    """The resampler.

    Args:
        dim: width of the visual tokens.
        depth: number of layers.
        dim_head, heads: of the attention in each.
        num_latents: how many tokens come out for each image or video.
        ff_mult: width of the MLP over `dim`.
        max_num_frames: frames of a video that have an embedding; None for none.
        max_num_media: media of a sequence that have an embedding; None for none.
        paired: name attention and MLP of a layer `0` and `1`, as OpenFlamingo does.
        attn_implementation: `sdpa` or `eager`.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        dim_head: int,
        heads: int,
        num_latents: int,
        ff_mult: int,
        max_num_frames: int | None = None,
        max_num_media: int | None = None,
        paired: bool = True,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = _embedding(max_num_frames, dim)
        self.media_time_embs = _embedding(max_num_media, 1, dim)
        sizes: dict[str, Any] = {
            "dim": dim,
            "dim_head": dim_head,
            "heads": heads,
            "attn_implementation": attn_implementation,
        }
        layers: list[nn.Module] = []
        for _ in range(depth):
            if paired:
                attention = PerceiverAttention(**sizes)
                layers.append(nn.ModuleList([attention, feed_forward(dim, ff_mult)]))
            else:
                layers.append(PerceiverBlock(**sizes, ff_mult=ff_mult))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        #: compute the layers anew in the backward pass instead of keeping what they computed
        self.uses_checkpointing = False

    def check_numbers(self, *, num_frames: int, num_media: int) -> None:
        """Raise `ValueError` for more frames or media than the resampler can tell apart."""
        _check_number("frames", num_frames, self.frame_embs, alone=1)
        _check_number("media", num_media, self.media_time_embs, alone=num_media)

    def forward(self, media: torch.Tensor) -> torch.Tensor:
        """The latents of every image or video.

        Args:
            media: `[batch, media, frames, tokens, dim]`, from the vision tower.

        Returns:
            `[batch, media, num_latents, dim]`.

        Raises:
            ValueError: more frames or media than have an embedding, or several frames where none
                has one: nothing would tell their order.
        """
        batch, num_media, num_frames = media.shape[:3]
        self.check_numbers(num_frames=num_frames, num_media=num_media)
        if self.frame_embs is not None:
            media = media + self.frame_embs[:num_frames, None]
        media = rearrange(media, "b m f n d -> b m (f n) d")
        if self.media_time_embs is not None:
            media = media + self.media_time_embs[:num_media]
        latents = self.latents.expand(batch, num_media, -1, -1)
        for layer in self.layers:
            if self.uses_checkpointing and torch.is_grad_enabled():
                latents = checkpoint(_layer, layer, media, latents, use_reentrant=False)
            else:
                latents = _layer(layer, media, latents)
        normed: torch.Tensor = self.norm(latents)
        return normed


def _layer(layer: nn.Module, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The latents after a layer of either form."""
    if isinstance(layer, nn.ModuleList):
        attention, mlp = layer
        latents = attention(media, latents) + latents
        return mlp(latents) + latents  # type: ignore[no-any-return]
    return layer(media, latents)  # type: ignore[no-any-return]


def _check_number(what: str, found: int, embeddings: torch.Tensor | None, *, alone: int) -> None:
    most = alone if embeddings is None else len(embeddings)
    if found > most:
        told = "none has an embedding" if embeddings is None else f"{most} have an embedding"
        raise ValueError(f"{found} {what}, and {told}")


def _embedding(number: int | None, *shape: int) -> nn.Parameter | None:
    return None if number is None else nn.Parameter(torch.randn(number, *shape))
