"""Hugging Face folders that the command line made, and batches for the models in them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import zoo
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN

TOKENS: dict[str, Any] = {"media_token_id": MEDIA_TOKEN, "eoc_token_id": EOC_TOKEN}
#: Everything in float64 that can be: CLIP's eager attention takes its softmax in float32.
EXACT: dict[str, Any] = {
    "dtype": torch.float64,
    "attn_implementation": {"": "eager", "vision_config": "sdpa", "text_config": "eager"},
}
#: The six layers of upstream's perceiver are one six times, and half of the time of a forward.
SHALLOW: dict[str, Any] = {"perceiver_depth": 2}
each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers in the output of tests: a fixture, once it is made one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def load(folder: Path, **options: Any) -> Any:
    """A model of a folder that knows its tokens."""
    from flamingo_ckpt.models import FlamingoForConditionalGeneration

    return FlamingoForConditionalGeneration.from_pretrained(folder, **{**TOKENS, **options})


def batch(family: str, *, padded: str | None = None, dtype: Any = torch.float64) -> dict[str, Any]:
    """Two rows of text with two images each: before, between and after the words.

    Args:
        family: of the language model.
        padded: `right` or `left`: the first row is three tokens shorter.
        dtype: of the pictures.
    """
    inputs = dict(zoo.openflamingo(family).inputs())
    tokens = inputs["lang_x"].clone()
    tokens[(tokens == MEDIA_TOKEN) | (tokens == EOC_TOKEN)] = 5
    tokens[0, [3, 7]] = MEDIA_TOKEN
    tokens[1, [2, 11]] = MEDIA_TOKEN
    mask = torch.ones_like(tokens)
    if padded == "right":
        mask[0, -3:] = 0
    elif padded == "left":
        mask[0, :3] = 0
    return {
        "vision_x": inputs["vision_x"].to(dtype),
        "lang_x": tokens,
        "attention_mask": mask,
    }


@contextlib.contextmanager
def transformers_log() -> Iterator[list[str]]:
    """What transformers says meanwhile, from warnings on."""
    import logging

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


def changed(folder: Path, into: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a folder with other tensors; None removes one."""
    shutil.copytree(folder, into)
    tensors: dict[str, Any] = {**load_file(into / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, into / "model.safetensors", metadata={"format": "pt"})
    return into
