"""How each kind of model is asked: one forward with all its results, and a greedy continuation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.parity.inputs import MASK, Inputs
from flamingo_ckpt.parity.towers import pooled

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Stages that a forward itself gives, after those of the modules.
LOGITS = "logits"


def on_device(inputs: Inputs, device: str, dtype: str) -> dict[str, torch.Tensor]:
    """The tensors where the model is; pictures in its dtype."""
    import torch

    wanted = getattr(torch, dtype)
    return {
        name: tensor.to(device, wanted if tensor.is_floating_point() else None)
        for name, tensor in inputs.tensors.items()
    }


def forward(module: nn.Module, kind: str, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """One forward: stage -> tensor, of what the model gives at the end."""
    return _FORWARDS[kind](module, tensors)


def _flamingo(module: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = module(
        vision_x=tensors["vision_x"], lang_x=tensors["lang_x"], attention_mask=tensors[MASK]
    )
    return {LOGITS: found.logits}


def _paligemma(module: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {LOGITS: module(**tensors).logits}


def _clip(module: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Features as users get them, before they are normalised, and the logits."""
    if hasattr(module, "encode_image"):
        image = module.encode_image(tensors["image"])
        text = module.encode_text(tensors["text"])
    else:
        image = _features(module.get_image_features(pixel_values=tensors["image"]))
        text = _features(module.get_text_features(input_ids=tensors["text"]))
    scale = module.logit_scale.exp()
    logits = scale * _unit(image) @ _unit(text).T
    bias = getattr(module, "logit_bias", None)
    found = {"image_features": image, "text_features": text}
    return {**found, LOGITS: logits if bias is None else logits + bias}


def _tower(module: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"image_features": pooled(module, tensors["image"])}


_FORWARDS = {"flamingo": _flamingo, "clip": _clip, "tower": _tower, "paligemma": _paligemma}


def _features(found: Any) -> Any:
    """Transformers 4 gives a tensor, 5 an object that holds it."""
    return getattr(found, "pooler_output", found)


def _unit(features: Any) -> Any:
    return features / features.norm(dim=-1, keepdim=True)


def continue_greedily(
    module: Any, inputs: Inputs, tensors: Mapping[str, Any], count: int
) -> tuple[list[int], list[float]]:
    """The likeliest continuation of the first row: tokens, and how far each was ahead.

    The lead is that over the second likeliest, as a share of the spread of the scores.

    Args:
        module: of a kind that writes.
        inputs: as on the CPU; their first row has no padding on its right, or it is cut off.
        tensors: the same where the model is.
        count: tokens to write.
    """
    import torch

    row: dict[str, Any] = {name: tensor[:1] for name, tensor in tensors.items()}
    mask = inputs.mask
    length = int(mask[0].nonzero().max()) + 1 if mask is not None and bool(mask[0].any()) else 1
    texts = [name for name, tensor in row.items() if tensor.ndim == 2]
    row |= {name: row[name][:, :length] for name in texts}
    tokens: list[int] = []
    leads: list[float] = []
    for _ in range(count):
        scores = forward(module, inputs.kind, row)[LOGITS][0, -1].double()
        best, second = scores.topk(2).values.tolist()
        spread = float(scores.std()) or 1.0
        tokens.append(int(scores.argmax()))
        leads.append((best - second) / spread if math.isfinite(best - second) else math.nan)
        for name in texts:
            new = {MASK: 1, "token_type_ids": 1}.get(name, tokens[-1])
            row[name] = torch.cat((row[name], row[name].new_full((1, 1), new)), dim=1)
    return tokens, leads


def gates_of(module: nn.Module) -> list[nn.Parameter]:
    """The gates of gated cross-attention, each once."""
    return [
        parameter
        for name, parameter in module.named_parameters()
        if name.endswith((".attn_gate", ".ff_gate"))
    ]
