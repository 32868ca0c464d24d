"""Carry real tensors through the layout tables, without files and without the package's writers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flamingo_ckpt.layouts.layout import Layout
from flamingo_ckpt.layouts.mapping import Assembled, Reading, assemble, read_atoms
from flamingo_ckpt.tensors import TORCH_DTYPES, TensorInfo

State = dict[str, Any]


def read(layout: Layout, state: State, dims: Mapping[str, int] | None = None) -> Reading:
    """What the layout's table makes of a state dict's keys and shapes."""
    infos = [
        TensorInfo(
            name=name,
            dtype=TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")],
            shape=tuple(tensor.shape),
        )
        for name, tensor in state.items()
    ]
    return read_atoms(infos, layout.table(), dims or {})


def carry(source: Layout, target: Layout, state: State, dims: Any = None) -> State:
    """A state dict under another layout's names; every key must be carried or dropped."""
    reading = read(source, state, dims)
    assert not reading.unknown
    assert not reading.bent
    made = assemble(reading.atoms, target.table(), dims or {})
    assert not made.unplaced
    assert not made.faults
    return {one.name: _tensor(one, state) for one in made.tensors}


def _tensor(made: Assembled, state: State) -> Any:
    import torch

    runs = []
    for piece in made.pieces:
        offset, sizes, strides = piece.view.flat()
        elements = torch.as_tensor(state[piece.source.name]).contiguous().flatten()
        runs.append(torch.as_strided(elements, sizes, strides, offset).flatten())
    return torch.cat(runs).reshape(made.shape)


def assert_same_bits(found: State, wanted: State) -> None:
    """The same names, dtypes, shapes and bytes."""
    import torch

    assert sorted(found) == sorted(wanted)
    for name, ours in found.items():
        theirs = torch.as_tensor(wanted[name])
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        left, right = (one.contiguous().reshape(-1).view(torch.uint8) for one in (ours, theirs))
        assert torch.equal(left, right), name
