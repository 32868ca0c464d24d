"""The stream of pickles from before torch 1.6."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from tests.formats.test_torch_zip import COMMON, DTYPES, views
from tests.support import (
    cli,
    cli_ok,
    facts_at,
    load_torch,
    quiet_torch,
    random_tensor,
    torch_facts,
)


def save(tensors: object, path: Path) -> Path:
    with quiet_torch():
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": random_tensor(dtype, (3, 4)), "scalar": random_tensor(dtype, (1,), 1)[0]}
    if dtype not in COMMON or dtype is torch.float4_e2m1fn_x2:
        del tensors["scalar"]
    src = save(tensors, tmp_path / "src.pt")
    assert facts_at(src) == torch_facts(tensors)
    cli_ok("convert", src, tmp_path / "dst.pt")
    with quiet_torch():
        assert torch_facts(load_torch(tmp_path / "dst.pt")) == torch_facts(tensors)


def test_views_and_sharing(tmp_path: Path) -> None:
    tensors = views()
    tensors["tied"] = tensors["whole"]
    src = save(tensors, tmp_path / "src.pt")
    cli_ok("convert", src, tmp_path / "dst.safetensors")
    assert facts_at(src) == facts_at(tmp_path / "dst.safetensors") == torch_facts(tensors)


def test_a_training_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    checkpoint = {
        "state_dict": model.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "epoch": 2,
    }
    src = save(checkpoint, tmp_path / "src.pt")
    document = cli("inspect", src, "--json").document
    assert document["inputs"][0]["format"] == "torch-legacy"
    assert document["inputs"][0]["wrapper"] == "state_dict"
    assert {one["path"] for one in document["beside"]} >= {"args", "epoch"}
    assert facts_at(src) == torch_facts(model.state_dict())


def test_the_absence_of_checksums_is_said(tmp_path: Path) -> None:
    src = save({"w": torch.ones(2)}, tmp_path / "src.pt")
    assert cli("inspect", src, "--json").codes == ["FC114"]


def test_a_whole_pickled_module_is_refused_with_the_way_on(tmp_path: Path) -> None:
    # torch adds the module's source code to such files; nothing of it may be needed or read.
    src = save(torch.nn.Linear(3, 2), tmp_path / "src.pt")
    outcome = cli("inspect", src, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC502"])
    assert "state_dict" in outcome.document["findings"][0]["hint"]


def test_bytes_after_the_last_storage(tmp_path: Path) -> None:
    src = save({"w": torch.ones(2)}, tmp_path / "src.pt")
    src.write_bytes(src.read_bytes() + b"\0")
    assert cli("inspect", src, "--json").codes == ["FC110"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    path = tmp_path / "src.pt"
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert facts_at(path) == torch_facts(tensors)
    assert cli_ok("inspect", path, "--json").codes == ["FC114"]  # it has no checksums
