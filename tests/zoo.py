"""Tiny random models built by the upstream packages: what the package is compared with.

Nothing in them is left at 0 or 1, so two tensors that changed places never look right (an exception
is PaliGemma's padding, which is zero unless asked otherwise). Models are built once a process and
shared: copy a model before changing it. State dicts are new on each access, their tensors are not.

    from tests import zoo

    llama = zoo.openflamingo("llama", every_n=2)
    zoo.save_torch(llama.partial, tmp_path / "checkpoint.pt")
    zoo.save_folder(zoo.hf_flamingo("llama").state, llama.config, tmp_path / "hf")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.zoo_clip import ClipZoo, clip, hf_from_open_clip, open_clip_cfg
from tests.zoo_flamingo import FlamingoZoo, flamingo_config, openflamingo
from tests.zoo_layouts import HfFlamingoZoo, hf_flamingo, openflamingo_v1, vlm
from tests.zoo_lms import FAMILIES, State, base_rows, flamingo_rows, prepare
from tests.zoo_others import flamingo_mini, idefics, lucidrains
from tests.zoo_paligemma import LAYOUTS as PALIGEMMA_LAYOUTS
from tests.zoo_paligemma import PaliGemmaZoo, paligemma
from tests.zoo_paligemma import inputs as paligemma_inputs
from tests.zoo_siglip import SiglipZoo, siglip

__all__ = [
    "FAMILIES",
    "PALIGEMMA_LAYOUTS",
    "ClipZoo",
    "FlamingoZoo",
    "HfFlamingoZoo",
    "PaliGemmaZoo",
    "SiglipZoo",
    "State",
    "assert_generic",
    "base_rows",
    "clip",
    "flamingo_config",
    "flamingo_mini",
    "flamingo_rows",
    "hf_flamingo",
    "hf_from_open_clip",
    "idefics",
    "lucidrains",
    "open_clip_cfg",
    "openflamingo",
    "openflamingo_v1",
    "paligemma",
    "paligemma_inputs",
    "prepare",
    "save_folder",
    "save_npz",
    "save_safetensors",
    "save_torch",
    "siglip",
    "vlm",
]

#: Buffers that are computed, not trained.
_COMPUTED = re.compile(r"(position_ids|inv_freq|attention\.(masked_)?bias)$")


def assert_generic(state: Mapping[str, Any]) -> None:
    """No 0, no 1, and no two tensors with the same content unless they are one tensor."""
    seen: dict[bytes, tuple[str, int]] = {}
    for name, tensor in state.items():
        if _COMPUTED.search(name):
            continue
        assert tensor.is_floating_point(), name
        assert not ((tensor == 0) | (tensor == 1)).any(), name
        other = seen.setdefault(tensor.numpy().tobytes(), (name, tensor.data_ptr()))
        assert other[1] == tensor.data_ptr(), f"{name} equals {other[0]}"


def save_torch(
    state: Mapping[str, Any], path: Path, *, wrapper: str | None = None, prefix: str = ""
) -> Path:
    """Write a state dict by `torch.save`; shared storages stay shared.

    Args:
        state: name -> tensor.
        path: the file; its folder is made.
        wrapper: key of a dict around it, such as `model_state_dict`.
        prefix: in front of every name, such as `module.`.
    """
    import torch

    named: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({wrapper: named, "epoch": 0} if wrapper else named, path)
    return path


def save_safetensors(state: Mapping[str, Any], path: Path) -> Path:
    """Write a state dict as safetensors; names that share a storage get a copy each."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    save_file(copies, path, metadata={"format": "pt"})
    return path


def save_folder(state: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> Path:
    """Write `model.safetensors` and `config.json`, and return the folder."""
    save_safetensors(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def save_npz(arrays: Mapping[str, Any], path: Path) -> Path:
    """Write arrays as numpy does, not compressed."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path
