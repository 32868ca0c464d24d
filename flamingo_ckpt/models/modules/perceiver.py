"""The perceiver resampler: from any number of visual tokens to a fixed number of latents.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022), figure 5. Names of
parameters as OpenFlamingo 2 has them, or as Otter's port to Hugging Face classes has them.
"""

from __future__ import annotations

import torch
from torch import nn


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
    """

    def __init__(self, *, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        inner = dim_head * heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        # Rows of the keys, then rows of the values.
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)


class PerceiverBlock(PerceiverAttention):
    """Attention and MLP in one module, as Otter has them; OpenFlamingo has a pair instead."""

    def __init__(self, *, dim: int, dim_head: int, heads: int, ff_mult: int) -> None:
        super().__init__(dim=dim, dim_head=dim_head, heads=heads)
        self.feed_forward = feed_forward(dim, ff_mult)


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
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = _embedding(max_num_frames, dim)
        self.media_time_embs = _embedding(max_num_media, 1, dim)
        layers: list[nn.Module] = []
        for _ in range(depth):
            if paired:
                attention = PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads)
                layers.append(nn.ModuleList([attention, feed_forward(dim, ff_mult)]))
            else:
                block = PerceiverBlock(dim=dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult)
                layers.append(block)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)


def _embedding(number: int | None, *shape: int) -> nn.Parameter | None:
    return None if number is None else nn.Parameter(torch.randn(number, *shape))
