"""Bytes of a file straight into the memory of a parameter: checked, and seen by autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.engine import load_into


def linear(seed: int, size: int = 300) -> nn.Linear:
    """Its weight has more bytes than one block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(size, size)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "linear.pt"
    torch.save(linear(1).state_dict(), path)
    return path


def test_the_same_objects_with_the_files_values(checkpoint: Path) -> None:
    module, wanted = linear(2), linear(1).state_dict()
    parameters = dict(module.named_parameters())
    pointers = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    load_into(module, checkpoint)
    for name, parameter in module.named_parameters():
        assert parameter is parameters[name]
        assert parameter.data_ptr() == pointers[name]
        assert torch.equal(parameter, wanted[name])


def test_a_flipped_bit(checkpoint: Path) -> None:
    raw = bytearray(checkpoint.read_bytes())
    last = linear(1).weight.detach().numpy().tobytes()[-64:]
    raw[raw.index(last)] ^= 1
    checkpoint.write_bytes(raw)
    with pytest.raises(CkptError) as caught:
        load_into(linear(2), checkpoint)
    assert caught.value.code == "FC105"


@pytest.mark.parametrize("ours", [True, False])
def test_autograd_notices(checkpoint: Path, ours: bool) -> None:
    """A graph that was recorded before a load must not be followed back through new weights."""
    module = linear(2)
    loss: Any = module.weight.square().sum()
    if ours:
        load_into(module, checkpoint)
    else:
        module.load_state_dict(torch.load(checkpoint, weights_only=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_part_of_a_storage(tmp_path: Path) -> None:
    """The checksum is of the whole storage, and the tensor is not."""
    pool = torch.arange(200.0)
    path = tmp_path / "views.pt"
    torch.save({"weight": pool[60:100].view(4, 10), "bias": pool[10:14]}, path)
    module = nn.Linear(10, 4)
    load_into(module, path)
    assert torch.equal(module.weight, pool[60:100].view(4, 10))
    assert torch.equal(module.bias, pool[10:14])
    raw = bytearray(path.read_bytes())
    at = raw.index(pool.numpy().tobytes())
    raw[at + 4 * 150] ^= 1  # outside of both
    path.write_bytes(raw)
    with pytest.raises(CkptError) as caught:
        load_into(nn.Linear(10, 4), path)
    assert caught.value.code == "FC105"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(7, 5).gt(0) if dtype is torch.bool else (torch.randn(7, 5) * 9).to(dtype)
    torch.save({"table": values}, tmp_path / "table.pt")
    module = nn.Module()
    module.register_buffer("table", torch.zeros(7, 5, dtype=dtype))
    load_into(module, tmp_path / "table.pt")
    assert torch.equal(module.get_buffer("table"), values)
