"""Other ways to the same safetensors file, each run as a process of its own by `run.py`.

    python benchmarks/rivals.py load|mmap|checked SRC DST

`load` and `mmap` are what people write by hand. `checked` does what the safetensors project's own
conversion script does with one file, in the same order: load, drop names that share their memory,
make everything contiguous, save, load what was written, compare with `torch.equal`. All sync what
they wrote, as everything does that `run.py` times.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def load_weights(path: str, *, mmap: bool = False) -> Tensors:
    """The state dict of a training checkpoint under its plain names."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    weights = content.get("model_state_dict", content)
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def save(tensors: Tensors, path: str) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def convert(src: str, dst: str, *, mmap: bool) -> None:
    save(load_weights(src, mmap=mmap), dst)


def convert_checked(src: str, dst: str) -> None:
    weights = load_weights(src)
    sharing = defaultdict(list)
    for name, tensor in weights.items():
        sharing[tensor.data_ptr()].append(name)
    for _, *others in sharing.values():
        for name in others:
            del weights[name]
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save(weights, dst)
    written = load_file(dst)
    for name, tensor in weights.items():
        if not torch.equal(tensor, written[name]):
            raise SystemExit(f"{name} differs")


def main() -> None:
    how, src, dst = sys.argv[1:]
    if how == "checked":
        convert_checked(src, dst)
    else:
        convert(src, dst, mmap=how == "mmap")


if __name__ == "__main__":
    main()
