"""Write a Flamingo of real size with random weights, and its config: OpenFlamingo's whole names.

    python benchmarks/make_flamingo.py FOLDER --layers 24 --dtype bfloat16

`FOLDER/checkpoint.safetensors` and `FOLDER/config.json`. 24 layers of MPT-1B's sizes with the tower
of OpenFlamingo-3B are that release's size; fewer layers make it smaller.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct

import torch

from flamingo_ckpt.models import load_config
from flamingo_ckpt.models.config import parse_config
from flamingo_ckpt.models.expectation import expect

_PRESET = "openflamingo-3b-vitl-mpt1b"
_BLOCK = 1 << 24
_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def config_of(layers: int) -> dict[str, object]:
    """OpenFlamingo-3B's config with another number of language layers."""
    data = dict(load_config(_PRESET).data)
    text = {**data["text_config"], "n_layers": layers}
    return {**data, "text_config": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", choices=sorted(_NAMES), default="float32")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    data = config_of(options.layers)
    with open(os.path.join(options.folder, "config.json"), "w") as file:
        json.dump(data, file, indent=1)
    expectation = expect(parse_config(data, "config.json"), "openflamingo")
    tensors = [one for one in expectation.canonical() if one.kind == "parameter"]
    path = os.path.join(options.folder, "checkpoint.safetensors")
    num_bytes = write(path, {one.name: one.shape for one in tensors}, options.dtype)
    print(f"{path}: {len(tensors)} tensors, {num_bytes / 2**30:.2f} GiB")


def write(path: str, shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Write random tensors one after the other: memory does not grow with the file."""
    kind = getattr(torch, dtype)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, shape in shapes.items():
            for count in _blocks(math.prod(shape)):
                values = _values(name, shape, count, generator).to(kind)
                file.write(values.view(torch.uint8).numpy().data)
    return end


def _blocks(count: int) -> list[int]:
    return [min(_BLOCK, count - at) for at in range(0, count, _BLOCK)]


def _values(
    name: str, shape: tuple[int, ...], count: int, generator: torch.Generator
) -> torch.Tensor:
    """Norms around 1, gates open, matrices scaled by what they sum over."""
    values = torch.randn(count, generator=generator)
    if name.endswith("_gate"):
        return values * 0.1 + 0.5
    if len(shape) < 2:
        is_scale = name.endswith("weight")
        return values * 0.1 + (1.0 if is_scale else 0.0)
    return values / math.sqrt(math.prod(shape[1:]))


if __name__ == "__main__":
    main()
