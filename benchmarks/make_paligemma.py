"""Write a PaliGemma folder as the hub has it, with random weights and fewer layers: 2.3 GiB, fp32.

    python benchmarks/make_paligemma.py FOLDER

Two shards of safetensors with an index, in the key layout of the hub, and a tokenizer of a few
words.
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from make_checkpoint import _POOL_ELEMENTS
from safetensors.torch import save_file

ROWS, WIDTH, LAYERS, VISION_LAYERS = 65536, 2048, 6, 8
CONFIG = {
    "model_type": "paligemma",
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "image_token_index": 4,
    "projection_dim": WIDTH,
    "hidden_size": WIDTH,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "text_config": {
        "model_type": "gemma",
        "hidden_size": WIDTH,
        "intermediate_size": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": ROWS,
        "num_image_tokens": 256,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": VISION_LAYERS,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": WIDTH,
        "vision_use_head": False,
    },
}
#: From the names in memory to those of the hub.
_RENAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """(name, shape) of every tensor, as the hub names them."""
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**CONFIG))
    found = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in _RENAMES.items():
            if name.startswith(ours):
                found[theirs + name.removeprefix(ours)] = tuple(parameter.shape)
    return found


def write_tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", *(f"w{at}" for at in range(500))]
    inner = Tokenizer(models.WordLevel({w: at for at, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(CONFIG, file, indent=1)
    pool = torch.empty(_POOL_ELEMENTS).normal_(generator=torch.Generator().manual_seed(0)) * 0.02
    every = shapes()
    write_tokenizer(folder)
    parts = [
        {name for name in every if name.startswith("language_model.") is is_language}
        for is_language in (False, True)
    ]
    weight_map, total = {}, 0
    for at, names in enumerate(parts):
        state = {}
        for number, name in enumerate(every):
            if name in names:
                shape = torch.Size(every[name])
                repeats = -(-shape.numel() // _POOL_ELEMENTS)
                state[name] = pool.repeat(repeats)[: shape.numel()].view(shape) * (1 + number / 1e3)
        file_name = f"model-{at + 1:05}-of-00002.safetensors"
        save_file(state, os.path.join(folder, file_name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, file_name)
        total += sum(tensor.numel() * 4 for tensor in state.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file)
    print(f"{folder}: {len(every)} tensors, {total / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
