"""What the tests of `load_hf_model` ask of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.paligemma import load_hf_model
from tests.zoo_paligemma import PaliGemmaZoo


def refused(folder: Path, **options: Any) -> CkptError:
    with pytest.raises(CkptError) as caught:
        load_hf_model(folder, "cpu", **options)
    return caught.value


def from_pretrained(folder: Path) -> Any:
    """transformers' loader, whose warnings and report go to a log."""
    from transformers import PaliGemmaForConditionalGeneration

    return PaliGemmaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)


def loads(folder: Path, zoo: PaliGemmaZoo) -> None:
    state = load_hf_model(folder, "cpu")[0].state_dict()
    for name, tensor in zoo.memory.items():
        assert torch.equal(state[name], tensor), name
