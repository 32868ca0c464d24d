"""PaliGemma written from scratch with the hub's key names, as tutorials of it are.

Its parameters are named as `google/paligemma-3b-pt-224` stores them; its arithmetic is what the
published model computes on a prefix: no mask, positions from 1, pictures first scaled down and then
up again with the words. Only what a test needs: one sequence without padding, no cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Attention(nn.Module):
    """Attention of every position to every other, with as many key heads as there are."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, out: str, bias: bool
    ) -> None:
        super().__init__()
        self.head_dim, self.out = head_dim, out
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        setattr(self, out, nn.Linear(heads * head_dim, dim, bias=bias))

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        result: Tensor = getattr(self, self.out)(mixed)
        return result


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + H/2) of (B, heads, T, H) by angles (T, H/2)."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class VisionEmbeddings(nn.Module):
    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        dim, patch = vision["hidden_size"], vision["patch_size"]
        count = (vision["image_size"] // patch) ** 2
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch)
        self.position_embedding = nn.Embedding(count, dim)
        # not in the state dict, like the published class's
        self.register_buffer("position_ids", torch.arange(count)[None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        result: Tensor = patches + self.position_embedding(self.position_ids)
        return result


class VisionMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return result


class VisionLayer(nn.Module):
    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        dim, heads = vision["hidden_size"], vision["num_attention_heads"]
        self.self_attn = Attention(dim, heads, heads, dim // heads, "out_proj", True)
        self.layer_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = VisionMLP(dim, vision["intermediate_size"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        count = vision["num_hidden_layers"]
        self.layers = nn.ModuleList(VisionLayer(vision) for _ in range(count))


class VisionModel(nn.Module):
    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(vision)
        self.encoder = VisionEncoder(vision)
        self.post_layernorm = nn.LayerNorm(vision["hidden_size"], eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        result: Tensor = self.post_layernorm(x)
        return result


class VisionTower(nn.Module):
    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        self.vision_model = VisionModel(vision)


class Projector(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)


class RMSNorm(nn.Module):
    """Scaled by one more than its weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class GemmaMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        result: Tensor = self.down_proj(gated)
        return result


class GemmaLayer(nn.Module):
    def __init__(self, text: Mapping[str, Any]) -> None:
        super().__init__()
        dim = text["hidden_size"]
        self.self_attn = Attention(
            dim,
            text["num_attention_heads"],
            text["num_key_value_heads"],
            text["head_dim"],
            "o_proj",
            False,
        )
        self.mlp = GemmaMLP(dim, text["intermediate_size"])
        self.input_layernorm = RMSNorm(dim)
        self.post_attention_layernorm = RMSNorm(dim)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class GemmaModel(nn.Module):
    def __init__(self, text: Mapping[str, Any]) -> None:
        super().__init__()
        dim, half = text["hidden_size"], text["head_dim"] // 2
        self.embed_tokens = nn.Embedding(text["vocab_size"], dim)
        self.layers = nn.ModuleList(GemmaLayer(text) for _ in range(text["num_hidden_layers"]))
        self.norm = RMSNorm(dim)
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * math.sqrt(x.shape[-1])
        positions = torch.arange(1, x.shape[1] + 1, dtype=torch.float32)
        rotation = torch.outer(positions, self.inv_freq).to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotation)
        result: Tensor = self.norm(x)
        return result


class GemmaForCausalLM(nn.Module):
    def __init__(self, text: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = GemmaModel(text)
        self.lm_head = nn.Linear(text["hidden_size"], text["vocab_size"], bias=False)


class FromScratch(nn.Module):
    """The whole model; `config` is a `config.json`."""

    def __init__(self, config: Mapping[str, Any], *, tied: bool = True) -> None:
        super().__init__()
        text, vision = config["text_config"], config["vision_config"]
        self.image_token = config["image_token_index"]
        self.vision_tower = VisionTower(vision)
        self.multi_modal_projector = Projector(vision["hidden_size"], text["hidden_size"])
        self.language_model = GemmaForCausalLM(text)
        if tied:
            self.tie_weights()

    def tie_weights(self) -> None:
        self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, pixel_values: Tensor, **_: Any) -> Tensor:
        """Logits (1, T, V) of one sequence."""
        x = self.language_model.model.embed_tokens(input_ids)
        seen = self.vision_tower.vision_model(pixel_values)
        seen = self.multi_modal_projector.linear(seen) / math.sqrt(x.shape[-1])
        x = x.masked_scatter((input_ids == self.image_token)[..., None], seen.to(x.dtype))
        result: Tensor = self.language_model.lm_head(self.language_model.model(x))
        return result


def careless_load(folder: Path) -> FromScratch:
    """The loader that comes with such programs: every file there is, and no look at what fitted."""
    from safetensors.torch import load_file

    model = FromScratch(json.loads((folder / "config.json").read_text()), tied=False)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model
