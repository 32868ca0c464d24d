"""A trained checkpoint into a Flamingo that exists: download, then fill what was trained."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.places import (
    HF_WEIGHTS,
    Access,
    config_folder,
    fetch_file,
    fetch_weights,
    local_path,
)
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flamingo_ckpt.loading.report import LoadReport

_logger = logging.getLogger(__name__)

DEFAULT_FILENAME = "checkpoint.pt"
#: The tower's projection: no Flamingo uses it, and the Hugging Face port has no place for it.
_UNUSED = frozenset({"vision_encoder.proj"})
_GATES = (".attn_gate", ".ff_gate")


def load_pretrained(
    model: nn.Module,
    repo_id_or_path: str | os.PathLike[str],
    filename: str | None = DEFAULT_FILENAME,
    revision: str | None = None,
    device: str | torch.device | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    layout: str | None = None,
    wrapper_key: str | None = None,
) -> LoadReport:
    """Fill a Flamingo from a released or saved checkpoint, which holds only what was trained.

    Any format and any layout is read; wrappers and prefixes (`module.`) are understood; nothing of
    the file is executed. What the checkpoint lacks has to be exactly what it lacks by design: the
    frozen tower, the frozen language model, and an embedding that is frozen. A gate, a norm or a
    whole layer too few or too many, another number of rows or another interval is an error.

    Args:
        model: as `create_model_and_transforms` gives it; its frozen parts have their weights.
        repo_id_or_path: a file; a folder; or a repository of the hub (`owner/name`).
        filename: which file of a folder or repository. An index stands for its shards. A folder
            without that file is taken as a whole. None: of a repository the weights that
            transformers would take, such as `model.safetensors`.
        revision: branch, tag or commit of the repository.
        device: move the model there first; what is on meta gets its bytes there. None: each tensor
            is filled where it is.
        cache_dir: of the hub's cache, instead of its usual place.
        local_files_only: take what the cache has, ask nobody.
        token: for the hub.
        layout: of the checkpoint; None goes by the evidence.
        wrapper_key: the weights of a torch file are under this key.

    Returns:
        What was filled, cast and left out, and what is absent by design (`absent_by_design`); it
        prints as a few lines.

    Raises:
        LoadError: what does not fit, grouped; nothing was filled.
        CkptError: FC450 no such file or folder, FC470 to FC475 from the hub; what the file's
            format raises.

    Example:
        model, image_processor, tokenizer = create_model_and_transforms(...)
        load_pretrained(model, "openflamingo/OpenFlamingo-3B-vitl-mpt1b")
    """
    from flamingo_ckpt.loading.devices import check_device
    from flamingo_ckpt.loading.engine import load_into
    from flamingo_ckpt.loading.options import LoadOptions

    check_device(device)
    access = Access(
        revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
    )
    source = _locate(os.fspath(repo_id_or_path), filename, access)
    if device is not None:
        move(model, device)
    options = LoadOptions(
        policy="partial",
        layout=layout,
        device=device,
        wrapper_key=wrapper_key,
        may_miss=_UNUSED,
    )
    report = load_into(model, source, options)
    _mention_closed_gates(model, report.uri)
    return report


def _mention_closed_gates(model: nn.Module, uri: str) -> None:
    """Gates are made closed. A checkpoint in which all still are was never trained."""
    gates = [one for name, one in model.named_parameters() if name.endswith(_GATES)]
    if gates and not any(bool(gate.any()) for gate in gates):
        _logger.warning(
            "all %d gates of `%s` are 0: its gated cross-attention lets no picture through",
            len(gates),
            uri,
        )


def _locate(place: str, filename: str | None, access: Access) -> str:
    """The local path of the checkpoint."""
    path = local_path(place, "checkpoint")
    if path is None:
        if filename is None:
            folder = config_folder(place, access, "checkpoint")
            return fetch_weights(place, folder, access, HF_WEIGHTS)
        return fetch_file(place, filename, access)
    if access.revision is not None:
        raise CkptError(
            f"`revision` is `{escape(access.revision)}`, but `{escape(path)}` is a local path",
            code="FC006",
            where=path,
            hint="leave `revision` out",
        )
    if not os.path.isdir(path) or filename is None:
        return path
    inside = os.path.join(path, filename)
    if os.path.isfile(inside) or filename != DEFAULT_FILENAME:
        return inside
    return path


def move(model: nn.Module, device: str | torch.device) -> None:
    """`model.to(device)`, but for what is on meta: that has nothing to be moved."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    apply: Any = model._apply
    apply(moved)
