"""What a Flamingo is created from, as files: a tokenizer, a language model, a CLIP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.errors import CkptError
from tests import zoo
from tests.zoo_clip import open_clip_cfg
from tests.zoo_flamingo import VISION_LAYERS
from tests.zoo_lms import WORDS

#: Words of the tokenizer that texts here are made of; the rest are numbered.
NAMED = ("<unk>", "</s>", "An", "image", "of", "two", "cats", ".", "a", "bathroom", "sink")


def save_tokenizer(folder: Path, *, words: int = WORDS, pad: str | None = None) -> Path:
    """A tokenizer of whole words; `words` of them, a padding token included if there is one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*NAMED, *([pad] if pad else [])]
    names += [f"word{number}" for number in range(words - len(names))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token=pad
    )
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(family: str, folder: Path) -> Path:
    """A tokenizer that gives Flamingo's tokens the numbers that the zoo gives them."""
    return save_tokenizer(folder, pad="<pad>" if family == "opt" else None)


def save_language_model(family: str, folder: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """The zoo's language model before Flamingo's tokens."""
    made = zoo.openflamingo(family, layers=layers, seed=seed)
    return zoo.save_folder(dict(made.language), made.text_config, folder)


def save_open_clip(folder: Path, state: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """An open_clip folder of the zoo's CLIP, or of other weights of its sizes."""
    state = zoo.openflamingo("llama").clip if state is None else state
    zoo.save_safetensors(state, folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": open_clip_cfg(VISION_LAYERS) | changes,
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def save_parts(family: str, folder: Path, **options: Any) -> dict[str, str]:
    """All of them; the arguments of `create_model_and_transforms`."""
    return {
        "clip_vision_encoder_path": str(save_open_clip(folder / "clip")),
        "clip_vision_encoder_pretrained": "",
        "lang_encoder_path": str(save_language_model(family, folder / "lm", **options)),
        "tokenizer_path": str(tokenizer_of(family, folder / "tokenizer")),
    }


def named_clip(
    monkeypatch: pytest.MonkeyPatch, tags: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """A name (and one with `-quickgelu`) in open_clip's list for the zoo's CLIP, and its tags."""
    from open_clip import factory, pretrained

    name = "ViT-Tiny-8"
    configs = {
        name: open_clip_cfg(VISION_LAYERS, quick_gelu=False),
        f"{name}-quickgelu": open_clip_cfg(VISION_LAYERS),
    }
    for one, config in configs.items():
        monkeypatch.setitem(factory._MODEL_CONFIGS, one, config)
        monkeypatch.setitem(pretrained._PRETRAINED, one, dict(tags or {}))
    return name


def create(parts: Mapping[str, Any], **options: Any) -> Any:
    """The model alone."""
    from flamingo_ckpt.loading.flamingo import create_model_and_transforms

    return create_model_and_transforms(**{**parts, **options})[0]


def refused(code: str, call: Any, *arguments: Any, **options: Any) -> CkptError:
    """The error of a call, which has this code."""
    with pytest.raises(CkptError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code, caught.value
    return caught.value
