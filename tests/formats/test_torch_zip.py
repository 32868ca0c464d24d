"""Files of `torch.save`: read as torch reads them, bit for bit, to safetensors and back."""

from __future__ import annotations

import argparse
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.utils.serialization import config

from tests.support import (
    FIXTURES,
    TORCH_NAMES,
    cli,
    cli_ok,
    facts_at,
    load_torch,
    quiet_torch,
    random_tensor,
    torch_facts,
)

DTYPES = [getattr(torch, name.removeprefix("torch.")) for name in TORCH_NAMES]
#: What safetensors has a name for.
COMMON = [d for d in DTYPES if d not in (torch.complex32, torch.complex128)]
#: What `safetensors.torch.load_file` of 0.8.0 gives back as it was saved.
LOADABLE = [d for d in COMMON if d is not torch.float4_e2m1fn_x2]


def save(tensors: object, path: Path) -> Path:
    with quiet_torch():
        torch.save(tensors, path)
    return path


def all_dtypes(dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    return {str(d): random_tensor(d, (3, 4), seed) for seed, d in enumerate(dtypes)}


@pytest.mark.parametrize("dtype", COMMON, ids=str)
def test_every_dtype_goes_to_safetensors_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": random_tensor(dtype, (5, 6)), "b": random_tensor(dtype, (7,), 1)}
    src = save(tensors, tmp_path / "src.pt")
    cli_ok("convert", src, tmp_path / "a.safetensors")
    cli_ok("convert", tmp_path / "a.safetensors", tmp_path / "back.pt")
    wanted = torch_facts(tensors)
    assert facts_at(src) == wanted
    assert facts_at(tmp_path / "a.safetensors") == wanted
    assert torch_facts(load_torch(tmp_path / "back.pt")) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_stays_in_torch_format(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": random_tensor(dtype, (2, 4))}
    cli_ok("convert", save(tensors, tmp_path / "src.pt"), tmp_path / "dst.pt")
    with quiet_torch():
        assert torch_facts(load_torch(tmp_path / "dst.pt")) == torch_facts(tensors)


def test_safetensors_own_library_reads_the_same(tmp_path: Path) -> None:
    tensors = all_dtypes(LOADABLE)
    cli_ok("convert", save(tensors, tmp_path / "src.pt"), tmp_path / "dst.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "dst.safetensors")
    assert torch_facts(loaded) == torch_facts(tensors)


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex128], ids=str)
def test_a_dtype_that_safetensors_lacks_is_refused_by_name(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    src = save({"phase": random_tensor(dtype, (3,)), "ok": torch.ones(2)}, tmp_path / "src.pt")
    outcome = cli("convert", src, tmp_path / "dst.safetensors", "--json")
    finding = outcome.document["findings"][0]
    assert (outcome.code, finding["code"], finding["key"]) == (2, "FC305", "phase")
    assert not (tmp_path / "dst.safetensors").exists()


def views() -> dict[str, torch.Tensor]:
    base = random_tensor(torch.float32, (6, 8), 11)
    cube = random_tensor(torch.bfloat16, (4, 5, 6), 12)
    return {
        "whole": base,
        "transposed": base.t(),
        "rows": base[2:5],
        "columns": base[:, 3:6],
        "every other": base[::2, 1::3],
        "diagonal": base.diagonal(),
        "offset": base.reshape(-1)[5:17],
        "permuted": cube.permute(2, 0, 1),
        "inner": cube[1:3, :, 2],
        "flat": cube.reshape(-1),
        "one": cube[3, 4, 5],
        "ones": base[1:2, 2:3].transpose(0, 1),
        "twice": base.as_strided((3, 4), (2, 1)),
    }


def test_views_strides_and_offsets(tmp_path: Path) -> None:
    tensors = views()
    src = save(tensors, tmp_path / "src.pt")
    cli_ok("convert", src, tmp_path / "a.safetensors")
    cli_ok("convert", src, tmp_path / "back.pt")
    wanted = torch_facts(tensors)
    assert facts_at(src) == facts_at(tmp_path / "a.safetensors") == wanted
    assert torch_facts(load_torch(tmp_path / "back.pt")) == wanted
    assert torch_facts(safetensors.torch.load_file(tmp_path / "a.safetensors")) == wanted


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(-0.0),
        "bool": torch.tensor(True),
        "empty": torch.empty(0),
        "hollow": torch.empty(3, 0, 2, dtype=torch.float16),
        "hollow view": torch.ones(4, 5)[:, 5:],
        "last": torch.tensor([7]),
    }
    src = save(tensors, tmp_path / "src.pt")
    cli_ok("convert", src, tmp_path / "a.safetensors")
    cli_ok("convert", tmp_path / "a.safetensors", tmp_path / "back.pt")
    wanted = torch_facts(tensors)
    assert facts_at(tmp_path / "a.safetensors") == wanted
    assert torch_facts(load_torch(tmp_path / "back.pt")) == wanted


def test_expanded_views_need_permission(tmp_path: Path) -> None:
    tensors = {"wide": random_tensor(torch.float32, (1, 4)).expand(50, 4)}
    src = save(tensors, tmp_path / "src.pt")
    refused = cli("convert", src, tmp_path / "a.safetensors", "--json")
    assert (refused.code, refused.codes) == (2, ["FC307"])
    assert "--max-expansion 50" in refused.document["findings"][0]["hint"]
    cli_ok("convert", src, tmp_path / "a.safetensors", "--max-expansion", 51)
    assert facts_at(tmp_path / "a.safetensors") == torch_facts(tensors)
    assert cli("inspect", src, "--json").codes == ["FC307"]


def test_exact_aliases_are_stored_once_and_restored(tmp_path: Path) -> None:
    weight = random_tensor(torch.float32, (30, 40))
    tensors = {"embed": weight, "other": torch.ones(2), "head": weight, "same": weight.view(30, 40)}
    src = save(tensors, tmp_path / "src.pt")
    document = cli_ok("convert", src, tmp_path / "a.safetensors", "--json").document
    assert document["summary"]["num_tensors"] == 4
    assert document["summary"]["num_bytes"] == weight.nbytes + 8
    assert (tmp_path / "a.safetensors").stat().st_size < 2 * weight.nbytes
    assert [f["data"]["aliases"] for f in document["findings"]] == [["head", "same"]]
    cli_ok("convert", tmp_path / "a.safetensors", tmp_path / "back.pt")
    back = load_torch(tmp_path / "back.pt")
    assert torch_facts(back) == torch_facts(tensors)
    assert len({back[name].data_ptr() for name in ("embed", "head", "same")}) == 1
    assert back["other"].data_ptr() != back["embed"].data_ptr()


def test_partial_overlaps_are_each_written_out(tmp_path: Path) -> None:
    base = random_tensor(torch.int32, (100,))
    tensors = {"left": base[:60], "right": base[40:], "as pairs": base.view(50, 2)}
    src = save(tensors, tmp_path / "src.pt")
    document = cli_ok("convert", src, tmp_path / "a.safetensors", "--json").document
    assert document["summary"]["num_bytes"] == 4 * (60 + 60 + 100)
    assert facts_at(tmp_path / "a.safetensors") == torch_facts(tensors)


def test_parameters(tmp_path: Path) -> None:
    plain = torch.nn.Parameter(random_tensor(torch.float32, (3, 2)))
    frozen = torch.nn.Parameter(random_tensor(torch.bfloat16, (4,)), requires_grad=False)
    marked = torch.nn.Parameter(random_tensor(torch.float32, (5,), 3))
    marked.note = "kept elsewhere"  # makes torch write `_rebuild_parameter_with_state`
    tensors = {"plain": plain, "frozen": frozen, "marked": marked}
    src = save(tensors, tmp_path / "src.pt")
    with zipfile.ZipFile(src) as archive:
        assert b"_rebuild_parameter_with_state" in archive.read("src/data.pkl")
    cli_ok("convert", src, tmp_path / "a.safetensors")
    assert facts_at(tmp_path / "a.safetensors") == torch_facts(tensors)


def test_a_real_module_beside_its_training_state(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    torch.nn.init.normal_(model[1].weight)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 4,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": {"last_epoch": 4, "_last_lr": [0.001]},
        "args": argparse.Namespace(lr=0.1),
    }
    src = save(checkpoint, tmp_path / "src.pt")
    document = cli_ok("convert", src, tmp_path / "a.safetensors", "--json").document
    assert facts_at(tmp_path / "a.safetensors") == torch_facts(model.state_dict())
    assert document["inputs"][0]["wrapper"] == "model_state_dict"
    left_out = {f["key"] for f in document["findings"] if f["code"] == "FC209"}
    assert {"epoch", "optimizer_state_dict", "lr_scheduler_state_dict", "args"} <= left_out
    beside = {one["path"]: one for one in cli("inspect", src, "--json").document["beside"]}
    assert beside["optimizer_state_dict"]["num_tensors"] == 3 * len(list(model.parameters()))
    assert "argparse.Namespace" in beside["args"]["kind"]


def test_other_alignments_and_absent_checksums(tmp_path: Path) -> None:
    tensors = OrderedDict(a=random_tensor(torch.float32, (9, 9)), b=torch.arange(5))
    config.save.storage_alignment = 4096
    config.save.compute_crc32 = False
    try:
        torch.save(tensors, tmp_path / "src.pt")
    finally:
        config.save.storage_alignment = 64
        config.save.compute_crc32 = True
    assert (tmp_path / "src.pt").stat().st_size > 3 * 4096
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "a.safetensors")
    assert facts_at(tmp_path / "a.safetensors") == torch_facts(tensors)


@pytest.mark.parametrize(
    "name",
    ["bare", "deflated", "unaligned", "big-endian", "no-byteorder", "legacy", "module-prefix"],
)
def test_fixtures_are_read_as_torch_reads_them(name: str, tmp_path: Path) -> None:
    src = FIXTURES / f"torch-{name}.pt"
    oracle = torch_facts(load_torch(src))
    assert facts_at(src) == oracle
    cli_ok("convert", src, tmp_path / "a.safetensors", "--keep-prefix")
    cli_ok("verify", src, tmp_path / "a.safetensors", "--keep-prefix")
    assert facts_at(tmp_path / "a.safetensors") == oracle
    cli_ok("convert", tmp_path / "a.safetensors", tmp_path / "back.pt", "--keep-prefix")
    assert torch_facts(load_torch(tmp_path / "back.pt")) == oracle


def test_rewritten_files_hold_what_the_first_one_holds() -> None:
    bare = facts_at(FIXTURES / "torch-bare.pt")
    for name in ("deflated", "unaligned", "big-endian", "no-byteorder"):
        assert facts_at(FIXTURES / f"torch-{name}.pt") == bare


@pytest.mark.parametrize("dtype", [d for d in COMMON if d.itemsize > 1], ids=str)
def test_byte_order_of_every_wide_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    import numpy

    tensor = random_tensor(dtype, (4, 6), 5)
    src = save({"t": tensor, "view": tensor.t()}, tmp_path / "src.pt")
    unit = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    with zipfile.ZipFile(src) as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("/byteorder"):
                data = b"big"
            if info.filename.endswith("/data/0"):
                data = numpy.frombuffer(data, dtype=f"u{unit}").byteswap().tobytes()
            new.writestr(info.filename, data)
    assert facts_at(tmp_path / "big.pt") == torch_facts({"t": tensor, "view": tensor.t()})


def test_a_flipped_bit_in_a_storage_is_found(tmp_path: Path) -> None:
    tensor = random_tensor(torch.float32, (64,))
    src = save({"w": tensor}, tmp_path / "src.pt")
    data = bytearray(src.read_bytes())
    at = data.index(torch_facts({"w": tensor})["w"].data)
    data[at + 100] ^= 1
    src.write_bytes(data)
    outcome = cli("convert", src, tmp_path / "dst.safetensors", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC105"])
    assert not (tmp_path / "dst.safetensors").exists()


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.ones(3, 3).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
    ],
    ids=["sparse", "meta"],
)
def test_kinds_without_dense_bytes_are_refused_by_name(
    tensor: torch.Tensor, word: str, tmp_path: Path
) -> None:
    src = save({"odd": tensor, "fine": torch.ones(1)}, tmp_path / "src.pt")
    outcome = cli("inspect", src, "--json")
    finding = outcome.document["findings"][0]
    assert (outcome.code, finding["code"], finding["key"]) == (2, "FC306", "odd")
    assert word in finding["detail"]


def test_conjugate_and_negative_views_are_refused(tmp_path: Path) -> None:
    lazy = torch.view_as_complex(torch.randn(3, 2)).conj()
    src = save({"w": lazy}, tmp_path / "src.pt")
    assert cli("inspect", src, "--json").codes == ["FC306"]
    src = save({"w": lazy.imag}, tmp_path / "neg.pt")
    assert cli("inspect", src, "--json").codes == ["FC306"]
    src = save({"w": lazy.resolve_conj()}, tmp_path / "fine.pt")
    assert facts_at(src) == torch_facts({"w": lazy.resolve_conj()})
