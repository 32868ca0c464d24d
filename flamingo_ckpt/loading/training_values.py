"""The state of an optimizer and of a scheduler as plain values, with the tensors set apart."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.formats.torch_writer import TensorRef
from flamingo_ckpt.loading.trained import parameter_names

if TYPE_CHECKING:
    import torch
    from torch import nn

#: The keys of OpenFlamingo's training checkpoints.
EPOCH_KEY = "epoch"
MODEL_KEY = "model_state_dict"
OPTIMIZER_KEY = "optimizer_state_dict"
SCHEDULER_KEY = "lr_scheduler_state_dict"
#: Ours beside them: the name of every parameter of each group, in order, or None.
NAMES_KEY = "optimizer_parameter_names"


def training_values(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: Any,
    epoch: int | None,
) -> tuple[dict[str, Any], list[tuple[str, torch.Tensor]]]:
    """What a training checkpoint holds besides the weights, and the tensors in it by name.

    `MODEL_KEY` stands where upstream has it, with nothing in it yet.
    """
    tensors: list[tuple[str, torch.Tensor]] = []
    values: dict[str, Any] = {}
    if epoch is not None:
        values[EPOCH_KEY] = epoch
    values[MODEL_KEY] = {}
    if optimizer is not None:
        values[OPTIMIZER_KEY] = _set_apart(optimizer.state_dict(), OPTIMIZER_KEY, tensors)
    if lr_scheduler is not None:
        values[SCHEDULER_KEY] = _set_apart(lr_scheduler.state_dict(), SCHEDULER_KEY, tensors)
    if optimizer is not None:
        values[NAMES_KEY] = group_names(model, optimizer)
    return values, tensors


def group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str | None]]:
    """The name of every parameter of each group; None for one that the model does not have."""
    names = parameter_names(model)
    return [[names.get(id(one)) for one in group["params"]] for group in optimizer.param_groups]


def referred(value: object) -> Iterator[str]:
    """The name of every tensor that stands among plain values."""
    if isinstance(value, TensorRef):
        yield value.name
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from referred(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from referred(part)


def _set_apart(value: Any, path: str, tensors: list[tuple[str, torch.Tensor]]) -> Any:
    """The same value with a reference for each tensor; what is neither is left to the writer."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors.append((path, value))
        return TensorRef(path)
    if isinstance(value, float):
        return float(value)  # numpy's float64 is one, and a schedule may have computed with it
    if type(value) in (dict, OrderedDict, Counter):
        parts = {key: _set_apart(part, f"{path}.{key}", tensors) for key, part in value.items()}
        return parts if type(value) is dict else type(value)(parts)
    if type(value) in (list, tuple):
        parts_of = (_set_apart(part, f"{path}.{i}", tensors) for i, part in enumerate(value))
        return list(parts_of) if type(value) is list else tuple(parts_of)
    return value
