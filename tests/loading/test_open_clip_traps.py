"""Files and wrappers that open_clip's `load_checkpoint` trips over, and what ours does with them.

Each test first shows what open_clip does with the very file, so that a test cannot outlive the trap
it is about.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from tests import zoo
from tests.loading.open_clip_support import (
    assert_filled,
    assert_ours_fills,
    clip_model,
    ours,
    refusal,
    state_of,
    upstream_load,
)
from tests.support import quiet_torch
from tests.zoo_lms import State


@pytest.fixture(scope="module")
def state() -> State:
    return state_of(clip_model(seed=1))


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def torch_file(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


# --- what works there works here -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("raw.pt", torch_file),
        ("wrapped.pth", lambda s, p: torch_file({"state_dict": s, "epoch": 3}, p)),
        ("ddp.bin", lambda s, p: torch_file(prefixed(s, "module."), p)),
        ("both.ckpt", lambda s, p: torch_file({"state_dict": prefixed(s, "module.")}, p)),
        ("a.weights", lambda s, p: torch_file(s, p, _use_new_zipfile_serialization=False)),
        ("plain.safetensors", zoo.save_safetensors),
        ("ddp.safetensors", lambda s, p: zoo.save_safetensors(prefixed(s, "module."), p)),
    ],
)
def test_forms_that_open_clip_reads(
    name: str, write: Callable[..., Path], state: State, tmp_path: Path
) -> None:
    path = write(state, tmp_path / name)
    model = clip_model(seed=99)
    assert str(upstream_load(model, path)) == "<All keys matched successfully>"
    assert_filled(model, state)
    assert_ours_fills(path, state)
    assert_ours_fills(path, state, strict=False)
    assert_ours_fills(str(path), state)  # type: ignore[arg-type]


# --- wrappers and prefixes -------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "model_state_dict", "module"])
def test_other_wrappers(key: str, state: State, tmp_path: Path) -> None:
    path = torch_file({key: state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pt")
    with pytest.raises((RuntimeError, AttributeError)):
        upstream_load(clip_model(), path)
    assert_ours_fills(path, state)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_models(prefix: str, state: State, tmp_path: Path) -> None:
    path = torch_file(prefixed(state, prefix), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        upstream_load(clip_model(), path)
    assert_ours_fills(path, state)


def test_prefix_of_a_compiled_tower_in_the_middle(state: State, tmp_path: Path) -> None:
    inside = {name.replace("visual.", "visual._orig_mod."): t for name, t in state.items()}
    path = torch_file(inside, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        upstream_load(clip_model(), path)
    assert_ours_fills(path, state)


def test_prefix_on_later_keys_only(state: State, tmp_path: Path) -> None:
    first, *rest = state
    mixed = {first: state[first]} | prefixed({name: state[name] for name in rest}, "module.")
    path = torch_file(mixed, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        upstream_load(clip_model(), path)
    assert_ours_fills(path, state)


def test_prefix_on_the_first_keys_only(state: State, tmp_path: Path) -> None:
    first, *rest = state
    mixed = {"module." + first: state[first]} | {name: state[name] for name in rest}
    path = torch_file(mixed, tmp_path / "a.pt")
    # seven characters off every key: `visual.positional_embedding` takes the text's place
    with pytest.raises(AssertionError, match="width changed"):
        upstream_load(clip_model(), path, strict=False)
    assert_ours_fills(path, state)


class Unlucky(nn.Module):
    """Its names begin with `module` and are no wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.modulexyz = nn.Parameter(torch.randn(3))
        self.abcdefghij = nn.Parameter(torch.randn(4))


def test_module_without_a_dot_is_no_prefix(tmp_path: Path) -> None:
    from open_clip.factory import load_state_dict

    state = state_of(Unlucky())
    path = torch_file(state, tmp_path / "a.pt")
    assert list(load_state_dict(str(path))) == ["yz", "hij"]
    assert_ours_fills(path, state, model=Unlucky())


def test_averaged_weights_are_not_passed_over_in_silence(state: State, tmp_path: Path) -> None:
    average = {name: tensor + 1 for name, tensor in state.items()}
    path = torch_file({"state_dict_ema": average, "state_dict": state}, tmp_path / "a.pt")
    model = clip_model()
    upstream_load(model, path)
    assert_filled(model, state)
    assert_ours_fills(path, state)
    chosen = clip_model()
    assert ours(chosen, path, wrapper_key="state_dict_ema") == ([], [])
    assert_filled(chosen, average)
    alone = torch_file({"state_dict_ema": average}, tmp_path / "b.pt")
    with pytest.raises((RuntimeError, AttributeError)):
        upstream_load(clip_model(), alone)
    assert_ours_fills(alone, average)


# --- suffixes and devices --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.bin", "model.SAFETENSORS", "model.Safetensors", "model"])
def test_safetensors_under_another_suffix(name: str, state: State, tmp_path: Path) -> None:
    path = zoo.save_safetensors(state, tmp_path / name)
    with pytest.raises(pickle.UnpicklingError):
        upstream_load(clip_model(), path)
    assert_ours_fills(path, state)


def test_a_torch_file_called_safetensors(state: State, tmp_path: Path) -> None:
    path = torch_file(state, tmp_path / "model.safetensors")
    with pytest.raises(SafetensorError):
        upstream_load(clip_model(), path)
    assert_ours_fills(path, state)


def test_a_torch_device(state: State, tmp_path: Path) -> None:
    device = torch.device("cpu")
    path = zoo.save_safetensors(state, tmp_path / "model.safetensors")
    with pytest.raises(SafetensorError):
        upstream_load(clip_model(), path, device=device)
    assert_ours_fills(path, state, device=device)
    assert_ours_fills(torch_file(state, tmp_path / "model.pt"), state, device=device)


# --- weights_only ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beside",
    [
        {"args": argparse.Namespace(lr=0.1, model="ViT-B-32")},
        {"best": np.float64(0.5)},
        {"best": np.float32(0.5), "args": argparse.Namespace()},
    ],
    ids=["namespace", "numpy", "both"],
)
def test_settings_beside_the_weights(beside: Any, state: State, tmp_path: Path) -> None:
    path = torch_file({"state_dict": state} | beside, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        upstream_load(clip_model(), path)
    for weights_only in (True, False):
        assert_ours_fills(path, state, weights_only=weights_only)


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_weights_only_false_still_runs_nothing(state: State, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = torch_file({"state_dict": state, "extra": Payload(mark)}, tmp_path / "a.pt")
    upstream_load(clip_model(), path, weights_only=False)
    assert mark.exists()
    mark.unlink()
    for weights_only in (True, False):
        model = clip_model()
        with refusal(model, "could run code") as caught:
            ours(model, path, weights_only=weights_only)
        assert caught.value.code == "FC501"
    assert not mark.exists()


def test_a_pickled_module(tmp_path: Path) -> None:
    model = clip_model(seed=1)
    model.visual.conv1 = nn.Conv2d(3, 64, 8, 8, bias=False).requires_grad_(False)
    path = torch_file(model.visual.conv1, tmp_path / "a.pt")
    with pytest.raises(AttributeError, match="items"):
        upstream_load(model, path, weights_only=False)
    into = nn.Conv2d(3, 64, 8, 8, bias=False)
    with refusal(into, "state_dict"):
        ours(into, path, weights_only=False)


# --- TorchScript -----------------------------------------------------------------------------


class Shell(nn.Module):
    """The root of the archive: OpenAI's files have three integers beside the weights."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


def scripted(state: State, path: Path) -> Path:
    """A TorchScript archive with the names of `state`, as OpenAI published CLIP."""
    root = Shell()
    for name, tensor in state.items():
        *where, leaf = name.split(".")
        part: nn.Module = root
        for step in where:
            if step not in part._modules:
                part.add_module(step, nn.Module())
            part = part.get_submodule(step)
        if tensor.is_floating_point():
            part.register_parameter(leaf, nn.Parameter(tensor.clone()))
        else:
            part.register_buffer(leaf, tensor.clone())
    with quiet_torch():
        torch.jit.save(torch.jit.script(root), str(path))
    return path


def test_torchscript_archives(state: State, tmp_path: Path) -> None:
    whole = dict(state) | {
        name: torch.tensor(size)
        for name, size in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 99))
    }
    path = scripted(whole, tmp_path / "ViT-T-8.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="TorchScript"):
            upstream_load(clip_model(), path)
        model = clip_model()
        upstream_load(model, path, weights_only=False)
        assert_filled(model, state)
    for weights_only in (True, False):
        assert_ours_fills(path, state, weights_only=weights_only)
    nested = {
        name if name.startswith(("visual.", "logit_")) else f"text.{name}": tensor
        for name, tensor in state.items()
    }
    assert_ours_fills(path, nested, model=clip_model(kind="CustomTextCLIP", seed=99))


# --- nothing, and next to nothing ------------------------------------------------------------


def test_an_empty_dict(tmp_path: Path) -> None:
    path = torch_file({}, tmp_path / "a.pt")
    for strict in (True, False):
        with pytest.raises(StopIteration):
            upstream_load(clip_model(), path, strict=strict)
        model = clip_model()
        with refusal(model, "no tensors") as caught:
            ours(model, path, strict=strict)
        assert caught.value.code == "FC201"


@pytest.mark.parametrize(
    "strangers",
    [
        {"fc.weight": torch.randn(3, 3), "fc.bias": torch.randn(3)},
        {f"model.layers.{i}.weight": torch.randn(3, 3) for i in range(12)}
        | {"logit_scale": torch.tensor(4.0)},
    ],
    ids=["nothing", "one"],
)
def test_a_load_that_matches_next_to_nothing(strangers: State, tmp_path: Path) -> None:
    path = torch_file(strangers, tmp_path / "a.pt")
    found = upstream_load(clip_model(), path, strict=False)
    assert len(found.missing_keys) >= len(clip_model().state_dict()) - 1
    for strict in (True, False):
        model = clip_model()
        with refusal(model, "inspect"):
            ours(model, path, strict=strict)


def test_a_plain_array_of_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 3), dtype=np.float32))
    with pytest.raises((IndexError, TypeError, AttributeError)):
        upstream_load(clip_model(), tmp_path / "a.npy")
    model = clip_model()
    with refusal(model):
        ours(model, tmp_path / "a.npy")


def test_a_folder(state: State, tmp_path: Path) -> None:
    from open_clip.factory import _find_checkpoint_in_dir

    torch_file(state, tmp_path / "epoch_3.pt")
    assert _find_checkpoint_in_dir(tmp_path) is None  # `local-dir:` knows no `.pt`
    with pytest.raises(IsADirectoryError):
        upstream_load(clip_model(), tmp_path)
    assert_ours_fills(tmp_path, state)
