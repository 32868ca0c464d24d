"""A module of which two processes have a part each, filled without a word between them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.loading.engine_support import saved

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from flamingo_ckpt.loading import load_into

rank, store, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)  # rows that two cannot share evenly
        self.second = nn.Linear(5, 3)
        self.gate = nn.Parameter(torch.zeros(1))
    def forward(self, x):
        return self.second(self.first(x)) * self.gate

for how in ("place", "meta"):
    with torch.device("meta" if how == "meta" else "cpu"):
        model = Net()
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh)
    before = {name: id(p) for name, p in model.named_parameters()}
    load_into(model, path)
    if how == "place":
        assert before == {name: id(p) for name, p in model.named_parameters()}
    want = torch.load(path)
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor()
        assert torch.equal(full, want[name]), name
    x = torch.arange(8.0).view(2, 4)
    got = model(x)
    plain = Net()
    plain.load_state_dict(want)
    assert torch.equal(got, plain(x)), (got, plain(x))
    got.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
dist.destroy_process_group()
print("fine")
"""


def test_fsdp2(tmp_path: Path) -> None:
    state = {
        "first.weight": torch.randn(5, 4),
        "first.bias": torch.randn(5),
        "second.weight": torch.randn(3, 5),
        "second.bias": torch.randn(3),
        "gate": torch.randn(1),
    }
    path = saved(state, tmp_path)
    arguments = [str(tmp_path / "store"), str(path)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            told, error = worker.communicate(timeout=120)
            assert worker.returncode == 0, error
            assert told.strip() == "fine"
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
