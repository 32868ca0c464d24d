"""What we write as torch format, torch loads: restricted, memory-mapped, with sharing."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from fixtures import handmade as hm
from tests.formats.test_torch_zip import DTYPES, all_dtypes, save
from tests.support import (
    cli,
    cli_ok,
    facts_at,
    load_torch,
    names_in,
    quiet_torch,
    random_tensor,
    torch_facts,
)


def convert(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    cli_ok("convert", save(tensors, tmp_path / "src.pt"), tmp_path / "dst.pt")
    return tmp_path / "dst.pt"


def test_loads_memory_mapped_and_not(tmp_path: Path) -> None:
    tensors = all_dtypes(DTYPES)
    tensors["scalar"], tensors["empty"] = torch.tensor(3.5), torch.empty(2, 0)
    tensors["unicode 层 🦩"] = torch.randn(3)
    dst = convert(tensors, tmp_path)
    with quiet_torch():
        assert torch_facts(load_torch(dst)) == torch_facts(tensors)
        assert torch_facts(load_torch(dst, mmap=True)) == torch_facts(tensors)
        assert facts_at(dst) == torch_facts(tensors)
        assert list(load_torch(dst)) == list(tensors)


def test_loads_onto_the_meta_device_with_true_offsets(tmp_path: Path) -> None:
    tensors = {"a": random_tensor(torch.float32, (9, 9)), "b": torch.arange(7)}
    dst = convert(tensors, tmp_path)
    data = dst.read_bytes()
    for name, tensor in torch.load(dst, weights_only=True, map_location="meta").items():
        at = tensor.untyped_storage()._checkpoint_offset
        wanted = torch_facts(tensors)[name].data
        assert at % 64 == 0
        assert data[at : at + len(wanted)] == wanted


def test_sharing_is_restored(tmp_path: Path) -> None:
    weight = random_tensor(torch.bfloat16, (6, 7))
    tensors = {"embed": weight, "body": torch.ones(3), "head": weight}
    for options in ({}, {"mmap": True}):
        loaded = load_torch(convert(tensors, tmp_path), **options)
        assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()
        assert loaded["body"].data_ptr() != loaded["head"].data_ptr()
        (tmp_path / "dst.pt").unlink()


def test_the_archive_is_sound_for_other_zip_readers(tmp_path: Path) -> None:
    dst = convert(all_dtypes(DTYPES), tmp_path)
    with zipfile.ZipFile(dst) as archive:
        assert archive.testzip() is None
        names = [info.filename for info in archive.infolist()]
        assert names[0] == "dst/data.pkl"
        assert archive.read("dst/byteorder") == b"little"
        assert archive.read("dst/version") == b"3\n"
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED


def test_payloads_stand_where_torch_puts_them(tmp_path: Path) -> None:
    """Saved again by torch, every storage lies at the same offset: same records, same padding."""
    tensors = {f"layer.{index}": torch.randn(index + 1, 5) for index in range(12)}
    dst = convert(tensors, tmp_path)
    ours, theirs = (
        {
            name: tensor.untyped_storage()._checkpoint_offset % 64
            for name, tensor in torch.load(path, weights_only=True, map_location="meta").items()
        }
        for path in (dst, tmp_path / "src.pt")
    )
    assert ours == theirs


def test_output_is_deterministic(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50), "b": torch.randn(3, 3)}
    first = convert(tensors, tmp_path).read_bytes()
    (tmp_path / "dst.pt").unlink()
    assert convert(tensors, tmp_path).read_bytes() == first


def test_loads_into_a_module(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    dst = convert(dict(model.state_dict()), tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    other.load_state_dict(load_torch(dst), strict=True)
    assert torch_facts(other.state_dict()) == torch_facts(model.state_dict())


@pytest.mark.parametrize("shape", [(2, 3), (4, 1)])
def test_halves_of_bytes_must_pair_up(shape: tuple[int, int], tmp_path: Path) -> None:
    size = shape[0] * shape[1] // 2
    header = {"w": hm.entry(0, size, shape, "F4")}
    (tmp_path / "src.safetensors").write_bytes(hm.safetensors(header, bytes(range(size))))
    for options in ([], ["--no-verify"], ["--dry-run"]):
        outcome = cli(
            "convert", tmp_path / "src.safetensors", tmp_path / "dst.pt", "--json", *options
        )
        assert (outcome.code, outcome.codes) == (2, ["FC305"])
    assert names_in(tmp_path) == ["src.safetensors"]


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(3.0)}
    src = save(tensors, tmp_path / "src.pt")
    dst = tmp_path / os.fsdecode(b"caf\xe9.pt")
    cli_ok("convert", src, dst)
    assert facts_at(dst) == torch_facts(tensors)
    plain = dst.rename(tmp_path / "plain.pt")
    assert torch_facts(load_torch(plain)) == torch_facts(tensors)
