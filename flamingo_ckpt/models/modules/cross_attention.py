"""The gated cross-attention that goes before a frozen decoder layer.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022), figure 4. Names of
parameters as OpenFlamingo 2 and Otter have them; they differ in the name of the MLP.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import nn

from flamingo_ckpt.models.modules.attention import (
    attend,
    check_implementation,
    merge_heads,
    split_heads,
)
from flamingo_ckpt.models.modules.perceiver import feed_forward


class MaskedCrossAttention(nn.Module):
    """Text attends to the latents of its image.

    Args:
        dim: width of the text.
        dim_visual: width of the latents.
        dim_head, heads: attention is `dim_head * heads` wide.
        attn_implementation: `sdpa` or `eager`.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int,
        heads: int,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.attn_implementation = check_implementation(attn_implementation)
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        # Rows of the keys, then rows of the values.
        self.to_kv = nn.Linear(dim_visual, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self, text: torch.Tensor, media: torch.Tensor, text_time: torch.Tensor
    ) -> torch.Tensor:
        """What each token takes from the image before it.

        Args:
            text: `[batch, tokens, dim]`.
            media: `[batch, images, num_latents, dim_visual]`.
            text_time: `[batch, tokens]`, integers: the number of the image that a token attends
                to, from 1; 0 for none. A token with a number beyond the images attends to all of
                them alike, as in upstream.

        Returns:
            `[batch, tokens, dim]`, to be gated and added; exactly 0 where `text_time` is 0.
        """
        num_images, num_latents = media.shape[1:3]
        keys, values = self.to_kv(rearrange(media, "b m n d -> b (m n) d")).chunk(2, dim=-1)
        queries = self.to_q(self.norm(text))
        number = torch.arange(1, num_images + 1, device=media.device)
        media_time = repeat(number, "m -> (m n)", n=num_latents)
        found = attend(
            split_heads(queries, self.heads),
            split_heads(keys, self.heads),
            split_heads(values, self.heads),
            allowed=rearrange(text_time, "b t -> b 1 t 1") == media_time,
            implementation=self.attn_implementation,
        )
        found = found.masked_fill(rearrange(text_time == 0, "b t -> b 1 t 1"), 0.0)
        taken: torch.Tensor = self.to_out(merge_heads(found))
        return taken


def text_times(
    media_locations: torch.Tensor, num_tokens: int, *, is_continuation: bool = False
) -> torch.Tensor:
    """The number of the image that each token attends to: `[batch, num_tokens]`.

    Args:
        media_locations: booleans `[batch, seen]`, true where a token stands for an image.
        num_tokens: of the text that is looked at.
        is_continuation: the tokens come after all of `media_locations` and stand for no image
            themselves, as in generation: each attends to the last image.

    Raises:
        ValueError: another number of tokens than of locations, where they should be the same.
    """
    if is_continuation:
        return repeat(media_locations.count_nonzero(dim=1), "b -> b t", t=num_tokens)
    if media_locations.shape[1] != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens, and media locations for {media_locations.shape[1]} of them"
        )
    return media_locations.cumsum(dim=-1)


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and MLP, each behind a gate that starts closed.

    Args:
        dim, dim_visual, dim_head, heads: of the attention.
        ff_mult: width of the MLP over `dim`.
        ff_name: what the MLP is called: `ff` (OpenFlamingo) or `feed_forward` (Otter).
        attn_implementation: `sdpa` or `eager`.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int,
        heads: int,
        ff_mult: int,
        ff_name: str = "ff",
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(
            dim=dim,
            dim_visual=dim_visual,
            dim_head=dim_head,
            heads=heads,
            attn_implementation=attn_implementation,
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self._ff_name = ff_name
        self.add_module(ff_name, feed_forward(dim, ff_mult))
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, text: torch.Tensor, media: torch.Tensor, text_time: torch.Tensor
    ) -> torch.Tensor:
        """The text after the block; the arguments and shapes of `MaskedCrossAttention`.

        With both gates at 0, as they start, it is the text itself. The MLP applies to every token,
        also to those before the first image.
        """
        text = self.attn(text, media, text_time) * self.attn_gate.tanh() + text
        mlp = self.get_submodule(self._ff_name)
        after: torch.Tensor = mlp(text) * self.ff_gate.tanh() + text
        return after
