"""Sources and destinations that try to trick a conversion; inputs that only look odd."""

from __future__ import annotations

import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures import handmade as hm
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.formats.source import FileSource
from tests.attacks_support import (
    converted,
    error_code,
    finding_codes,
    inspected,
    put_file,
    put_folder,
    read_back,
    refused,
    run_json,
)

GOOD = hm.torch_zip(hm.state_dict())


# -- links and destinations


def test_a_destination_that_is_a_link(tmp_path: Path) -> None:
    src, victim = put_file(tmp_path, GOOD), put_file(tmp_path, b"precious", "victim")
    link = tmp_path / "out.safetensors"
    for target in (victim, tmp_path / "nowhere", src):
        link.symlink_to(target)
        for options in ((), ("--overwrite",)):
            code, document = run_json("convert", src, link, *options)
            assert (code, error_code(document)) == (2, "FC004")
        link.unlink()
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_destination_folder_that_is_a_link(tmp_path: Path) -> None:
    src, victim = put_file(tmp_path, GOOD), put_folder(tmp_path, {"keep": b"precious"}, "victim")
    link = tmp_path / "out"
    link.symlink_to(victim)
    for spelling in (str(link), f"{link}/"):
        code, document = run_json("convert", src, spelling, "--overwrite")
        assert (code, error_code(document)) == (2, "FC004")
    assert sorted(os.listdir(victim)) == ["keep"]


@pytest.mark.parametrize("how", ["same", "dotted", "hard link", "link"])
def test_the_destination_is_the_source(how: str, tmp_path: Path) -> None:
    src = put_file(tmp_path, hm.safetensors({"a": hm.entry()}), "model.safetensors")
    spelled = tmp_path / "again.safetensors"
    if how == "hard link":
        os.link(src, spelled)
    elif how == "link":
        spelled.symlink_to(src)
    names = {"same": str(src), "dotted": f"{tmp_path}/./model.safetensors"}
    before = src.read_bytes()
    code, document = run_json("convert", src, names.get(how, str(spelled)), "--overwrite")
    assert (code, error_code(document)) == (2, "FC004" if how == "link" else "FC005")
    assert src.read_bytes() == before


def test_the_destination_folder_is_the_source_folder(tmp_path: Path) -> None:
    data = hm.safetensors({"a": hm.entry()})
    folder = put_folder(tmp_path, {"model.safetensors": data})
    for src in (folder, folder / "model.safetensors"):
        code, document = run_json("convert", src, folder, "--overwrite")
        assert (code, error_code(document)) == (2, "FC005")
    assert (folder / "model.safetensors").read_bytes() == data


def test_files_beside_the_weights_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    put_file(tmp_path, b"secret", "secret.json")
    folder = put_folder(tmp_path, {"model.safetensors": hm.safetensors({"a": hm.entry()})})
    (folder / "config.json").symlink_to("../secret.json")
    before = sorted(tmp_path.iterdir())
    code, document = run_json("convert", folder, tmp_path / "out")
    assert (code, error_code(document)) == (2, "FC503")
    assert sorted(tmp_path.iterdir()) == before


# -- a source that changes


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def _rewrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(hm.WEIGHT)] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def _replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def _truncate(path: Path) -> None:
    os.truncate(path, 40)


@pytest.mark.parametrize("change", [_append, _rewrite, _replace, _truncate, Path.unlink])
@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_a_source_that_changes_under_the_copy(
    change: Callable[[Path], None],
    verify: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = GOOD if kind == "torch" else hm.safetensors({"a": hm.entry()})
    src, out = put_file(tmp_path, data, "source"), tmp_path / "out"
    out.mkdir()
    read_into, changed = FileSource.read_into, []

    def read_then_change(self: FileSource, offset: int, buffer: memoryview) -> None:
        read_into(self, offset, buffer)
        if not changed and self.path == str(src):
            changed.append(offset)
            change(src)

    monkeypatch.setattr(FileSource, "read_into", read_then_change)
    code, document = run_json("convert", src, out / "model.pt", verify)
    assert changed
    assert code == 2
    assert error_code(document) in {"FC007", "FC102", "FC105", "FC301"}
    assert os.listdir(out) == []


# -- truncation


def _torch_written() -> dict[str, bytes]:
    import io

    import numpy
    import torch
    from safetensors.torch import save

    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.int64)}
    modern, legacy, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(state, modern)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    numpy.savez(arrays, **{name: value.numpy() for name, value in state.items()})
    return {
        "zip": modern.getvalue(),
        "legacy": legacy.getvalue(),
        "safetensors": save(state, {"format": "pt"}),
        "npz": arrays.getvalue(),
    }


def _boundaries(kind: str, data: bytes) -> list[int]:
    """Every offset where one part of the structure ends and another begins, and its neighbours."""
    found = {0, 1, 4, 8, len(data)}
    if kind in ("zip", "npz"):
        for magic in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\7\x08", b"\x93NUMPY"):
            at = data.find(magic)
            while at >= 0:
                found |= {at, at + 4, at + 26, at + 30, at + 46}
                at = data.find(magic, at + 1)
        found |= {len(data) - n for n in (22, 12, 10, 8, 6, 4, 2)}
    elif kind == "legacy":
        at = data.find(b".\x80\x02")
        while at >= 0:
            found |= {at, at + 1, at + 3}
            at = data.find(b".\x80\x02", at + 1)
        found |= {len(data) - n for n in (4, 8, 12, 16, 24, 32, 33)}
    else:
        (length,) = struct.unpack_from("<Q", data)
        found |= {9, 8 + length // 2, 8 + length}
    near = {at + step for at in found for step in (-1, 0, 1)}
    return sorted(at for at in near if 0 <= at < len(data))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
def test_truncation_at_every_boundary(kind: str, tmp_path: Path) -> None:
    data = _torch_written()[kind]
    whole = put_file(tmp_path, data, "whole")
    assert len(converted(whole)) == 2
    out = tmp_path / "out"
    out.mkdir()
    for length in _boundaries(kind, data):
        path = put_file(tmp_path, data[:length], "cut")
        for argv in (("inspect", path), ("convert", path, out / "model.safetensors")):
            code, document = run_json(*argv)
            assert code == 2, length
            assert error_code(document) in {"FC001", "FC101", "FC102", "FC110", "FC112"}, length
        assert os.listdir(out) == []


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
def test_truncation_anywhere(kind: str, tmp_path: Path) -> None:
    data = _torch_written()[kind]
    for length in range(0, len(data), 1 if len(data) < 2000 else 7):
        path = put_file(tmp_path, data[:length], "cut")
        with pytest.raises(CkptError) as caught:
            open_checkpoint(str(path))
        assert caught.value.code in {"FC001", "FC101", "FC102", "FC110", "FC112"}, length


# -- bits that look odd


def test_bits_of_odd_floats_are_kept(tmp_path: Path) -> None:
    bits = [0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x807FFFFF]
    data = struct.pack("<8I", *bits)
    store = hm.storage(numel=8)
    body = hm.mapping([("weight", hm.tensor(store, shape=(8,), strides=(1,)))])
    path = put_file(tmp_path, hm.torch_zip(body, {"0": data}))
    assert converted(path) == {"weight": ("F32", [8], data)}


def test_bools_that_are_neither_zero_nor_one_are_kept_and_reported(tmp_path: Path) -> None:
    store = hm.storage(numel=6, kind="BoolStorage")
    body = hm.mapping([("mask", hm.tensor(store, shape=(6,), strides=(1,)))])
    data = bytes([0, 1, 2, 255, 1, 0])
    path = put_file(tmp_path, hm.torch_zip(body, {"0": data}))
    destination = tmp_path / "out.safetensors"
    code, document = run_json("convert", path, destination)
    assert code == 0
    (finding,) = [one for one in document["findings"] if one["code"] == "FC308"]
    assert finding["key"] == "mask"
    assert "2 BOOL bytes" in finding["detail"]
    assert read_back(destination)["mask"][2] == data


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_lazy_views_are_refused(bit: str, tmp_path: Path) -> None:
    store = hm.storage(numel=2, kind="ComplexFloatStorage")
    for value, code in ((b"\x88", "FC306"), (b"\x89", None)):
        lazy = hm.tensor(store, shape=(2,), strides=(1,), rest=[hm.mapping([(bit, value)])])
        path = put_file(tmp_path, hm.torch_zip(hm.mapping([("z", lazy)])), f"{value.hex()}.pt")
        if code:
            assert bit in refused(path, code)
        else:
            assert converted(path) == {"z": ("C64", [2], hm.WEIGHT)}


# -- tensors that share bytes


def test_tied_tensors_are_stored_once_and_recorded(tmp_path: Path) -> None:
    path = put_file(tmp_path, hm.torch_zip(hm.state_dict(again=hm.tensor())))
    assert converted(path) == {"weight": ("F32", [2, 2], hm.WEIGHT)}
    document = inspected(tmp_path / "good-model.pt.safetensors")
    assert document["tied"] == [["weight", "again"]]


def test_views_that_overlap_in_part_both_survive(tmp_path: Path) -> None:
    halves = {
        name: hm.tensor(shape=(3,), strides=(1,), offset=at) for name, at in (("a", 0), ("b", 1))
    }
    path = put_file(tmp_path, hm.torch_zip(hm.mapping(halves.items())))
    destination = tmp_path / "out.safetensors"
    code, document = run_json("convert", path, destination)
    assert code == 0
    written = read_back(destination)
    assert written == {"a": ("F32", [3], hm.WEIGHT[:12]), "b": ("F32", [3], hm.WEIGHT[4:])}
    assert "FC211" in finding_codes(document), "that they no longer share is said"


# -- kinds of tensors, names and wrappers


def _kinds() -> dict[str, Callable[[], Any]]:
    import torch

    return {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "sparse ": lambda: torch.eye(3).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "quantized ": lambda: torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8
        ),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": lambda: torch.ones(3, device="meta"),
        "conj": lambda: torch.ones(2, dtype=torch.complex64).conj(),
        "neg": lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
    }


@pytest.mark.parametrize(
    "kind",
    ["sparse", "sparse ", "quantized", "quantized ", "nested", "meta", "conj", "neg"],
)
def test_tensors_that_are_not_dense_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that these kinds are on their way in or out
        torch.save({"plain": torch.ones(1), "odd.one": _kinds()[kind]()}, path)
    text = refused(path, "FC306")
    assert "odd.one" in text
    assert kind.strip() in text


@pytest.mark.parametrize(
    "name",
    ["_flat_param", "layers.0._flat_param", "_fsdp_wrapped_module.flat_param", "flat_param_3"],
)
def test_flat_parameters_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = put_file(tmp_path, hm.torch_zip(hm.state_dict(**{name: hm.tensor()})))
    assert name in refused(path, "FC208", inspect=False)
    assert list(converted(path, "--exclude", name)) == ["weight"]


def test_two_names_that_become_one(tmp_path: Path) -> None:
    pairs = [("weight", hm.tensor()), ("module._orig_mod.weight", hm.tensor(hm.storage("1")))]
    storages = {"0": hm.WEIGHT, "1": hm.WEIGHT}
    path = put_file(tmp_path, hm.torch_zip(hm.mapping(pairs), storages))
    text = refused(path, "FC202", inspect=False)
    assert "`module._orig_mod.weight`" in text
    assert len(converted(path, "--keep-prefix")) == 2
    same = put_file(
        tmp_path, hm.torch_zip(hm.mapping([pairs[0], ("module.weight", hm.tensor())])), "same.pt"
    )
    assert list(converted(same)) == ["weight"]


@pytest.mark.parametrize(
    "body",
    [
        hm.mapping([("netA", hm.state_dict()), ("netB", hm.state_dict())]),
        hm.mapping([("ema", hm.state_dict()), ("model_ema", hm.state_dict())]),
        hm.listing(hm.state_dict(), hm.state_dict()),
        hm.mapping([("weight", hm.tensor()), ("encoder", hm.state_dict())]),
    ],
)
def test_weights_that_could_be_two_things(body: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.torch_zip(body)), "FC207")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (hm.mapping([]), "FC201"),
        (b"N", "FC201"),
        (hm.mapping([("epoch", hm.number(3))]), "FC201"),
        (hm.mapping([("optimizer", hm.mapping([("state", hm.state_dict())]))]), "FC201"),
        (hm.mapping([(hm.number(1), hm.tensor())]), "FC201"),
        (hm.mapping([("w", hm.tensor()), ("w", hm.tensor(hm.storage("1")))]), "FC104"),
        (hm.mapping([("w", hm.tensor()), (hm.number(3), hm.tensor())]), "FC110"),
    ],
)
def test_pickles_without_usable_weights(body: bytes, code: str, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.torch_zip(body, {"0": hm.WEIGHT, "1": hm.WEIGHT})), code)
