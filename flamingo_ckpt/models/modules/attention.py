"""Scaled dot-product attention as the perceiver and the gated blocks use it.

`eager` is upstream's arithmetic step by step, for comparisons bit by bit; `sdpa` is torch's fused
kernel, which rounds otherwise and needs no matrix of scores in memory.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

IMPLEMENTATIONS = ("eager", "sdpa")


def check_implementation(name: str) -> str:
    """The name itself; raises `ValueError` for one that is not in `IMPLEMENTATIONS`."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {' or '.join(IMPLEMENTATIONS)}, not {name!r}")
    return name


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """`[..., n, heads * d]` to `[..., heads, n, d]`."""
    return rearrange(tokens, "... n (h d) -> ... h n d", h=heads)


def merge_heads(tokens: torch.Tensor) -> torch.Tensor:
    """`[..., heads, n, d]` to `[..., n, heads * d]`."""
    return rearrange(tokens, "... h n d -> ... n (h d)")


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    allowed: torch.Tensor | None = None,
    implementation: str = "sdpa",
) -> torch.Tensor:
    """Weigh values by how well their keys fit.

    A query to which nothing is allowed weighs all values alike, as upstream's finite mask does;
    whoever wants nothing there has to say so afterwards.

    Args:
        queries: `[..., heads, n, d]`, not yet scaled.
        keys: `[..., heads, m, d]`.
        values: `[..., heads, m, d]`.
        allowed: booleans that broadcast to `[..., heads, n, m]`; None allows everything.
        implementation: one of `IMPLEMENTATIONS`.

    Returns:
        `[..., heads, n, d]`.
    """
    scale = queries.shape[-1] ** -0.5
    lowest = -torch.finfo(queries.dtype).max
    if implementation == "sdpa":
        mask = None
        if allowed is not None:
            mask = torch.zeros_like(allowed, dtype=queries.dtype).masked_fill(~allowed, lowest)
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    scores = torch.einsum("...nd,...md->...nm", queries * scale, keys)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, lowest)
    # softmax subtracts the maximum itself; upstream does it before as well, and this rounds
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return torch.einsum("...nm,...md->...nd", scores.softmax(dim=-1), values)
