"""Wrapper prefixes: exact components, any depth, stacked, on all keys or some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.layouts.prefixes import (
    WRAPPER_COMPONENTS,
    describe_prefixes,
    refuse_flat_parameter,
    strip_wrappers,
)
from tests.support import cli, cli_ok, facts_at


@pytest.mark.parametrize(
    ("name", "stripped", "removed"),
    [
        ("module.w", "w", ("module",)),
        ("module.module.w", "w", ("module", "module")),
        ("_orig_mod.module.a.w", "a.w", ("_orig_mod", "module")),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.w", "a.b.w",
         ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")),
        ("a.module.w", "a.w", ("module",)),
        ("modules.w", "modules.w", ()),
        ("module_list.0.w", "module_list.0.w", ()),
        ("submodule.w", "submodule.w", ()),
        ("my_module.w", "my_module.w", ()),
        ("module", "module", ()),
        ("a.module", "a.module", ()),
        ("module.module", "module", ("module",)),
        ("Module.w", "Module.w", ()),
        ("w", "w", ()),
        ("", "", ()),
        ("module..w", ".w", ("module",)),
    ],
)  # fmt: skip
def test_components(name: str, stripped: str, removed: tuple[str, ...]) -> None:
    assert strip_wrappers(name) == (stripped, removed)


_parts = st.sampled_from(["a", "layers", "0", "submodule", "modules", *sorted(WRAPPER_COMPONENTS)])


@given(st.lists(_parts, min_size=1, max_size=6))
def test_stripping_is_stable_and_loses_nothing_else(parts: list[str]) -> None:
    name = ".".join(parts)
    stripped, removed = strip_wrappers(name)
    assert strip_wrappers(stripped) == (stripped, ())
    assert stripped.split(".")[-1] == parts[-1]
    kept = [part for part in parts[:-1] if part not in WRAPPER_COMPONENTS] + parts[-1:]
    assert stripped.split(".") == kept
    assert len(removed) == len(parts) - len(kept)


def test_kinds_are_described_once() -> None:
    kinds = {("module",), (), ("_orig_mod", "module")}
    assert describe_prefixes(kinds) == "_orig_mod.module., module."
    assert describe_prefixes({()}) is None


@pytest.mark.parametrize("name", ["_flat_param", "a._flat_param_0", "b.flat_param_1"])
def test_flat_parameters_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as refused:
        refuse_flat_parameter(name, "x.pt")
    assert (refused.value.code, refused.value.key) == ("FC208", name)
    torch.save({name: torch.ones(4)}, tmp_path / "src.pt")
    outcome = cli("convert", tmp_path / "src.pt", tmp_path / "a.safetensors", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC208"])


def save(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, tmp_path / "src.pt")
    return tmp_path / "src.pt"


def test_prefixes_on_some_keys(tmp_path: Path) -> None:
    src = save(
        tmp_path,
        {
            "module.a": torch.ones(1),
            "b": torch.ones(2),
            "x._fsdp_wrapped_module.module.c": torch.ones(3),
        },
    )
    document = cli_ok("convert", src, tmp_path / "a.safetensors", "--json").document
    assert set(facts_at(tmp_path / "a.safetensors")) == {"a", "b", "x.c"}
    assert document["summary"]["renamed"] == 2
    assert document["inputs"][0]["prefix"] == "_fsdp_wrapped_module.module., module."
    cli_ok("verify", src, tmp_path / "a.safetensors")


def test_keep_prefix(tmp_path: Path) -> None:
    src = save(tmp_path, {"module.a": torch.ones(1), "module.b": torch.ones(2)})
    document = cli_ok(
        "convert", src, tmp_path / "a.safetensors", "--keep-prefix", "--json"
    ).document
    assert set(facts_at(tmp_path / "a.safetensors")) == {"module.a", "module.b"}
    assert document["summary"]["renamed"] == 0


def test_two_names_that_become_one(tmp_path: Path) -> None:
    src = save(tmp_path, {"module.w": torch.ones(2), "w": torch.zeros(3), "v": torch.ones(1)})
    outcome = cli("convert", src, tmp_path / "a.safetensors", "--json")
    finding = outcome.document["findings"][0]
    assert (outcome.code, finding["code"], finding["key"]) == (2, "FC202", "w")
    assert "`module.w` (F32 2)" in finding["detail"]
    assert "`w` (F32 3)" in finding["detail"]
    assert "--exclude 'module.*'" in finding["hint"]
    cli_ok("convert", src, tmp_path / "a.safetensors", "--exclude", "module.*")
    assert facts_at(tmp_path / "a.safetensors")["w"].shape == (3,)


def test_two_names_of_one_storage_become_one(tmp_path: Path) -> None:
    weight = torch.randn(3)
    src = save(tmp_path, {"module.w": weight, "w": weight})
    cli_ok("convert", src, tmp_path / "a.safetensors")
    assert set(facts_at(tmp_path / "a.safetensors")) == {"w"}
    cli_ok("verify", src, tmp_path / "a.safetensors")
