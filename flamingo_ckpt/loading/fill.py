"""Bytes of a checkpoint into the tensors of a module: a few threads, bounded blocks, checksums.

A tensor of the module that is contiguous on the CPU and has the file's dtype gets the bytes
themselves, one that has another dtype gets them through `copy_`, block by block. What lies
elsewhere is put together on the CPU first, one tensor at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading.mapped import MappedFiles
from flamingo_ckpt.loading.match import Load
from flamingo_ckpt.loading.memory_source import bytes_of
from flamingo_ckpt.loading.options import LoadOptions
from flamingo_ckpt.loading.resize import Resized, resize_table
from flamingo_ckpt.loading.targets import Target, is_distributed
from flamingo_ckpt.stream import (
    Derived,
    check_storages,
    derive,
    run_tasks,
    unchecked_storages,
)
from flamingo_ckpt.tensors import TORCH_DTYPES, DType

if TYPE_CHECKING:
    import torch

    from flamingo_ckpt.plan import Step


@dataclass(slots=True)
class Filled:
    """What filling gave.

    Attributes:
        new: id of a tensor of the module -> the tensor that takes its place.
        num_mapped: tensors whose bytes stay in the file.
    """

    new: dict[int, torch.Tensor] = field(default_factory=dict)
    num_mapped: int = 0

    def put(self, target: Target, new: torch.Tensor, *, is_mapped: bool = False) -> None:
        """One new tensor for every object that was the old one."""
        self.num_mapped += is_mapped
        one = _like(new, target)
        self.new |= {id(old): one for old in target.tensors}


def becomes_new(target: Target, options: LoadOptions) -> bool:
    """Whether a tensor of the module is replaced rather than filled."""
    return target.is_meta if options.assign is None else options.assign or target.is_meta


def dtype_of_new(load: Load, options: LoadOptions) -> DType:
    """The dtype of a tensor that takes the place of one of the module's."""
    import torch

    wanted = options.dtype
    own = load.target.dtype
    if wanted is None or not own.is_real_float:
        return own
    if wanted == "keep":
        return load.step.dtype
    name = str(wanted).removeprefix("torch.")
    if name not in TORCH_DTYPES or not getattr(torch, name).is_floating_point:
        raise CkptError(
            f"`{wanted}` is no floating-point dtype",
            code="FC305",
            hint="dtype= takes one of torch's, its name, or `keep`",
        )
    return TORCH_DTYPES[name]


def fill(
    loads: Sequence[Load],
    resized: Mapping[str, Resized],
    zeros: Sequence[Target],
    options: LoadOptions,
) -> Filled:
    """Read every load into its tensor, or into a new one that is not in the module yet.

    Raises:
        CkptError: FC105 where a checksum does not fit, FC102 where the file is too short. New
            tensors are then thrown away; tensors that were filled in place stay filled.
    """
    import torch

    filled, reader = Filled(), Reader()
    check_storages(unchecked_storages([load.step for load in loads]), lambda _: None)

    def work(load: Load, buffer: bytearray, _stop: threading.Event) -> None:
        target = load.target
        change = resized.get(target.key)
        if not becomes_new(target, options):
            reader.fill(target.tensor.detach(), load, change, buffer)
            return
        dtype = _torch_dtype(dtype_of_new(load, options))
        device = torch.device(options.device or "cpu")
        new, is_mapped = None, False
        if is_distributed(target.tensor):
            with reader.lock:
                new = _distributed(target.tensor, reader.whole(load.step, change, buffer), dtype)
        elif change is None and device.type == "cpu" and dtype is _torch_dtype(load.step.dtype):
            new = reader.mapped(load.step, target.shape)
            is_mapped = new is not None
        if new is None:
            new = torch.empty(target.shape, dtype=dtype, device=device)
            reader.fill(new, load, change, buffer)
        with reader.lock:
            filled.put(target, new, is_mapped=is_mapped)

    run_tasks(sorted(loads, key=lambda load: -load.step.num_bytes), work)
    for target in zeros:
        if becomes_new(target, options):
            new = torch.zeros(target.shape, dtype=target.tensor.dtype, device=options.device)
            if is_distributed(target.tensor):
                new = _distributed(target.tensor, new, new.dtype)
            filled.put(target, new)
        else:
            target.tensor.detach().zero_()
    return filled


class Reader:
    """Gives the file's tensors; what has to be put together in memory, one at a time."""

    def __init__(self) -> None:
        self._maps = MappedFiles()
        self.lock = threading.Lock()

    def mapped(self, step: Step, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The tensor over the file's own bytes; None where it is not there as it lies."""
        return self._maps.tensor(step, shape, _torch_dtype(step.dtype))

    def release(self, step: Step) -> None:
        """Give back the memory that a mapped tensor took; touching it again reads it again."""
        self._maps.release(step)

    def fill(
        self, dest: torch.Tensor, load: Load, change: Resized | None, buffer: bytearray
    ) -> None:
        """Fill a tensor that is there."""
        import torch

        with torch.inference_mode(dest.is_inference()):
            if change is None and _is_plain(dest):
                # not by view(): a single element keeps any stride
                _stream(dest.as_strided((dest.numel(),), (1,)), load.step, buffer)
                return
            with self.lock:
                whole = self.whole(load.step, change, buffer)
                if is_distributed(dest):
                    local: Any = _distributed(dest, whole, dest.dtype)
                    parts: Any = dest
                    parts.to_local().copy_(local.to_local())
                else:
                    dest.copy_(whole.view(dest.shape))

    def whole(self, step: Step, change: Resized | None, buffer: bytearray) -> torch.Tensor:
        """A tensor of the file on the CPU, in the file's dtype: mapped, or put together."""
        import torch

        tensor = self.mapped(step, step.shape)
        if tensor is None:
            tensor = torch.empty(step.shape, dtype=_torch_dtype(step.dtype))
            _stream(tensor.view(-1), step, buffer)
        return tensor if change is None else resize_table(tensor, change)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie in this process's memory, one after the other."""
    if is_distributed(tensor) or tensor.device.type != "cpu":
        return False
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _stream(flat: torch.Tensor, step: Step, buffer: bytearray) -> None:
    """Bytes into a flat tensor on the CPU, cast by torch where the dtype is another."""
    import torch

    src = _torch_dtype(step.dtype)
    if src is flat.dtype:
        flat, src = flat.view(torch.uint8), torch.uint8
        if step.is_copy:
            flat[:0].zero_()  # autograd counts changes, and does not see the ones below
            for _ in derive(step, buffer, Derived(), into=bytes_of(flat)):
                pass
            return
    at = 0
    for block in derive(step, buffer, Derived()):
        # torch warns of bytes that cannot be written to
        values = torch.frombuffer(bytearray(block) if block.readonly else block, dtype=src)
        flat[at : at + len(values)].copy_(values)
        at += len(values)


def _distributed(like: Any, full: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The part of a whole tensor that is this process's; none waits for another."""
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    full = full.view(like.shape).to(device=mesh.device_type, dtype=dtype)
    return distribute_tensor(full, mesh, like.placements, src_data_rank=None)


def _like(new: torch.Tensor, target: Target) -> torch.Tensor:
    """The new tensor as the parameter or buffer that it replaces."""
    import torch

    old = target.tensor
    if not target.is_parameter:
        return new
    parameter = torch.nn.Parameter(new, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter


def _torch_dtype(dtype: DType) -> torch.dtype:
    import torch

    assert dtype.torch is not None
    found: torch.dtype = getattr(torch, dtype.torch)
    return found
