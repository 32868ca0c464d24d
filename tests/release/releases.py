"""A tiny HF Flamingo release, made without torch, and what plants faults into it.

Tensors are kept as a mapping of names to arrays and written by bytes that this module lays out
itself, so that a fault can be in any of them. Nothing in a clean release is 0, 1, or there twice.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

Arrays = dict[str, Any]

WORDS, EOC, IMAGE = 20, 20, 21
ROWS = 23
COMMITS: Final = ("1f" * 20, "2e" * 20)
CONFIG: Final[Mapping[str, Any]] = {
    "model_type": "flamingo",
    "architectures": ["FlamingoForConditionalGeneration"],
    "cross_attn_every_n_layers": 1,
    "perceiver_depth": 1,
    "perceiver_num_latents": 4,
    "perceiver_heads": 2,
    "perceiver_dim_head": 4,
    "perceiver_ff_mult": 2,
    "cross_attn_heads": 2,
    "cross_attn_dim_head": 4,
    "cross_attn_ff_mult": 2,
    "torch_dtype": "float32",
    "tie_word_embeddings": True,
    "media_token_id": IMAGE,
    "eoc_token_id": EOC,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "projection_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "model_type": "opt",
        "vocab_size": ROWS,
        "hidden_size": 12,
        "word_embed_proj_dim": 12,
        "ffn_dim": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
}
PREPROCESSOR: Final[Mapping[str, Any]] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
CARD: Final = f"""---
license: mit
library_name: flamingo-ckpt
base_model:
- facebook/opt-125m
- openai/clip-vit-base-patch32
---

# A tiny Flamingo

Made from `facebook/opt-125m@{COMMITS[0]}` and
`openai/clip-vit-base-patch32@{COMMITS[1]}`.
"""

_LAYER = "lang_encoder.model.decoder.layers.{}."
_GATED = _LAYER + "gated_cross_attn_layer."
_DECODER = _LAYER + "decoder_layer."
_VISION = "vision_encoder.vision_model."


@functools.cache
def _shapes() -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model; what they should be is tested elsewhere."""
    from flamingo_ckpt.models.config import parse_config
    from flamingo_ckpt.models.expectation import expect

    expectation = expect(parse_config(CONFIG, "config.json"))
    return {one.name: one.shape for one in expectation.tensors if one.alias_of is None}


def arrays() -> Arrays:
    """Every tensor of the model; like ones have like sizes, no two the same numbers."""
    rng = np.random.default_rng(0)
    found: Arrays = {}
    for name, shape in _shapes().items():
        values = rng.normal(0.0, 1.0, shape)
        if name.endswith("_gate"):
            values = np.full(shape, rng.uniform(0.3, 0.9))
        elif len(shape) == 1 and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.3 / math.sqrt(shape[-1])
        found[name] = values.astype(np.float32)
    return found


def safetensors_bytes(
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda _: None,
    tail: bytes = b"",
) -> bytes:
    """A safetensors file of float32 arrays.

    Args:
        tensors: name -> array.
        metadata: beside them.
        change: is given the header before it is written.
        tail: is put after the data.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at, parts = 0, []
    for name, array in tensors.items():
        data = array.tobytes()
        header[name] = {
            "dtype": {"<f4": "F32", "<f2": "F16", "<i8": "I64"}[array.dtype.str],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
        parts.append(data)
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts) + tail


SHARDS: Final = tuple(f"model-{at:05}-of-00002.safetensors" for at in (1, 2))
INDEX: Final = "model.safetensors.index.json"


def shard_of(name: str) -> str:
    """The shard that a tensor goes to: the language model's to the first."""
    return SHARDS[0] if name.startswith("lang_encoder.") else SHARDS[1]


def write_weights(folder: Path, tensors: Mapping[str, Any], **options: Any) -> None:
    """Two shards and their index."""
    shards: dict[str, Arrays] = {name: {} for name in SHARDS}
    for name, array in tensors.items():
        shards[shard_of(name)][name] = array
    for shard, held in shards.items():
        write(folder / shard, safetensors_bytes(held, **options))
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": {name: shard_of(name) for name in tensors},
    }
    write_json(folder / INDEX, index)


def write(path: Path, data: bytes | str) -> None:
    """Write a file that everybody may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(0o644)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file."""
    write(path, json.dumps(document, indent=2) + "\n")


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the document of a JSON file in place."""
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


def tokenizer() -> dict[str, Any]:
    """A fast tokenizer of whole words, with Flamingo's tokens."""
    added = [("<|endofchunk|>", EOC), ("<image>", IMAGE), ("<PAD>", ROWS - 1)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, "special": True} for token, number in added
        ],
        "model": {"type": "WordLevel", "vocab": {f"w{at}": at for at in range(WORDS)}},
    }


def sums_of(folder: Path) -> str:
    """What `sha256sum` gives of the folder's files; links out of it and signatures are left out."""
    found = [
        (path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file() and path.resolve().is_relative_to(folder.resolve())
    ]
    return "".join(
        f"{digest}  {name}\n"
        for name, digest in sorted(found)
        if name not in ("SHA256SUMS", "model.sig")
    )


def write_sums(folder: Path) -> None:
    """Write the manifest that the folder should have."""
    write(folder / "SHA256SUMS", sums_of(folder))


def make_release(folder: Path) -> Path:
    """A release without fault."""
    folder.mkdir(mode=0o755)
    write_weights(folder, arrays())
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer.json", tokenizer())
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    write(folder / "README.md", CARD)
    write(folder / "LICENSE", "MIT\n")
    write_sums(folder)
    return folder


def read_weights(folder: Path) -> tuple[Arrays, dict[str, str]]:
    """(tensors, metadata of the first shard) of what `write_weights` wrote."""
    found: Arrays = {}
    metadata: dict[str, str] = {}
    for shard in reversed(SHARDS):
        data = (folder / shard).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        metadata = header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            array = np.frombuffer(data[start + begin : start + end], np.float32)
            found[name] = array.reshape(entry["shape"]).copy()
    return found, metadata


def edit_weights(folder: Path, change: Callable[[Arrays], object], **metadata: str) -> None:
    """Change the tensors (and add to the metadata), and write them and their index again."""
    tensors, before = read_weights(folder)
    change(tensors)
    write_weights(folder, tensors, metadata=before | metadata)


def edit_text(path: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = path.read_bytes().decode()
    assert old in text
    write(path, text.replace(old, new))
