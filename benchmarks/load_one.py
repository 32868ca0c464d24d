"""Load a checkpoint in one way, in this process, and say how long it took and in what memory.

    python benchmarks/load_one.py CASE SOURCE RESULT.json [--memory]

Imports and the model that is to be filled are made before the clock starts. `loaded` is the time
until the call returns; `touched` goes on until one byte of every page of the model has been read,
since a mapped file is read no sooner. With `--memory` a thread watches the resident set, and the
times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import make_checkpoint
import torch
from torch import nn

_PAGE = 4096
Loaded = nn.Module
#: Made before the clock starts; gives what is timed.
Setup = Callable[[str], Callable[[], Loaded]]


def module_of(shapes: Iterable[tuple[str, tuple[int, ...]]], device: str) -> nn.Module:
    """Modules in modules, such that the parameters have these names; its pages are touched."""
    root = nn.Module()
    for name, shape in shapes:
        *path, leaf = name.split(".")
        place = root
        for step in path:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        place.register_parameter(leaf, nn.Parameter(torch.zeros(shape, device=device).add_(1)))
    return root


def _blocks(path: str) -> int:
    """Of the source, as `make_checkpoint.py --gib` chose them."""
    stored = os.path.getsize(path)
    return make_checkpoint.fit(stored / 2**30)[1]


def _model(path: str, device: str) -> nn.Module:
    return module_of(make_checkpoint.shapes(blocks=_blocks(path)), device)


# --- one model from names and shapes --------------------------------------------------------------


def _torch_load(*, device: str, mmap: bool) -> Setup:
    def setup(path: str) -> Callable[[], Loaded]:
        model = _model(path, device)

        def load() -> Loaded:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            state = {
                name.removeprefix("module."): tensor
                for name, tensor in content["model_state_dict"].items()
            }
            model.load_state_dict(state, assign=device == "meta")
            return model

        return load

    return setup


def _load_file(*, device: str) -> Setup:
    def setup(path: str) -> Callable[[], Loaded]:
        from safetensors.torch import load_file

        model = _model(path, device)

        def load() -> Loaded:
            model.load_state_dict(load_file(path), assign=device == "meta")
            return model

        return load

    return setup


def _load_checkpoint(*, device: str) -> Setup:
    def setup(path: str) -> Callable[[], Loaded]:
        from flamingo_ckpt.loading import load_checkpoint

        model = _model(path, device)

        def load() -> Loaded:
            load_checkpoint(model, path)
            return model

        return load

    return setup


# --- PaliGemma ------------------------------------------------------------------------------------


def _load_hf_model(dtype: str | None = None) -> Setup:
    def setup(path: str) -> Callable[[], Loaded]:
        _import_paligemma()
        from flamingo_ckpt.loading import load_hf_model

        return lambda: load_hf_model(path, "cpu", dtype=dtype)[0]

    return setup


def _from_pretrained(dtype: str = "auto") -> Setup:
    def setup(path: str) -> Callable[[], Loaded]:
        _import_paligemma()
        from transformers import AutoTokenizer, PaliGemmaForConditionalGeneration

        def load() -> Loaded:
            model = PaliGemmaForConditionalGeneration.from_pretrained(path, dtype=dtype)
            AutoTokenizer.from_pretrained(path, padding_side="right")
            return model

        return load

    return setup


def _import_paligemma() -> None:
    """Everything that either way imports: seconds, and not of loading."""
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    from transformers import (  # noqa: F401
        AutoTokenizer,
        Gemma2ForCausalLM,
        GemmaForCausalLM,
        GenerationConfig,
        PaliGemmaForConditionalGeneration,
        PreTrainedTokenizerFast,
        SiglipVisionModel,
    )


CASES: dict[str, Setup] = {
    "pt-torch": _torch_load(device="cpu", mmap=False),
    "pt-torch-mmap": _torch_load(device="cpu", mmap=True),
    "pt-ours": _load_checkpoint(device="cpu"),
    "pt-meta-torch": _torch_load(device="meta", mmap=False),
    "pt-meta-torch-mmap": _torch_load(device="meta", mmap=True),
    "pt-meta-ours": _load_checkpoint(device="meta"),
    "st-file": _load_file(device="cpu"),
    "st-ours": _load_checkpoint(device="cpu"),
    "st-meta-file": _load_file(device="meta"),
    "st-meta-ours": _load_checkpoint(device="meta"),
    "hf-from-pretrained": _from_pretrained(),
    "hf-ours": _load_hf_model(),
    "hf-bf16-from-pretrained": _from_pretrained("bfloat16"),
    "hf-bf16-ours": _load_hf_model("bfloat16"),
}


# --- what is said of it ---------------------------------------------------------------------------


def touch(model: nn.Module) -> int:
    """Read one byte of every page."""
    total = 0
    for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values():
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        total += int(flat[::_PAGE].sum(dtype=torch.int64))
    return total


def resident() -> dict[str, int]:
    """Of this process in bytes: memory of its own, and pages of files that it has mapped."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = int(value) * 1024
    return {"own": found["Anonymous"], "file": found["Rss"] - found["Anonymous"]}


class Watch(threading.Thread):
    """The largest amount of memory of its own that the process has while this runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_own = 0
        self.peak_all = 0
        self._ended = threading.Event()

    def run(self) -> None:
        with open("/proc/self/status", "rb") as file:
            while not self._ended.wait(0.001):
                file.seek(0)
                rows = dict(line.split(b":", 1) for line in file.read().splitlines())
                own, mapped = (int(rows[key].split()[0]) * 1024 for key in (b"RssAnon", b"RssFile"))
                self.peak_own = max(self.peak_own, own)
                self.peak_all = max(self.peak_all, own + mapped)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def checksum(model: nn.Module) -> float:
    """To compare that two ways loaded the same."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}.values()
    return float(
        sum(t.detach().view(-1)[:: max(t.numel() // 64, 1)].double().sum() for t in tensors)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("source")
    parser.add_argument("result")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    load = CASES[args.case](args.source)
    before = resident()
    watch = Watch() if args.memory else None
    if watch is not None:
        watch.start()
    started = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - started
    if watch is not None:
        watch.stop()
    after = resident()
    again = time.perf_counter()
    touch(model)
    touched = loaded + time.perf_counter() - again
    result: dict[str, Any] = {"loaded": loaded, "touched": touched, "checksum": checksum(model)}
    if watch is not None:
        result["memory"] = {
            "before": before,
            "peak": {"own": watch.peak_own, "all": watch.peak_all},
            "after": after,
            "touched": resident(),
            "largest_tensor": max(
                t.numel() * t.element_size() for t in model.state_dict().values()
            ),
        }
    Path(args.result).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
