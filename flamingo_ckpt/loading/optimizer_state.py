"""The state of an optimizer from a file, compared with an optimizer at hand and made to fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.formats.extract import BLOCK_BYTES
from flamingo_ckpt.loading.memory_source import bytes_of, is_split
from flamingo_ckpt.loading.training_values import group_names
from flamingo_ckpt.plan import Step
from flamingo_ckpt.stream import Derived, derive
from flamingo_ckpt.tensors import TensorInfo, escape, format_shape

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Entries that have the shape of their parameter in torch's optimizers (and transformers').
_SHAPED = frozenset(
    """
    acc_delta ax exp_avg exp_avg_sq exp_inf grad_avg max_exp_avg_sq momentum_buffer prev
    square_avg step_size sum
    """.split()
)
# Adafactor has rows and columns in place of `exp_avg_sq`, and LBFGS one vector for everything.
_PARTED = frozenset({"exp_avg_sq_row", "exp_avg_sq_col", "d"})
#: Put into groups by schedulers and by torch itself, whatever the optimizer.
_GUESTS = frozenset(
    "params param_names initial_lr max_lr min_lr base_momentum max_momentum swa_lr".split()
)
#: What versions of torch have added to the groups of optimizers that were there before.
_ADDED = frozenset(
    "maximize foreach capturable differentiable fused decoupled_weight_decay".split()
)
_SAME_KIND = "make the optimizer of the same kind as that of the run that is taken up"


def fitted_groups(
    saved: Mapping[str, Any],
    names: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    uri: str,
) -> list[dict[str, Any]]:
    """The parameter groups of a file, for an optimizer with the same parameters in the same groups.

    Args:
        saved: what its `state_dict` gave.
        names: of the parameters of each group, where the file has them.
        model: whose parameters these are.
        optimizer: at hand.
        uri: the file, for messages.

    Raises:
        CkptError: FC463 where they differ.
    """
    groups = saved.get("param_groups")
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise _misfit("the file's `param_groups` are not what an optimizer writes", uri)
    sizes, own_sizes = ([len(group["params"]) for group in some] for some in (groups, own))
    if sizes != own_sizes:
        raise _misfit(
            f"the file has groups of {sizes} parameters, the optimizer of {own_sizes}", uri
        )
    if names is not None:
        _compare_names(names, group_names(model, optimizer), uri)
    for number, (group, mine) in enumerate(zip(groups, own, strict=True)):
        foreign = sorted(str(key) for key in group.keys() - mine.keys() - _GUESTS)
        lacking = sorted(str(key) for key in mine.keys() - group.keys() - _GUESTS - _ADDED)
        decoupled = [one.get("decoupled_weight_decay") for one in (group, mine)]
        if None not in decoupled and decoupled[0] != decoupled[1]:
            foreign.append("decoupled_weight_decay")
        kind = type(optimizer).__name__
        if foreign:
            what = f"group {number} in the file has `{escape(foreign[0])}`, which a {kind} has not"
            raise _misfit(what, uri, _SAME_KIND)
        if lacking:
            what = f"group {number} in the file has no `{lacking[0]}`, which a {kind} has"
            raise _misfit(what, uri, _SAME_KIND)
    # What later versions of torch added keeps the value that this optimizer has.
    return [{**mine, **group} for group, mine in zip(groups, own, strict=True)]


def fitted_state(
    saved: Mapping[str, Any],
    groups: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    uri: str,
) -> dict[int, Any]:
    """The state of each parameter, with tensors, split as the parameter is.

    Raises:
        CkptError: FC463 where a shape differs, FC105 where the file is damaged.
    """
    state = saved.get("state")
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    keys = [key for group in groups for key in group["params"]]
    if not isinstance(state, dict) or not all(isinstance(one, dict) for one in state.values()):
        raise _misfit("the file's `state` is not what an optimizer writes", uri)
    if len(set(keys)) != len(keys) or (strange := state.keys() - set(keys)):
        what = "names a parameter twice" if len(set(keys)) != len(keys) else f"knows no {strange}"
        raise _misfit(f"the file's `param_groups` {what}", uri)
    found: dict[int, Any] = {}
    for key, parameter in zip(keys, parameters, strict=True):
        if key in state:
            _check_kind(state[key], optimizer, f"state.{key}", uri)
            _check_shapes(state[key], parameter, f"state.{key}", uri)
            found[key] = _tensors(state[key], parameter, f"{uri}: state.{key}")
    return found


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        return False
    return all(type(key) in (int, str) for key in group["params"])


def _compare_names(names: Any, own: list[list[str | None]], uri: str) -> None:
    if not isinstance(names, list) or [len(one) for one in names] != [len(one) for one in own]:
        raise _misfit("the names of the parameters do not fit their groups", uri)
    for number, (theirs, mine) in enumerate(zip(names, own, strict=True)):
        for place, (there, here) in enumerate(zip(theirs, mine, strict=True)):
            if there != here:
                raise _misfit(
                    f"parameter {place} of group {number} is `{escape(str(there))}` in the file "
                    f"and `{here}` in the optimizer",
                    uri,
                    "give the optimizer the same parameters in the same order",
                )


def _check_kind(
    entry: Mapping[str, Any], optimizer: torch.optim.Optimizer, path: str, uri: str
) -> None:
    """Adamax is the one of torch's whose groups look like those of another (RAdam)."""
    from torch.optim import Adamax

    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    if is_torchs and entry and isinstance(optimizer, Adamax) != ("exp_inf" in entry):
        kind = type(optimizer).__name__
        raise _misfit(f"`{path}` in the file is not what a {kind} keeps", uri, _SAME_KIND)


def _check_shapes(entry: Mapping[str, Any], parameter: torch.Tensor, path: str, uri: str) -> None:
    if entry.keys() & _PARTED:
        return
    shape = tuple(parameter.shape)
    for key, value in entry.items():
        if key in _SHAPED and isinstance(value, TensorInfo) and value.shape != shape:
            if value.shape == () and key in ("step_size", "ax"):
                continue
            raise _misfit(
                f"`{path}.{key}` is {format_shape(value.shape)}, its parameter "
                f"{format_shape(shape)}",
                uri,
                "the file is of another model, or its parameters stand in another order",
            )


def _tensors(value: Any, parameter: torch.Tensor, path: str) -> Any:
    if isinstance(value, TensorInfo):
        return _like(parameter, read_tensor(value, path))
    if isinstance(value, dict):
        return {key: _tensors(part, parameter, f"{path}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_tensors(part, parameter, f"{path}.{i}") for i, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The part of this process, where the parameter is split and the tensor has its shape.

    Every process has read the whole, so they have nothing to tell each other.
    """
    if not is_split(parameter) or whole.shape != parameter.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    split: Any = parameter
    return distribute_tensor(
        whole.to(split.to_local().device), split.device_mesh, split.placements, src_data_rank=None
    )


def read_tensor(info: TensorInfo, where: str) -> torch.Tensor:
    """The tensor that a file describes, on the CPU; its checksum is compared.

    Raises:
        FormatError: FC105 or FC102 for a damaged file, FC307 for a view that expands.
    """
    import torch

    if info.storage is None or info.dtype.torch is None or info.dtype.bits < 8:
        raise FormatError(f"`{info.name}` is {info.describe()}", code="FC306", where=where)
    if info.num_bytes > info.storage.num_bytes:
        raise FormatError(
            f"`{escape(info.name)}` ({info.describe()}, {info.num_bytes} bytes) is an expanded "
            f"view of {info.storage.num_bytes} stored bytes",
            code="FC307",
            where=where,
        )
    tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype.torch))
    view, at = bytes_of(tensor), 0
    for block in _blocks(info):
        view[at : at + len(block)] = block
        at += len(block)
    return tensor


def _blocks(info: TensorInfo) -> Iterator[memoryview]:
    step = Step(source=info, name=info.name, dtype=info.dtype)
    return derive(step, bytearray(BLOCK_BYTES), Derived())


def _misfit(message: str, uri: str, hint: str | None = None) -> CkptError:
    return CkptError(message, code="FC463", where=uri, hint=hint)
