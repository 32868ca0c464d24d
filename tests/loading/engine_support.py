"""Copies of zoo models with other weights, and what a load has to give them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import zoo
from tests.zoo_lms import seeded


def scrambled(module: Any, seed: int = 99) -> Any:
    """A copy whose every parameter and floating-point buffer of the state dict is another."""
    import torch

    other = copy.deepcopy(module)
    with seeded(seed), torch.no_grad():
        for tensor in {id(t): t for t in other.state_dict(keep_vars=True).values()}.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, dtype=torch.float32))
    return other


def on_meta(module: Any) -> Any:
    """A copy without any bytes, ties kept, as one that was built on meta."""
    import torch

    memo: dict[int, Any] = {}
    for tensor in module.parameters():
        kept = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = torch.nn.Parameter(kept, requires_grad=tensor.requires_grad)
    for tensor in module.buffers():
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return copy.deepcopy(module, memo)


def bits(module: Any) -> dict[str, bytes]:
    """Every name of the state dict with its bytes."""
    import torch

    return {
        name: bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in module.state_dict().items()
    }


def assert_same(module: Any, reference: Any) -> None:
    """Every tensor bit for bit."""
    ours, theirs = bits(module), bits(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def saved(state: Mapping[str, Any], folder: Path, suffix: str = ".pt", **options: Any) -> Path:
    """A state dict in a file of the format that the suffix names."""
    path = folder / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        return zoo.save_safetensors(state, path)
    if suffix == ".npz":
        return zoo.save_npz(state, path)
    return zoo.save_torch(state, path, **options)
