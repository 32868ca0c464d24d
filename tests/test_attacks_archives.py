"""Archives in which two readers would see two things, containers under a wrong name, bombs."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from fixtures import handmade as hm
from flamingo_ckpt.formats import open_checkpoint
from tests.attacks_support import (
    Leaves,
    converted,
    finding_codes,
    inspected,
    put_file,
    refused,
    run_verb,
)
from tests.test_attacks_limits import peak_bytes

BODY = hm.state_dict()
GOOD = {"weight": ("F32", [2, 2], hm.WEIGHT)}


def _records() -> list[hm.Record]:
    return hm.torch_records(BODY)


def test_the_archive_that_all_of_these_are_made_from_is_good(tmp_path: Path) -> None:
    assert converted(put_file(tmp_path, hm.zipped(_records()))) == GOOD


# -- central directory against local header


@pytest.mark.parametrize("which", range(4), ids=["pickle", "byteorder", "storage", "version"])
@pytest.mark.parametrize(
    "lie",
    [
        {"local_name": "m/other.pk"},
        {"local_flags": 0x0801},
        {"local_flags": 0x0000},
        {"local_crc": 1},
        {"local_num_bytes": 3},
        {"flags": 0x0801},
        {"flags": 0x0820},
        {"flags": 0x0840},
        {"flags": 0x2800},
        {"method": 12},
        {"method": 99},
        {"num_bytes": 3},
        {"stored_bytes": 1 << 20},
        {"header_offset": 7},
        {"header_offset": 1 << 30},
        {"claimed_extra": 1},
        {"claimed_extra": 4},
        {"claimed_extra": 60_000},
    ],
    ids=str,
)
def test_a_record_that_is_described_in_two_ways(
    which: int, lie: dict[str, object], tmp_path: Path
) -> None:
    records = _records()
    records[which] = replace(records[which], **lie)  # type: ignore[arg-type]
    path = put_file(tmp_path, hm.zipped(records))
    refused(path, {"FC102", "FC103", "FC106", "FC110"})


def test_a_wrong_checksum_of_the_pickle(tmp_path: Path) -> None:
    first, *rest = _records()
    refused(put_file(tmp_path, hm.zipped([replace(first, crc=7), *rest])), "FC105")


@pytest.mark.parametrize("bit", range(0, 128, 9))
def test_any_flipped_bit_of_a_storage_stops_the_conversion(bit: int, tmp_path: Path) -> None:
    data = bytearray(hm.WEIGHT)
    data[bit // 8] ^= 1 << bit % 8
    records = _records()
    records[2] = replace(records[2], stored=bytes(data))
    refused(put_file(tmp_path, hm.zipped(records)), "FC105", inspect=False)


def test_a_flipped_bit_in_a_part_of_the_storage_that_no_tensor_uses(tmp_path: Path) -> None:
    part = hm.tensor(shape=(2,), strides=(1,))
    records = hm.torch_records(hm.mapping([("weight", part)]))
    records[2] = replace(records[2], stored=hm.WEIGHT[:12] + b"\1\2\3\4")
    refused(put_file(tmp_path, hm.zipped(records)), "FC105", inspect=False)


def test_a_checksum_of_zero_was_never_computed(tmp_path: Path) -> None:
    records = [replace(record, crc=0) for record in _records()]
    assert converted(put_file(tmp_path, hm.zipped(records))) == GOOD


@pytest.mark.parametrize("which", range(4))
def test_duplicate_records(which: int, tmp_path: Path) -> None:
    records = _records()
    twice = [*records, replace(records[which], data=bytes(len(records[which].data)))]
    refused(put_file(tmp_path, hm.zipped(twice)), "FC104")


def test_overlapping_records(tmp_path: Path) -> None:
    body = hm.state_dict(other=hm.tensor(hm.storage("1")))
    records = hm.torch_records(body, {"0": hm.WEIGHT, "1": hm.WEIGHT})
    whole = hm.zipped(records)
    for begin in (whole.index(b"m/data/0") - 30, whole.index(b"m/data/0") - 20, 0):
        shifted = [*records[:3], replace(records[3], header_offset=begin), records[4]]
        path = put_file(tmp_path, hm.zipped(shifted), f"at-{begin}.pt")
        refused(path, {"FC103", "FC106"})


def test_a_header_inside_a_payload_is_no_record(tmp_path: Path) -> None:
    """A second `data.pkl` hidden in a storage: only what the directory lists exists."""
    payload = Leaves(tmp_path)
    hidden = hm.zipped([hm.Record(name="m/data.pkl", data=hm.pickled(payload.opcodes()))])
    data = hidden[: hidden.index(b"PK\1\2")]
    data += bytes(-len(data) % 4)
    count = len(data) // 4
    store = hm.storage(numel=count)
    body = hm.mapping([("weight", hm.tensor(store, shape=(count,), strides=(1,)))])
    path = put_file(tmp_path, hm.torch_zip(body, {"0": data}))
    assert converted(path)["weight"][2] == data
    assert not payload.mark.exists()


@pytest.mark.parametrize(
    "tail", [b"\0", b"#!/bin/sh\n", b"PK\5\6" + bytes(18), b"PK\5\6" + bytes(10)]
)
def test_bytes_behind_the_archive(tail: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.zipped(_records(), tail=tail)), {"FC102", "FC103", "FC106"})


@pytest.mark.parametrize("front", [b"\0" * 64, b"#!/bin/sh\n", b"PK\3\4" + bytes(26)])
def test_bytes_before_the_archive(front: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, front + hm.zipped(_records())), {"FC001", "FC103", "FC106"})


@pytest.mark.parametrize("count", [0, 1, 3, 5, 0xFFFF])
def test_another_number_of_records(count: int, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.zipped(_records(), count=count)), {"FC103", "FC106"})


# -- what is compressed


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def _torch_of(data: bytes, **storage: object) -> bytes:
    count = len(data) // 4
    store = hm.storage(numel=count)
    body = hm.mapping([("weight", hm.tensor(store, shape=(count,), strides=(1,)))])
    records = hm.torch_records(body, {"0": data})
    records[2] = replace(records[2], **storage)  # type: ignore[arg-type]
    return hm.zipped(records)


def test_a_bomb_in_a_storage(tmp_path: Path) -> None:
    """64 MiB of zeros in 64 kB: more than trained weights ever shrink."""
    zeros = bytes(64 << 20)
    data = _torch_of(zeros, method=8, stored=_deflated(zeros))
    assert len(data) < 70_000
    path = put_file(tmp_path, data)
    refused(path, "FC109")
    assert peak_bytes(lambda: run_verb("inspect", path)) < 4 << 20


def test_a_bomb_in_an_npz(tmp_path: Path) -> None:
    held = io.BytesIO()
    numpy.savez_compressed(held, zeros=numpy.zeros(16 << 20, dtype="f4"))
    assert len(held.getvalue()) < 70_000
    refused(put_file(tmp_path, held.getvalue(), "zeros.npz"), "FC109")


@pytest.mark.parametrize("claimed", [16 - 4, 16 + 4])
def test_a_deflated_storage_of_another_length(claimed: int, tmp_path: Path) -> None:
    data = _torch_of(hm.WEIGHT, method=8, stored=_deflated(hm.WEIGHT), num_bytes=claimed)
    refused(put_file(tmp_path, data), "FC103")
    count = claimed // 4
    body = hm.mapping(
        [("weight", hm.tensor(hm.storage(numel=count), shape=(count,), strides=(1,)))]
    )
    records = hm.torch_records(body)
    records[2] = replace(records[2], method=8, stored=_deflated(hm.WEIGHT), num_bytes=claimed)
    path = put_file(tmp_path, hm.zipped(records), "fitting.pt")
    refused(path, {"FC102", "FC105"}, inspect=False)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda raw: b"\xff" * len(raw)])
def test_a_deflated_storage_that_is_damaged(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    data = _torch_of(hm.WEIGHT, method=8, stored=damage(_deflated(hm.WEIGHT)))
    refused(put_file(tmp_path, data), {"FC102", "FC105"}, inspect=False)


def test_a_deflated_pickle_that_inflates_to_more_than_it_says(tmp_path: Path) -> None:
    first, *rest = _records()
    more = first.data + bytes(1 << 20)
    lying = replace(first, method=8, stored=_deflated(more))
    refused(put_file(tmp_path, hm.zipped([lying, *rest])), {"FC102", "FC105"})


# -- numpy


def _object_array() -> bytes:
    held = io.BytesIO()
    numpy.save(held, numpy.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    return held.getvalue()


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (_object_array(), {"FC501"}),
        (hm.npy("'O'", "(1,)"), {"FC501", "FC306"}),
        (hm.npy("[('a', '|O')]", "(1,)"), {"FC501", "FC306"}),
        (hm.npy("[('a', [('b', '<f4'), ('c', '|O')])]", "(1,)"), {"FC501", "FC306"}),
        (hm.npy("('|O', (2,))", "(1,)"), {"FC501", "FC306", "FC101"}),
        (hm.npy("[('a', '<f4')]", "(4,)"), {"FC306"}),
        (hm.npy(shape=f"({1 << 40},)"), {"FC102"}),
        (hm.npy(shape=f"({1 << 62}, {1 << 62})"), {"FC101", "FC102"}),
        (hm.npy(shape="(-1,)"), {"FC101"}),
        (hm.npy(shape="(True, 4)"), {"FC101"}),
        (hm.npy(shape="(2.0, 2)"), {"FC101"}),
        (hm.npy(shape="(3,)"), {"FC103"}),
        (hm.npy_raw("{[]: 1}"), {"FC101"}),
        (hm.npy_raw("__import__('os').system('true')"), {"FC101"}),
        (hm.npy_raw("-" * 9000 + "1"), {"FC101"}),
        (hm.npy_raw("(" * 9000), {"FC101"}),
        (hm.npy_raw("{'descr': '<f4', 'fortran_order': False, 'shape': ()} + 1"), {"FC101"}),
        (hm.npy_raw("{'descr':'<f4','descr':'|O','fortran_order':False,'shape':(4,)}"), {"FC101"}),
        (hm.npy_raw(" " * 10_001), {"FC101", "FC111"}),
        (b"\x93NUMPY\x01\x00\xff\xff", {"FC102", "FC111"}),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", {"FC102", "FC111"}),
        (b"\x93NUMPY\x09\x00\x00\x00", {"FC112"}),
    ],
)  # fmt: skip
def test_hostile_arrays(data: bytes, codes: set[str], tmp_path: Path) -> None:
    refused(put_file(tmp_path, data, "one.npy"), codes)
    refused(put_file(tmp_path, hm.npz({"good": hm.npy(), "bad": data}), "two.npz"), codes)


# -- containers by content


@pytest.mark.parametrize("descr", ["'<U4'", "'|S16'", "'<M8[s]'", "'|V3'"])
def test_arrays_that_are_no_numbers(descr: str, tmp_path: Path) -> None:
    width = {"'<U4'": 16, "'|S16'": 16, "'<M8[s]'": 8, "'|V3'": 3}[descr]
    path = put_file(tmp_path, hm.npy(descr, "(1,)", bytes(width)), "one.npy")
    refused(path, {"FC201", "FC306"}, inspect=False)


def _nested(make: Callable[[io.BytesIO], None]) -> bytes:
    held = io.BytesIO()
    make(held)
    return held.getvalue()


def _tar(held: io.BytesIO) -> None:
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"\x80\x02N."))


def _zip_of_torch(held: io.BytesIO) -> None:
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("inner/model.pt", hm.zipped(_records()))


CONTAINERS = {
    "7z": b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24),
    "gzip": gzip.compress(b"\x80\x02N."),
    "tar": _nested(_tar),
    "zip of a zip": _nested(_zip_of_torch),
    "empty zip": b"PK\5\6" + bytes(18),
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "web page": b"<!doctype html><html><body>401</body></html>",
    "XML": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "bare pickle": b"\x80\x04N.",
    "old pickle": b"cposix\nsystem\n(S'true'\ntR.",
    "ELF": b"\x7fELF" + bytes(60),
    "text": b"hello\n",
    "one byte": b"\x80",
    "zeros": bytes(600),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ".npz", ""])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_is_known_by_its_content(kind: str, suffix: str, tmp_path: Path) -> None:
    path = put_file(tmp_path, CONTAINERS[kind], f"model{suffix}")
    text = refused(path, {"FC001", "FC101", "FC102", "FC112"})
    if kind not in ("ELF", "text", "one byte", "zeros", "XML", "old pickle"):
        assert "hint: " in text


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".txt", ""])
def test_a_good_file_under_any_name(suffix: str, tmp_path: Path) -> None:
    assert converted(put_file(tmp_path, hm.zipped(_records()), f"model{suffix}")) == GOOD


def test_archives_with_code_and_no_weights(tmp_path: Path) -> None:
    served = {"handler.py": b"import os", "MAR-INF/MANIFEST.json": b"{}"}
    packaged = {
        "p/.data/extern_modules": b"os\n",
        "p/.data/version": b"3",
        "p/model/model.pkl": b"N.",
    }
    for name, files in (("served.mar", served), ("packaged.pt", packaged)):
        records = [hm.Record(name=inner, data=data) for inner, data in files.items()]
        refused(put_file(tmp_path, hm.zipped(records), name), {"FC001", "FC112"})


def test_code_of_torchscript_is_not_read(tmp_path: Path) -> None:
    """Its record is damaged beyond reading, and the parameters come out all the same."""
    payload = Leaves(tmp_path)
    source = f"import os\nos.system({payload.command!r})\n".encode()
    body = hm.module("Net", [("weight", hm.tensor())])
    records = [
        *hm.torch_records(body),
        hm.Record(name="m/code/__torch__.py", data=source, crc=1),
        hm.Record(name="m/constants.pkl", data=hm.pickled(payload.opcodes())),
    ]
    assert converted(put_file(tmp_path, hm.zipped(records))) == GOOD
    assert not payload.mark.exists()


# -- byte order


def test_big_endian_elements_are_swapped(tmp_path: Path) -> None:
    swapped = struct.pack(">4f", *struct.unpack("<4f", hm.WEIGHT))
    path = put_file(tmp_path, hm.torch_zip(BODY, {"0": swapped}, byteorder=b"big"))
    assert inspected(path)["details"]["byteorder"] == "big"
    assert converted(path) == GOOD


@pytest.mark.parametrize("value", [b"middle", b"", b"BIG", b"big\0", b"\xff", b"big" * 40])
def test_another_byte_order(value: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.torch_zip(BODY, byteorder=value)), {"FC110", "FC111"})


@pytest.mark.parametrize("value", [b"", b"x", b"-3", b"0", b"11", b"9" * 64, b"3" * 5000])
def test_another_version(value: bytes, tmp_path: Path) -> None:
    refused(put_file(tmp_path, hm.torch_zip(BODY, version=value)), {"FC106", "FC111", "FC112"})


def test_what_lies_unused_is_reported(tmp_path: Path) -> None:
    loose = [hm.Record(name="m/data/7", data=b"abcd"), hm.Record(name="other/x.pkl", data=b"N.")]
    path = put_file(tmp_path, hm.zipped([*_records(), *loose]))
    assert "FC113" in finding_codes(inspected(path))
    assert converted(path) == GOOD


def test_opening_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    path = put_file(tmp_path, hm.zipped(_records()))
    open_checkpoint(str(path))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        run_verb("inspect", path)
        run_verb("inspect", put_file(tmp_path, b"", "empty.pt"))
    assert len(os.listdir("/proc/self/fd")) <= before + 1
