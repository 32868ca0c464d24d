"""Pairs of equal models, upstream's and ours, and batches for both."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from flamingo_ckpt.models import build
from flamingo_ckpt.models.config import parse_config
from flamingo_ckpt.models.modules.flamingo import Flamingo
from tests import zoo
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN

#: The six layers of upstream's perceiver are one six times, and half of the time of a forward.
SHALLOW: dict[str, Any] = {"perceiver_depth": 2}


def ours(family: str, *, kernel: str = "eager", dtype: str = "float64", **options: Any) -> Flamingo:
    """The zoo's model, built from its config alone, with its weights."""
    return copy.deepcopy(_ours(family, kernel, dtype, **{**SHALLOW, **options}))


@functools.cache
def _ours(family: str, kernel: str, dtype: str, **options: Any) -> Flamingo:
    made = zoo.openflamingo(family, **options)
    config = parse_config(
        made.config | {"media_token_id": MEDIA_TOKEN, "eoc_token_id": EOC_TOKEN}, "config.json"
    )
    model = build(config, "openflamingo", dtype=dtype, attn_implementation=kernel)
    assert isinstance(model, Flamingo)
    model.load_state_dict(made.full)
    return model.eval()


def theirs(family: str, *, dtype: str = "float64", **options: Any) -> Any:
    """Upstream's model on its eager path."""
    return _theirs(family, dtype, **{**SHALLOW, **options})


@functools.cache
def _theirs(family: str, dtype: str, **options: Any) -> Any:
    model = copy.deepcopy(zoo.openflamingo(family, **options).model).eval()
    model.lang_encoder.config._attn_implementation = "eager"
    return model.to(getattr(torch, dtype))


def batch(family: str, *, padded: str = "", dtype: str = "float64") -> dict[str, Any]:
    """Two rows: images before, between and after the text; one row with text before the first.

    Args:
        family: of the language model.
        padded: `left` or `right`, for three tokens of padding in the first row.
        dtype: of the pictures.
    """
    inputs = dict(zoo.openflamingo(family).inputs())
    tokens = inputs["lang_x"].clone()
    tokens[tokens == MEDIA_TOKEN] = 5
    tokens[0, [3, 6]] = MEDIA_TOKEN
    tokens[1, [3, 11]] = MEDIA_TOKEN
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, slice(-3, None) if padded == "right" else slice(None, 3)] = 0
    pictures = inputs["vision_x"].to(getattr(torch, dtype))
    return {"vision_x": pictures, "lang_x": tokens, "attention_mask": mask}


def tiny(family: str, **text: Any) -> dict[str, Any]:
    """A small Flamingo's config; `text` goes into that of the language model."""
    config = zoo.openflamingo(family).config
    return config | {"text_config": config["text_config"] | text}
