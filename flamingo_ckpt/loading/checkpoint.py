"""open_clip's `load_checkpoint`, for any module and any format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flamingo_ckpt.loading.engine import load_into
from flamingo_ckpt.loading.options import LoadOptions
from flamingo_ckpt.loading.report import IncompatibleKeys

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike[str],
    strict: bool = True,
    weights_only: bool = True,  # noqa: ARG001
    device: str | torch.device = "cpu",
    *,
    layout: str | None = None,
    image_grid: tuple[int, int] | None = None,
    text_positions: str = "linear",
    assign: bool | None = None,
    dtype: str | torch.dtype | None = None,
    wrapper_key: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> IncompatibleKeys:
    """Load a checkpoint into a model: `open_clip.load_checkpoint` with its signature.

    Read are `.pt`, `.pth`, `.bin`, `.ckpt`, TorchScript, `.safetensors`, `.npz`, folders and
    indexes, by content and not by suffix; training checkpoints and bare state dicts; names with
    wrapper prefixes. Names of another layout (OpenAI, open_clip flat or with a text module of its
    own, transformers, timm, big_vision, OpenFlamingo and its Hugging Face port, PaliGemma's
    seven) are carried into the model's. Tables of positions are brought to the model's grid and
    length. Values are cast into the model's dtype as torch does, and the report counts them.

    Where a CLIP with a `logit_bias` meets a file without, the bias becomes zero, as in open_clip:
    the logits stay those of the source. Second names of one tensor are accepted where the bits
    are equal, and buffers that models compute may be in the file or not.

    Args:
        model: open_clip's `CLIP`, `CustomTextCLIP` or `CoCa`, a tower, a model of timm's or of
            transformers', a Flamingo, or any other module.
        checkpoint_path: a file, a folder or an index.
        strict: whether missing and unexpected keys raise. Shapes that differ raise in any case,
            and so does a load that matches next to nothing.
        weights_only: accepted for compatibility. No file is ever executed, whatever it says.
        device: of parameters that the model has on meta; others stay where they are.
        layout: of the file, where its names fit several.
        image_grid: (height, width) of the file's image positions, where nothing tells it.
        text_positions: `linear` or `truncate`.
        assign: whether parameters are replaced; None: only those on meta.
        dtype: of parameters that are replaced; None: the model's, `keep`: the file's.
        wrapper_key: of a training checkpoint with several sets of weights.
        include: globs; only keys of the file that fit one are read.
        exclude: globs; keys of the file that fit one are left out.

    Returns:
        `(missing_keys, unexpected_keys)`, with the whole account as `.report`.

    Raises:
        LoadError: (a `RuntimeError`) the checkpoint does not fit; the model is unchanged.
        CkptError: the checkpoint cannot be read.
    """
    report = load_into(
        model,
        checkpoint_path,
        LoadOptions(
            policy="strict" if strict else "lenient",
            layout=layout,
            device=device,
            image_grid=image_grid,
            text_positions=text_positions,
            assign=assign,
            dtype=dtype,
            wrapper_key=wrapper_key,
            include=include,
            exclude=exclude,
        ),
    )
    return IncompatibleKeys(report.missing_keys, report.unexpected_keys, report)
