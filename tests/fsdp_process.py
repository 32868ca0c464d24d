"""One of several processes that train a Flamingo together: what the tests of FSDP2 start.

    python -m tests.fsdp_process RANK SIZE FOLDER

meets the others over the loopback interface by a file in FOLDER, and leaves what it found out in
`FOLDER/RANK.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from flamingo_ckpt.models.torchvision_compat import import_torchvision

    import_torchvision()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = Path(folder)
    store = dist.FileStore(str(place / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        found = {name: run(rank, size, place) for name, run in SCENARIOS.items()}
    finally:
        dist.destroy_process_group()
    (place / f"{rank}.json").write_text(json.dumps(found))


def _train(rank: int, size: int, place: Path) -> dict[str, Any]:
    """Train, save in every form, take the run up, and go on both ways."""
    import torch

    from flamingo_ckpt import load_training_state, save_checkpoint
    from flamingo_ckpt.errors import CkptError
    from flamingo_ckpt.models import shard_model
    from flamingo_ckpt.training import train_step
    from tests import training_support as support

    def step(model: Any, run: tuple[Any, Any], seed: int, **options: Any) -> Any:
        batches = support.sources(seed, rank, size)
        result = train_step(model, run[0], batches, lr_scheduler=run[1], **options)
        return {"losses": dict(result.losses), "norm": result.grad_norm}

    model = shard_model(support.flamingo())
    run = support.optimizer(model)
    found: dict[str, Any] = {"steps": [step(model, run, 0) for _ in range(3)]}
    language = model.lang_encoder
    found["aliases"] = all(
        wrapped.decoder_layer is language.old_decoder_blocks[i]
        and wrapped.gated_cross_attn_layer is language.gated_cross_attn_layers[i]
        for i, wrapped in enumerate(language.model.layers)
    )
    found["local"] = sum(p.to_local().numel() for p in model.parameters())
    found["total"] = sum(p.numel() for p in model.parameters())
    report = save_checkpoint(model, place / "trained.safetensors")
    found["files"] = report.files
    save_checkpoint(model, place / "whole.pt", trainable_only=False)
    save_checkpoint(model, place / "run.pt", optimizer=run[0], lr_scheduler=run[1], epoch=4)
    try:
        save_checkpoint(model, place / "run.pt", optimizer=run[0])
    except CkptError as error:
        found["refused"] = [error.code, error.message]

    again = shard_model(support.flamingo())
    with torch.no_grad():
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    fresh = support.optimizer(again)
    state = load_training_state(place / "run.pt", again, *fresh)
    found["epoch"] = state.epoch
    found["on"] = [step(model, run, seed) for seed in (1, 2)]
    found["resumed"] = [step(again, fresh, seed) for seed in (1, 2)]

    model.eval()
    batch = support.captions(5)
    with torch.no_grad():
        found["tokens"] = model.generate(
            batch["vision_x"], batch["lang_x"], max_new_tokens=4 + rank, pad_token_id=1
        ).tolist()
    model.train()
    found["after"] = step(model, run, 3)
    found["bf16"] = step(again, fresh, 3, autocast_dtype=torch.bfloat16)
    return found


def _families(rank: int, size: int, place: Path) -> dict[str, Any]:
    """Heads that are tied, that a model multiplies with by itself, and that are apart."""
    from flamingo_ckpt import save_checkpoint
    from flamingo_ckpt.models import shard_model
    from flamingo_ckpt.training import train_step
    from tests import training_support as support

    found = {}
    for family in ("opt", "mpt1b", "gpt_neox"):
        model = shard_model(support.flamingo(family, checkpointing=family == "opt"))
        run = support.optimizer(model)
        result = train_step(model, run[0], support.sources(0, rank, size))
        report = save_checkpoint(model, place / f"{family}.pt")
        found[family] = {"losses": dict(result.losses), "norm": result.grad_norm}
        found[family]["num_names"] = report.num_names
    return found


def _meta(rank: int, size: int, place: Path) -> dict[str, Any]:
    """A model that never was whole on any process, filled from a checkpoint."""
    import torch

    from flamingo_ckpt.loading import LoadOptions, load_into, save_checkpoint
    from flamingo_ckpt.models import shard_model
    from tests import training_support as support

    if rank == 0:
        torch.save(support.flamingo().state_dict(), place / "full.pt")
    torch.distributed.barrier()
    model = shard_model(support.flamingo(device="meta"))
    report = load_into(model, place / "full.pt", LoadOptions())
    save_checkpoint(model, place / "from_meta.pt", trainable_only=False)
    with torch.no_grad():
        logits = model(**{k: v for k, v in support.captions().items() if k != "labels"}).logits
    return {"loaded": report.num_loaded, "logits": logits.tolist()}


def _any_module(rank: int, size: int, place: Path) -> dict[str, Any]:
    """A module of which each process has a part, filled in place and from meta; it computes."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from flamingo_ckpt.loading import load_into

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 5)  # rows that two cannot share evenly
            self.second = nn.Linear(5, 3)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) * self.gate

    path = place / "net.pt"
    if rank == 0:
        torch.save({name: torch.randn(p.shape) for name, p in Net().state_dict().items()}, path)
    torch.distributed.barrier()
    want = torch.load(path)
    plain = Net()
    plain.load_state_dict(want)
    x = torch.arange(8.0).view(2, 4)
    mesh = init_device_mesh("cpu", (size,))
    found: dict[str, Any] = {}
    for how in ("cpu", "meta"):
        with torch.device(how):
            model = Net()
        for part in (model.first, model.second, model):
            fully_shard(part, mesh=mesh)
        before = {name: id(p) for name, p in model.named_parameters()}
        load_into(model, path)
        kept = before == {name: id(p) for name, p in model.named_parameters()}
        full = {name: p.full_tensor() for name, p in model.named_parameters()}
        got = model(x)
        found[how] = {
            "kept": kept,
            "names": sorted(full),
            "wrong": [name for name, one in full.items() if not torch.equal(one, want[name])],
            "computes": torch.equal(got, plain(x)),
        }
        got.sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found


def _failures(rank: int, size: int, place: Path) -> dict[str, Any]:
    """What goes wrong with the writer while the others help it to gather."""
    import flamingo_ckpt.convert
    from flamingo_ckpt import save_checkpoint
    from flamingo_ckpt.models import shard_model
    from tests import training_support as support

    model = shard_model(support.flamingo())
    write_all = flamingo_ckpt.convert.write_all
    found = {}
    for name, failure in (("full", OSError(28, "No space left")), ("bug", RuntimeError("oops"))):
        calls: list[int] = []

        def fail(fd: int, block: memoryview, at: int, calls: Any = calls, error: Any = failure):
            calls.append(at)
            if len(calls) > 5:
                raise error
            write_all(fd, block, at)

        flamingo_ckpt.convert.write_all = fail
        try:
            save_checkpoint(model, place / "never.pt")
        except Exception as error:
            found[name] = [type(error).__name__, getattr(error, "code", None), str(error)]
        finally:
            flamingo_ckpt.convert.write_all = write_all
    save_checkpoint(model, place / "after.pt")
    return found


SCENARIOS = {
    "train": _train,
    "families": _families,
    "meta": _meta,
    "any_module": _any_module,
    "failures": _failures,
}

if __name__ == "__main__":
    main()
