"""A device that is not there is told before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flamingo_ckpt import (
    create_model_and_transforms,
    load_checkpoint,
    load_hf_model,
    load_pretrained,
)
from flamingo_ckpt.errors import CkptError

NOWHERE = "cuda:99"  # a GPU that no machine has
PLACE = "no-such-place/at-all"


def checkpoint(folder: Path, device: Any) -> Any:
    return load_checkpoint(nn.Linear(2, 2), saved(folder), device=device)


def pretrained(folder: Path, device: Any) -> Any:
    return load_pretrained(nn.Linear(2, 2), saved(folder), device=device)


def hf_model(folder: Path, device: Any) -> Any:
    return load_hf_model(folder, device)


def created(folder: Path, device: Any) -> Any:
    return create_model_and_transforms(PLACE, None, PLACE, PLACE, device=device)


def saved(folder: Path) -> Path:
    torch.save(nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    return folder / "linear.pt"


@pytest.mark.parametrize("load", [checkpoint, pretrained, hf_model, created])
@pytest.mark.parametrize("device", [NOWHERE, torch.device(NOWHERE), "gpu", "meta"])
def test_every_loader_refuses_it_first(
    load: Callable[[Path, Any], Any], device: Any, tmp_path: Path
) -> None:
    with pytest.raises(CkptError, match="device") as caught:
        load(tmp_path, device)
    assert caught.value.code == "FC006"
    assert "`cpu`" in (caught.value.hint or "")
