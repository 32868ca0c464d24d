"""Modules whose state dict is not what they compute with, or whose tensors share memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading import load_checkpoint
from tests.loading.engine_support import assert_same, bits, saved, scrambled


class Copied(nn.Linear):
    """Gives copies of its tensors, as classes do that store them in another form."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].clone()


def hooked() -> nn.Module:
    module = nn.Linear(3, 3)
    module._register_state_dict_hook(  # type: ignore[no-untyped-call]
        lambda _module, state, *_: type(state)((k, v.half()) for k, v in state.items())
    )
    return module


def refused(module: nn.Module, path: Path, message: str, **options: Any) -> CkptError:
    """That a load is refused and changes nothing."""
    before = [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]
    with pytest.raises(CkptError, match=message) as caught:
        load_checkpoint(module, path, **options)
    after = [*module.parameters(), *module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return caught.value


@pytest.mark.parametrize("make", [lambda: Copied(3, 3), hooked])
@pytest.mark.parametrize("strict", [True, False])
def test_a_copy_is_not_filled(make: Any, strict: bool, tmp_path: Path) -> None:
    path = saved(nn.Linear(3, 3).state_dict(), tmp_path)
    error = refused(make(), path, "`weight` .* is a copy of what the model has", strict=strict)
    assert error.code == "FC306"


class Loose(nn.Linear):
    """Keeps a tensor that is no parameter and no buffer, and saves it."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = torch.zeros(3)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.scale if keep_vars else self.scale.detach()


def test_a_loose_tensor_of_the_module_is_filled(tmp_path: Path) -> None:
    source, module = scrambled(Loose()), Loose()
    load_checkpoint(module, saved(source.state_dict(), tmp_path))
    assert_same(module, source)
    assert torch.equal(module.scale, source.scale)
    assert module.scale.any()


class Views(nn.Module):
    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)


def transposed() -> Views:
    table = torch.randn(4, 4)
    return Views(table, table.t())


def shifted() -> Views:
    line = torch.randn(6)
    return Views(line[:4], line[2:])


def reshaped() -> Views:
    table = torch.randn(4, 4)
    return Views(table, table.view(2, 8))


@pytest.mark.parametrize("make", [transposed, shifted, reshaped])
@pytest.mark.parametrize("assign", [None, True])
def test_memory_that_would_be_written_twice(make: Any, assign: bool | None, tmp_path: Path) -> None:
    module = make()
    path = saved({name: torch.randn(p.shape) for name, p in module.named_parameters()}, tmp_path)
    assert "shares memory" in str(refused(module, path, "shares memory with `[ab]`", assign=assign))


def test_views_that_interlock_are_filled(tmp_path: Path) -> None:
    """Columns of one storage: their spans overlap and none of their elements does."""
    table = torch.randn(4, 6)
    module = Views(table[:, :2], table[:, 2:])
    wanted = {"a": torch.randn(4, 2), "b": torch.randn(4, 4)}
    load_checkpoint(module, saved(wanted, tmp_path))
    assert torch.equal(table, torch.cat((wanted["a"], wanted["b"]), dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_element_of_a_larger_table(dtype: torch.dtype, tmp_path: Path) -> None:
    """Contiguous by torch's word, and with a step that no view of its bytes can have."""
    table = torch.zeros(1, 2, dtype=dtype)
    module = Views(table[:, 0], table[:, 1:])
    wanted = {"a": torch.tensor([1.5]), "b": torch.tensor([[2.5]])}
    load_checkpoint(module, saved(wanted, tmp_path))
    assert table.tolist() == [[1.5, 2.5]]


def test_many_views_that_interlock_take_no_time(tmp_path: Path) -> None:
    table = torch.zeros(64, 3000)
    module = nn.ParameterList([nn.Parameter(column) for column in table.unbind(1)])
    wanted = torch.randn(64, 3000)
    path = saved({str(i): column.clone() for i, column in enumerate(wanted.unbind(1))}, tmp_path)
    began = time.perf_counter()
    load_checkpoint(module, path)
    assert time.perf_counter() - began < 20  # a second; minutes if each were held against all
    assert torch.equal(table, wanted)


def test_an_expanded_buffer_cannot_hold_a_table(tmp_path: Path) -> None:
    module: Any = nn.Linear(2, 2)
    module.register_buffer("table", torch.zeros(3).expand(2, 3))
    state = {**nn.Linear(2, 2).state_dict(), "table": torch.randn(2, 3)}
    path = saved(state, tmp_path)
    assert refused(module, path, "several elements in one place").code == "FC306"
    load_checkpoint(module, path, assign=True)
    assert torch.equal(module.table, state["table"])


class Wrapped(torch.Tensor):
    """A tensor that is put together of others whenever it is used, as quantised ones are."""

    packed: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.packed = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = [arg.packed.float() if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_a_tensor_that_is_none_is_not_filled(tmp_path: Path) -> None:
    module = nn.Linear(3, 3)
    module.register_buffer("packed", Wrapped(torch.ones(3, dtype=torch.int8)))
    path = saved({**nn.Linear(3, 3).state_dict(), "packed": torch.ones(3)}, tmp_path)
    with pytest.raises(CkptError, match=r"`packed` of the model is a Wrapped") as caught:
        load_checkpoint(module, path)
    assert caught.value.code == "FC306"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("assign", [None, True])
def test_a_scripted_module(assign: bool | None, tmp_path: Path) -> None:
    source = scrambled(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    module = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    load_checkpoint(module, saved(source.state_dict(), tmp_path), assign=assign)
    assert bits(module) == bits(source)
    for one in (source, module):
        dict(one.named_buffers())["1.running_var"].abs_()
    x = torch.randn(4, 2)
    assert torch.equal(module.eval()(x), source.eval()(x))
