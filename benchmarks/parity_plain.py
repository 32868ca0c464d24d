"""What `parity` is compared with: load both models, and run each as often, with nothing else.

    python benchmarks/parity_plain.py REPORT.json

REPORT.json is a report of `flamingo-ckpt parity`; it says what was loaded and how often it was run.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.loading import LoadOptions, load_into
from flamingo_ckpt.models import build, load_config
from flamingo_ckpt.parity.inputs import generate


def main(path: str) -> None:
    with open(path) as file:
        report = json.load(file)
    first = report["summary"]["passes"][0]
    num_tokens = len((report["greedy"] or {}).get("a", ()))
    configs = [load_config(os.path.abspath(side["config"])) for side in report["sides"]]
    inputs = generate("flamingo", *configs, report["data"]["seed"])
    tensors = {
        name: tensor.to(first["device"], torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in inputs.tensors.items()
    }
    for side, config in zip(report["sides"], configs, strict=True):
        is_hf = "ForConditionalGeneration" in side["computed_by"]
        layout = "hf-flamingo" if is_hf else "openflamingo"
        model = build(config, layout, device="meta", dtype="float32").eval()
        load_into(model, open_checkpoint(side["uri"]), LoadOptions(device=first["device"]))
        model.media_token_id = inputs.media_token_id
        with torch.no_grad():
            for _ in range(side["num_forwards"]):
                run(model, tensors)
            write(model, {name: one[:1] for name, one in tensors.items()}, num_tokens)
        del model


def run(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(tensors["vision_x"], tensors["lang_x"], tensors["attention_mask"]).logits


def write(model: torch.nn.Module, row: dict[str, torch.Tensor], count: int) -> None:
    """The same plain loop: every token by a forward of the whole text."""
    for _ in range(count):
        token = run(model, row)[:, -1:].argmax(-1)
        row = {**row, "lang_x": torch.cat((row["lang_x"], token), 1)}
        row["attention_mask"] = torch.ones_like(row["lang_x"])


if __name__ == "__main__":
    main(sys.argv[1])
