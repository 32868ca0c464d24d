"""The tensors of a module that a checkpoint can fill, each once with all its names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, name_some
from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.tensors import TORCH_DTYPES, DType, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """One tensor of a module.

    Attributes:
        names: without wrapper prefixes; several where it is tied.
        keys: the same as `state_dict()` spells them.
        tensors: the parameter or buffer itself; several objects where they share one storage.
        is_parameter: or a buffer.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    is_parameter: bool
    dtype: DType
    shape: tuple[int, ...]

    @property
    def tensor(self) -> torch.Tensor:
        """The first of its objects."""
        return self.tensors[0]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def key(self) -> str:
        """The first of its keys."""
        return self.keys[0]

    @property
    def is_meta(self) -> bool:
        """Whether it has no bytes yet."""
        return self.tensor.device.type == "meta"

    def info(self, name: str) -> TensorInfo:
        """Its header under one of its names."""
        return TensorInfo(name=name, dtype=self.dtype, shape=self.shape)


def targets_of(module: nn.Module) -> tuple[Target, ...]:
    """Every tensor of `module.state_dict()`, tied ones once, in order.

    Raises:
        CkptError: FC208 flat parameters of FSDP1, FC306 a kind of tensor that no file fills.
    """
    state = {
        key: value
        for key, value in module.state_dict(keep_vars=True).items()
        if not _is_extra_state(key)
    }
    names = _bare_names(state)
    groups: dict[tuple[object, ...], list[str]] = {}
    for key, tensor in state.items():
        _check_kind(key, tensor, module)
        groups.setdefault(identity(tensor), []).append(key)
    return tuple(
        _target([state[key] for key in keys], keys, [names[key] for key in keys])
        for keys in groups.values()
    )


def describe_module(module: nn.Module) -> str:
    """What to call a module in messages: its class, without a wrapper's."""
    name = type(module).__name__
    if name in ("DistributedDataParallel", "DataParallel"):
        name = type(module.module).__name__
    if name == "OptimizedModule":
        name = type(module._orig_mod).__name__
    return name.removeprefix("FSDP") or name


def extra_state_of(module: nn.Module) -> tuple[str, ...]:
    """Keys of what modules keep beside their tensors (`get_extra_state`), which no load fills."""
    return tuple(key for key in module.state_dict(keep_vars=True) if _is_extra_state(key))


def _is_extra_state(key: str) -> bool:
    return key.rpartition(".")[2] == _EXTRA_STATE


def own_ways_of_loading(module: nn.Module) -> list[str]:
    """Paths of submodules that do something of their own when `load_state_dict` loads them.

    Those of torch itself only check or gather, and are not told.
    """
    from torch import nn

    found: list[str] = []
    for path, part in module.named_modules():
        kind = type(part)
        ways: list[Any] = [
            *(getattr(one, "hook", one) for one in part._load_state_dict_pre_hooks.values()),
            *part._load_state_dict_post_hooks.values(),
        ]
        if kind._load_from_state_dict is not nn.Module._load_from_state_dict:
            ways.append(kind._load_from_state_dict)
        if not path and kind.load_state_dict is not nn.Module.load_state_dict:
            ways.append(kind.load_state_dict)
        if any(not str(getattr(way, "__module__", "")).startswith("torch.") for way in ways):
            found.append(strip_wrappers(path)[0] or describe_module(part))
    return found


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor: FSDP2's parameters, of which each process has a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _target(tensors: list[Any], keys: list[str], names: list[str]) -> Target:
    import torch

    tensor = tensors[0]
    return Target(
        names=tuple(dict.fromkeys(names)),
        keys=tuple(keys),
        tensors=tuple({id(one): one for one in tensors}.values()),
        is_parameter=isinstance(tensor, torch.nn.Parameter),
        dtype=TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")],
        shape=tuple(tensor.shape),
    )


def _bare_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Key -> name without wrapper prefixes, unless that gives two keys one name."""
    bare = {key: strip_wrappers(key)[0] for key in state}
    twice = [name for name, count in Counter(bare.values()).items() if count > 1]
    return {key: key for key in state} if twice else bare


def identity(tensor: Any) -> tuple[object, ...]:
    """Equal for two names of one tensor."""
    if tensor.device.type == "meta" or is_distributed(tensor) or tensor.numel() == 0:
        return (id(tensor),)
    # two Parameters over one storage are tied as well
    where = (tensor.data_ptr(), str(tensor.device))
    return (*where, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _is_put_together(tensor: Any) -> bool:
    """Whether it is a tensor by its class alone, and made of others, as quantized ones are."""
    import torch

    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _check_kind(key: str, tensor: Any, module: nn.Module) -> None:
    import torch

    if type(tensor).__name__ == "FlatParameter" or "_flat_param" in key:
        raise CkptError(
            f"`{key}` is a flat parameter of FSDP1, of which each process has a part",
            code="FC208",
            where=describe_module(module),
            key=key,
            hint="shard with FSDP2 (`fully_shard`), or load before wrapping",
        )
    known = isinstance(tensor, torch.Tensor) and not torch.nn.parameter.is_lazy(tensor)
    known = known and (is_distributed(tensor) or not _is_put_together(tensor))
    dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
    if not known or tensor.layout is not torch.strided or dtype not in TORCH_DTYPES:
        kind = type(tensor).__name__ + (f" ({dtype})" if dtype else "")
        raise CkptError(
            f"{name_some([key])} of the model is a {kind}: only dense tensors are filled",
            code="FC306",
            where=describe_module(module),
            key=key,
            hint="run a lazy module once before loading; quantize after loading",
        )
