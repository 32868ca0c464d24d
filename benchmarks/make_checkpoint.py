"""Write a training checkpoint of the shape and size of OpenFlamingo-3B's, with random weights.

    python benchmarks/make_checkpoint.py ck.pt                  # 334 tensors, 3.9 GiB, fp32
    python benchmarks/make_checkpoint.py small.pt --scale 0.0625
    python benchmarks/make_checkpoint.py large.pt --gib 8

The file is what a training loop leaves: `torch.save({"epoch": ..., "model_state_dict": ...})`, the
names prefixed `module.`.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import OrderedDict
from collections.abc import Iterator

import torch

LANGUAGE_WIDTH, VISION_WIDTH, ATTENTION_WIDTH = 2048, 1024, 512
VOCABULARY, PERCEIVER_DEPTH, LATENTS, BLOCKS = 50280, 6, 64, 24
# Values are drawn once and reused: a billion normals would take longer than all that is measured.
_POOL_ELEMENTS = 1 << 23

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(scale: float = 1.0, blocks: int = BLOCKS) -> Shapes:
    """(name, shape) of every tensor: the perceiver, the embedding, the gated cross-attention."""
    d, v, inner = (_scaled(n, scale) for n in (LANGUAGE_WIDTH, VISION_WIDTH, ATTENTION_WIDTH))
    yield from _perceiver(v, inner)
    yield "lang_encoder.transformer.wte.weight", (_scaled(VOCABULARY, scale), d)
    for number in range(blocks):
        prefix = f"lang_encoder.transformer.blocks.{number}.gated_cross_attn_layer."
        for name, shape in _cross_attention(d, v, inner):
            yield prefix + name, shape


def _perceiver(v: int, inner: int) -> Shapes:
    yield "perceiver.latents", (LATENTS, v)
    for depth in range(PERCEIVER_DEPTH):
        prefix = f"perceiver.layers.{depth}."
        for norm in ("norm_media", "norm_latents"):
            yield f"{prefix}0.{norm}.weight", (v,)
            yield f"{prefix}0.{norm}.bias", (v,)
        yield f"{prefix}0.to_q.weight", (inner, v)
        yield f"{prefix}0.to_kv.weight", (2 * inner, v)
        yield f"{prefix}0.to_out.weight", (v, inner)
        yield f"{prefix}1.0.weight", (v,)
        yield f"{prefix}1.0.bias", (v,)
        yield f"{prefix}1.1.weight", (4 * v, v)
        yield f"{prefix}1.3.weight", (v, 4 * v)
    yield "perceiver.norm.weight", (v,)
    yield "perceiver.norm.bias", (v,)


def _cross_attention(d: int, v: int, inner: int) -> Shapes:
    yield "attn_gate", (1,)
    yield "ff_gate", (1,)
    yield "attn.norm.weight", (d,)
    yield "attn.norm.bias", (d,)
    yield "attn.to_q.weight", (inner, d)
    yield "attn.to_kv.weight", (2 * inner, v)
    yield "attn.to_out.weight", (d, inner)
    yield "ff.0.weight", (d,)
    yield "ff.0.bias", (d,)
    yield "ff.1.weight", (4 * d, d)
    yield "ff.3.weight", (d, 4 * d)


def _scaled(size: int, scale: float) -> int:
    return max(round(size * scale), 1)


def num_bytes(scale: float = 1.0, blocks: int = BLOCKS) -> int:
    """Of all tensors, as fp32."""
    return 4 * sum(math.prod(shape) for _, shape in shapes(scale, blocks))


def fit(gib: float) -> tuple[float, int]:
    """(scale, number of blocks) near a size: more blocks, or below 1 GiB narrower ones."""
    wanted = gib * 2**30
    if gib < 1:
        return math.sqrt(wanted / num_bytes()), BLOCKS
    base = num_bytes(blocks=0)
    return 1.0, max(round((wanted - base) / (num_bytes(blocks=1) - base)), 1)


def make_tensors(
    scale: float, blocks: int, *, transposed: bool = False, seed: int = 0
) -> OrderedDict[str, torch.Tensor]:
    """The state dict. `transposed` stores every matrix as the transposed view of its storage."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(_POOL_ELEMENTS).normal_(generator=generator)
    tensors: OrderedDict[str, torch.Tensor] = OrderedDict()
    for number, (name, shape) in enumerate(shapes(scale, blocks)):
        stored = shape[::-1] if transposed else shape
        flat = torch.empty(math.prod(shape))
        # A factor of its own gives every tensor bytes of its own, and every repeat of the pool.
        for turn, at in enumerate(range(0, flat.numel(), _POOL_ELEMENTS)):
            piece = flat[at : at + _POOL_ELEMENTS]
            torch.mul(pool[: piece.numel()], 0.02 + number * 1e-5 + turn * 1e-3, out=piece)
        tensor = flat.view(stored)
        tensors[f"module.{name}"] = tensor.t() if transposed and tensor.dim() == 2 else tensor
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every width")
    parser.add_argument("--gib", type=float, help="aim at a size instead, by repeating blocks")
    parser.add_argument("--transposed", action="store_true", help="save matrices as strided views")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scale, blocks = (args.scale, BLOCKS) if args.gib is None else fit(args.gib)
    tensors = make_tensors(scale, blocks, transposed=args.transposed, seed=args.seed)
    torch.save({"epoch": 0, "model_state_dict": tensors}, args.path)
    print(f"{args.path}: {len(tensors)} tensors, {os.path.getsize(args.path) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
