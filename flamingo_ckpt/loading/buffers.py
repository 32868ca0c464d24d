"""Buffers that no checkpoint holds and that a module built on meta lacks: computed again.

What they hold follows from the module's own sizes and config. Known are the rotary frequencies of
transformers' language models, the positions of its CLIP and SigLIP, Gemma's scale of embeddings,
GPT-J's table of sines, open_clip's causal mask and the counter of batch norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import LoadError, name_some
from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.loading.targets import describe_module

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Gives a buffer's content from its module and the buffer on meta; None where it does not know it.
_Recipe = Callable[["nn.Module", "torch.Tensor"], "torch.Tensor | None"]


def rebuild_buffers(module: nn.Module, device: str | torch.device | None = None) -> tuple[str, ...]:
    """Compute every buffer of a module that is still on meta; returns their names.

    Args:
        module: built on meta, its parameters loaded or not.
        device: of the buffers; None: the CPU.

    Raises:
        LoadError: FC433 naming the buffers whose content nothing tells.
    """
    import torch

    if unknown := [name for name, _, _, content in _on_meta(module) if content is None]:
        raise LoadError(
            f"{describe_module(module)} has buffers on meta that no file holds and that are not "
            "known: " + name_some(unknown, where=""),
            code="FC433",
            key=unknown[0],
            hint="build the module on a real device, or set them before",
        )
    done: list[str] = []
    for name, part, leaf, recipe in list(_on_meta(module)):
        old = getattr(part, leaf)
        with torch.no_grad(), torch.device("cpu"):
            content = recipe(part, old) if recipe else None
        if content is None or tuple(content.shape) != tuple(old.shape):
            raise LoadError(
                f"`{name}` of {describe_module(module)} cannot be computed again",
                code="FC433",
                key=name,
                hint="build the module on a real device",
            )
        part._buffers[leaf] = content.to(dtype=old.dtype, device=device or "cpu")
        done.append(name)
    return tuple(done)


def computable_buffers(module: nn.Module) -> frozenset[str]:
    """Names of the buffers on meta that `rebuild_buffers` knows, without wrapper prefixes."""
    return frozenset(name for name, _, _, recipe in _on_meta(module) if recipe is not None)


def hopeless_buffers(module: nn.Module) -> tuple[str, ...]:
    """Names of what is on meta, in no state dict, and not known: it cannot get any content."""
    state = {strip_wrappers(key)[0] for key in module.state_dict(keep_vars=True)}
    found = [
        name for name, _, _, recipe in _on_meta(module) if recipe is None and name not in state
    ]
    for path, part in module.named_modules():
        loose = (key for key, value in vars(part).items() if _is_meta(value))
        found += [f"{path}.{key}" if path else key for key in loose]
    return tuple(found)


def _on_meta(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, _Recipe | None]]:
    """(name, its module, name there, how to compute it) of every buffer on meta."""
    for path, part in module.named_modules():
        for leaf, tensor in part._buffers.items():
            if tensor is not None and _is_meta(tensor):
                name = strip_wrappers(f"{path}.{leaf}" if path else leaf)[0]
                yield name, part, leaf, _recipe(part, leaf)


def _is_meta(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def _recipe(part: nn.Module, leaf: str) -> _Recipe | None:
    if "RotaryEmbedding" in type(part).__name__ and hasattr(part, "config"):
        return lambda own, _: _of_new(own, leaf)
    if leaf == "embed_scale" and isinstance(getattr(part, "scalar_embed_scale", None), float):
        return _scale
    if leaf == "embed_positions" and hasattr(part, "pos_embd_dim"):
        return _sines
    return _BY_NAME.get(leaf)


def _of_new(part: Any, leaf: str) -> torch.Tensor | None:
    """The buffer of a module of the same class and config; it has no parameters, so it is small."""
    found: torch.Tensor | None = getattr(type(part)(part.config), leaf, None)
    return found


def _scale(part: Any, _: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor(part.scalar_embed_scale)


def _sines(_: nn.Module, old: torch.Tensor) -> torch.Tensor:
    """GPT-J's sines and cosines: [positions, dim]."""
    import torch

    num_positions, dim = old.shape
    frequency = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
    angle = torch.arange(num_positions, dtype=torch.int64).float()[:, None] * frequency
    return torch.cat((torch.sin(angle), torch.cos(angle)), dim=1)


def _positions(_: nn.Module, old: torch.Tensor) -> torch.Tensor | None:
    """0, 1, 2, ... as [1, positions]."""
    import torch

    return torch.arange(old.shape[1]).expand(1, -1) if old.ndim == 2 else None


def _causal_mask(_: nn.Module, old: torch.Tensor) -> torch.Tensor | None:
    """Minus infinity above the diagonal: [positions, positions]."""
    import torch

    square = old.ndim == 2 and old.shape[0] == old.shape[1] and old.is_floating_point()
    return torch.full(tuple(old.shape), float("-inf")).triu(1) if square else None


def _zero(_: nn.Module, old: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.zeros(tuple(old.shape))


_BY_NAME: dict[str, _Recipe] = {
    "position_ids": _positions,
    "attn_mask": _causal_mask,
    "num_batches_tracked": _zero,
}
