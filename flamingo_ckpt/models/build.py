"""From a config to a module that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models.check_config import config_dtype
from flamingo_ckpt.models.config import ModelConfig, read_config
from flamingo_ckpt.models.expectation import LAYOUTS
from flamingo_ckpt.tensors import DTYPES, TORCH_DTYPES

if TYPE_CHECKING:
    import os

    import torch
    from torch import nn


def load_config(path_or_preset: str | os.PathLike[str]) -> ModelConfig:
    """The model that a config file, a folder with one, or a preset describes.

    Args:
        path_or_preset: a path, or a name from `PRESETS`; `model:` may stand before either.

    Raises:
        CkptError: FC404 where there is no such model, FC401 to FC403 and FC405 for what is wrong
            with its config.

    >>> load_config("openflamingo-3b-vitl-mpt1b").data["text_config"]["d_model"]
    2048
    """
    import os

    return read_config(os.fspath(path_or_preset))


def build(
    config: ModelConfig,
    layout: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    attn_implementation: str | None = None,
) -> nn.Module:
    """The module of a config, its weights random, in training mode as torch makes it.

    Args:
        config: from `load_config`.
        layout: the key layout of its names; None is `openflamingo` for a Flamingo, and that of its
            releases for any other model.
        device: where the weights are; `meta` takes no memory, and leaves buffers to be computed
            that no checkpoint holds, which the loaders do.
        dtype: of the parameters; None is the config's. Buffers keep the dtype that their class
            computes them in, as rotary frequencies have to.
        attn_implementation: `eager`, step by step, for comparisons bit by bit, or `sdpa`, torch's
            fused kernel; None is each part's default. A class that has no such form (MPT's and
            GPT-J's have no `sdpa`) computes as it does.

    Raises:
        CkptError: FC405 where the model cannot be constructed, or has no form in the layout; FC401
            for a dtype or an attention that there is not.

    >>> config = load_config("openflamingo-9b-vitl-mpt7b")
    >>> type(build(config, device="meta")).__name__
    'Flamingo'
    """
    layout = layout or ("openflamingo" if config.kind == "flamingo" else config.layout)
    known = LAYOUTS.get(config.kind, ())
    if layout not in known:
        raise CkptError(
            f"a {config.kind} model has no form in the layout `{layout}`; it has: "
            + (", ".join(known) or "none, its config only tells numbers of heads"),
            code="FC405",
            where=config.where,
        )
    if attn_implementation not in (None, "eager", "sdpa"):
        raise CkptError(
            f"`attn_implementation` is {attn_implementation!r}, not `eager` or `sdpa`",
            code="FC401",
        )
    wanted = _torch_dtype(dtype or DTYPES[config_dtype(config.data)].name)
    from flamingo_ckpt.models.assemble import assemble

    module = assemble(config, layout, device=device, attn_implementation=attn_implementation)
    return _cast(module, wanted)


def _torch_dtype(wanted: str | torch.dtype) -> torch.dtype:
    """The dtype of a name in torch's spelling or in safetensors'."""
    import torch

    name = str(wanted).removeprefix("torch.")
    found = TORCH_DTYPES.get(name) or DTYPES.get(name)
    by_name = {one: torch_name for torch_name, one in TORCH_DTYPES.items()}
    if found is None or not found.is_real_float:
        raise CkptError(f"`dtype` is {wanted!r}, not a floating-point dtype of torch", code="FC401")
    dtype = getattr(torch, by_name[found])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters in another dtype; buffers are left, and so is what shares memory.

    Weights are drawn in float32 and rounded: under another default dtype some classes would compute
    their buffers in it too.
    """
    for one in module.modules():
        config: Any = getattr(one, "config", None)
        if hasattr(config, "dtype"):
            config.dtype = dtype
        for parameter in one.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
    return module
