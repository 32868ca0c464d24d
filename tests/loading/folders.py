"""PaliGemma folders as they lie on a disk: config, tokenizer, weights in any form."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.zoo_paligemma import WORDS

State = dict[str, torch.Tensor]
#: Those of Gemma's tokenizer, and the picture's.
_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


@functools.cache
def _tokenizer_files() -> dict[str, bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: at for at, token in enumerate(_SPECIAL.values())}
    words |= {f"w{at}": at for at in range(len(words), WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **_SPECIAL)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<image>") == WORDS
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of `WORDS` words and `<image>`, whose own config says that it pads left."""
    for name, content in _tokenizer_files().items():
        (folder / name).write_bytes(content)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def write_weights(folder: Path, state: Mapping[str, torch.Tensor], *, shards: int = 1) -> None:
    """Safetensors, with an index where there are several."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    weight_map = {}
    for at in range(shards):
        file = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[at::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map, sum(t.numel() * t.element_size() for t in state.values()))


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_folder(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, shards: int = 1
) -> Path:
    """A whole release."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    write_tokenizer(folder)
    write_weights(folder, state, shards=shards)
    return folder
