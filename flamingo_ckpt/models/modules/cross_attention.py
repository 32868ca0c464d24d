"""The gated cross-attention that goes before a frozen decoder layer.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022), figure 4. Names of
parameters as OpenFlamingo 2 and Otter have them; they differ in the name of the MLP.
"""

from __future__ import annotations

import torch
from torch import nn

from flamingo_ckpt.models.modules.perceiver import feed_forward


class MaskedCrossAttention(nn.Module):
    """Text attends to the latents of its image.

    Args:
        dim: width of the text.
        dim_visual: width of the latents.
        dim_head, heads: attention is `dim_head * heads` wide.
    """

    def __init__(self, *, dim: int, dim_visual: int, dim_head: int, heads: int) -> None:
        super().__init__()
        inner = dim_head * heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        # Rows of the keys, then rows of the values.
        self.to_kv = nn.Linear(dim_visual, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and MLP, each behind a gate that starts closed.

    Args:
        dim, dim_visual, dim_head, heads: of the attention.
        ff_mult: width of the MLP over `dim`.
        ff_name: what the MLP is called: `ff` (OpenFlamingo) or `feed_forward` (Otter).
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
    ) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(
            dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.add_module(ff_name, feed_forward(dim, ff_mult))
        self.ff_gate = nn.Parameter(torch.zeros(1))
