"""What tests of the hub share: a server for the whole process, a cache of its own, hollow files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

from flamingo_ckpt.formats.layout import FileLayout, OutTensor
from flamingo_ckpt.formats.torch_writer import layout_torch
from flamingo_ckpt.tensors import DTYPES
from tests.hub_server import Hollow

Shapes = Mapping[str, tuple[int, ...]]

#: 334 tensors of 4.2 GB, as many and as much as OpenFlamingo-3B's checkpoint has.
LARGE: Shapes = {
    f"lang_encoder.gated_cross_attn_layers.{at}.attn.to_q_{at % 7}.weight": (1024, 3072)
    for at in range(334)
}


def hollow_safetensors(shapes: Shapes, dtype: str = "F32") -> Hollow:
    """A safetensors file of zeros, by hand: it is held against the package's reader."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPES[dtype].bits // 8
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    head = struct.pack("<Q", len(header)) + header
    return Hollow(len(head) + at, head)


def hollow_torch(shapes: Shapes) -> Hollow:
    """A torch zip without what lies between its pickle and its directory.

    The local headers of the storages are zeros too: whoever reads one of them notices.
    """
    tensors = [
        OutTensor(name=name, dtype=DTYPES["F32"], shape=shape, num_bytes=4 * math.prod(shape))
        for name, shape in shapes.items()
    ]
    layout = layout_torch("checkpoint.pt", tensors)
    first = min(layout.offsets.values())
    last = max(layout.offsets[one.name] + one.num_bytes for one in tensors)
    return _hollow(layout, dict.fromkeys(shapes, 1), first, last)


def _hollow(layout: FileLayout, checksums: Mapping[str, int], first: int, last: int) -> Hollow:
    head, tail = bytearray(first), bytearray(layout.num_bytes - last)
    for offset, piece in layout.finish(checksums):
        if offset + len(piece) <= first:
            head[offset : offset + len(piece)] = piece
        elif offset >= last:
            tail[offset - last : offset - last + len(piece)] = piece
    return Hollow(layout.num_bytes, bytes(head), bytes(tail))
