"""MosaicGPT, the language model of OpenFlamingo-3B (`mpt-1b-redpajama-200b`).

It was published as code on the hub and has no class in transformers. Its successor MPT has other
names, and no norms on queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class MosaicAttention(nn.Module):
    """Self-attention with ALiBi; queries and keys are normalised over the full width."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.q_ln = nn.LayerNorm(d_model, bias=False)
        self.k_ln = nn.LayerNorm(d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)


class MosaicMLP(nn.Module):
    """Two linear maps around an exact GELU."""

    def __init__(self, d_model: int, mlp_ratio: int) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(d_model, mlp_ratio * d_model, bias=False)
        self.mlp_down = nn.Linear(mlp_ratio * d_model, d_model, bias=False)


class MosaicBlock(nn.Module):
    """One decoder layer, norms first."""

    def __init__(self, d_model: int, mlp_ratio: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d_model, bias=False)
        self.attn = MosaicAttention(d_model)
        self.ln_2 = nn.LayerNorm(d_model, bias=False)
        self.mlp = MosaicMLP(d_model, mlp_ratio)


class MosaicGPT(nn.Module):
    """The language model; its head is the embedding, under no name of its own.

    Args:
        config: `d_model`, `n_layers`, `vocab_size`, and `mlp_ratio` (4 where it is not given).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, ratio = config["d_model"], config.get("mlp_ratio") or 4
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config["vocab_size"], width),
                "blocks": nn.ModuleList(
                    [MosaicBlock(width, ratio) for _ in range(config["n_layers"])]
                ),
                "ln_f": nn.LayerNorm(width, bias=False),
            }
        )

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens."""
        return self.transformer["wte"]
