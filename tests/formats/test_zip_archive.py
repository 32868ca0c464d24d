"""The zip reader and the zip layout: zip64 of every kind, without writing gigabytes."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.serialization import config

from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.formats.layout import FileLayout, OutTensor
from flamingo_ckpt.formats.npz import layout_npz
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.formats.torch_writer import layout_torch
from flamingo_ckpt.formats.zip_archive import ZipArchive
from flamingo_ckpt.tensors import DTYPES
from tests.support import MemorySource, cli, cli_ok, facts_at, load_torch, torch_facts

_MASK = 0xFFFFFFFF


def forced_zip64(records: dict[str, bytes], *, descriptors: bool) -> bytes:
    """An archive where every size and offset stands in a zip64 field although none needs it."""
    out, central = io.BytesIO(), io.BytesIO()
    for name, data in records.items():
        encoded, crc, at = name.encode(), zlib.crc32(data), out.tell()
        flags = 0x0808 if descriptors else 0x0800
        shown = (0, 0, 0) if descriptors else (crc, _MASK, _MASK)
        extra = b"" if descriptors else struct.pack("<HHQQ", 1, 16, len(data), len(data))
        out.write(
            struct.pack(
                "<4sHHHHHIIIHH", b"PK\3\4", 45, flags, 0, 0, 0x21, *shown, len(encoded), len(extra)
            )
        )
        out.write(encoded + extra + data)
        if descriptors:
            out.write(struct.pack("<4sIQQ", b"PK\7\x08", crc, len(data), len(data)))
        wide = struct.pack("<HHQQQ", 1, 24, len(data), len(data), at)
        central.write(
            struct.pack("<4sHHHHHHIII", b"PK\1\2", 45, 45, flags, 0, 0, 0x21, crc, _MASK, _MASK)
        )
        central.write(struct.pack("<HHHHHII", len(encoded), len(wide), 0, 0, 0, 0, _MASK))
        central.write(encoded + wide)
    begin, directory = out.tell(), central.getvalue()
    out.write(directory)
    end64 = out.tell()
    count, length = len(records), len(directory)
    out.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, begin))
    out.write(struct.pack("<4sIQI", b"PK\6\7", 0, end64, 1))
    out.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _MASK, _MASK, 0))
    return out.getvalue()


@pytest.mark.parametrize("descriptors", [False, True])
def test_forced_zip64_records(descriptors: bool, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(6)}
    torch.save(tensors, tmp_path / "src.pt")
    with zipfile.ZipFile(tmp_path / "src.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "wide.pt").write_bytes(forced_zip64(records, descriptors=descriptors))
    with zipfile.ZipFile(tmp_path / "wide.pt") as archive:
        assert archive.testzip() is None
    assert facts_at(tmp_path / "wide.pt") == torch_facts(tensors)
    cli_ok("inspect", tmp_path / "wide.pt")
    cli_ok("convert", tmp_path / "wide.pt", tmp_path / "a.safetensors")


def test_a_file_of_torch_beyond_four_gibibytes(tmp_path: Path) -> None:
    """`skip_data` leaves holes where the payloads would be: five gibibytes that take no space."""
    src = tmp_path / "src.pt"
    tensors = {"large": torch.empty(5 << 30, dtype=torch.uint8), "after": torch.arange(40)}
    with torch.serialization.skip_data():
        torch.save(tensors, src)
    places = torch.load(src, weights_only=True, map_location="meta")
    offset = places["after"].untyped_storage()._checkpoint_offset
    assert offset > 5 << 30
    with open(src, "r+b") as file:
        os.pwrite(file.fileno(), tensors["after"].numpy().tobytes(), offset)
    document = cli_ok("inspect", src, "--json").document
    assert document["summary"]["num_bytes"] == (5 << 30) + 320
    cli_ok("convert", src, tmp_path / "a.safetensors", "--include", "after")
    assert facts_at(tmp_path / "a.safetensors") == torch_facts({"after": tensors["after"]})
    src.unlink()


def write_sparse(layout: FileLayout, path: Path, data: dict[str, bytes]) -> None:
    """The file of a layout, with holes for the tensors that `data` lacks."""
    checksums = dict.fromkeys(layout.offsets, 1) | {n: zlib.crc32(d) for n, d in data.items()}
    with open(path, "wb") as file:
        file.truncate(layout.num_bytes)
        for name, content in data.items():
            os.pwrite(file.fileno(), content, layout.offsets[name])
        for offset, content in layout.finish(checksums):
            os.pwrite(file.fileno(), content, offset)


def test_our_layout_beyond_four_gibibytes_is_read_by_torch_and_by_us(tmp_path: Path) -> None:
    small = torch.arange(30, dtype=torch.float32)
    outs = [
        OutTensor(name="wide", dtype=DTYPES["U8"], shape=(5 << 30,), num_bytes=5 << 30),
        OutTensor(name="late", dtype=DTYPES["F32"], shape=(5, 6), num_bytes=120, aliases=("tie",)),
    ]
    path = tmp_path / "dst.pt"
    write_sparse(layout_torch("dst.pt", outs), path, {"late": small.numpy().tobytes()})
    archive = ZipArchive(FileSource(str(path)))
    archive.check()
    with zipfile.ZipFile(path) as theirs:
        assert [info.filename for info in theirs.infolist()] == list(archive.entries)
        assert theirs.getinfo("dst/data/0").file_size == 5 << 30
        assert theirs.read("dst/data/1") == small.numpy().tobytes()
    loaded = load_torch(path, mmap=True)
    assert loaded["wide"].shape == (5 << 30,)
    assert torch.equal(loaded["late"], small.reshape(5, 6))
    assert loaded["tie"].data_ptr() == loaded["late"].data_ptr()
    manifest = open_checkpoint(str(path))
    assert manifest.by_name()["wide"].num_bytes == 5 << 30
    path.unlink()


def test_our_npz_layout_beyond_four_gibibytes(tmp_path: Path) -> None:
    outs = [
        OutTensor(name="wide", dtype=DTYPES["U8"], shape=(5 << 30,), num_bytes=5 << 30),
        OutTensor(name="late", dtype=DTYPES["I64"], shape=(4,), num_bytes=32),
    ]
    late = numpy.arange(4)
    path = tmp_path / "dst.npz"
    write_sparse(layout_npz("dst.npz", outs), path, {"late": late.tobytes()})
    with numpy.load(path) as loaded:
        assert numpy.array_equal(loaded["late"], late)
    assert open_checkpoint(str(path)).by_name()["wide"].shape == (5 << 30,)
    path.unlink()


def test_many_records_need_zip64_counts(tmp_path: Path) -> None:
    names = [f"t{index}" for index in range(70_000)]
    outs = [OutTensor(name=n, dtype=DTYPES["U8"], shape=(1,), num_bytes=1) for n in names]
    path = tmp_path / "dst.npz"
    layout = layout_npz("dst.npz", outs)
    write_sparse(layout, path, {})
    with zipfile.ZipFile(path) as theirs:
        assert len(theirs.infolist()) == 70_000
    assert len(ZipArchive(FileSource(str(path))).entries) == 70_000


def rezipped(method: int, *, descriptors: bool = False) -> bytes:
    """What Python's own writer makes, streaming (with descriptors) or not."""

    class Unseekable(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    target: io.BytesIO | Unseekable = Unseekable() if descriptors else io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.writestr("a/one", b"1" * 500)
        archive.writestr("a/two", bytes(range(256)))
    return bytes(target.data) if isinstance(target, Unseekable) else target.getvalue()


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_of_the_standard_library(method: int, descriptors: bool) -> None:
    archive = ZipArchive(MemorySource(rezipped(method, descriptors=descriptors)))
    archive.check()
    assert archive.read("a/one", 1000) == b"1" * 500
    assert archive.read("a/two", 1000) == bytes(range(256))


def test_inflated_records_can_be_read_in_any_order() -> None:
    archive = ZipArchive(MemorySource(rezipped(zipfile.ZIP_DEFLATED)))
    source, offset = archive.locate("a/two")
    wanted = bytes(range(256))
    for begin, size in ((200, 56), (0, 10), (250, 6), (5, 251), (0, 256)):
        assert source.read(offset + begin, size) == wanted[begin : begin + size]


def test_large_deflated_tensors_are_read_in_bounded_steps(tmp_path: Path) -> None:
    values = torch.randint(0, 9, (3_000_000,), dtype=torch.int32)
    tensors = {"w": values, "view": values[::2]}
    torch.save(tensors, tmp_path / "src.pt")
    with (
        zipfile.ZipFile(tmp_path / "src.pt") as old,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    outcome = cli("convert", tmp_path / "small.pt", tmp_path / "a.safetensors", "--json")
    assert outcome.code == 0
    assert facts_at(tmp_path / "a.safetensors") == torch_facts(tensors)


def test_records_without_a_checksum_are_said(tmp_path: Path) -> None:
    tensors = {"w": torch.rand(1000)}
    before = config.save.compute_crc32
    config.save.compute_crc32 = False
    try:
        torch.save(tensors, tmp_path / "without.pt")
    finally:
        config.save.compute_crc32 = before
    torch.save(tensors, tmp_path / "with.pt")
    for name, codes in (("without.pt", ["FC114"]), ("with.pt", [])):
        outcome = cli_ok("convert", tmp_path / name, tmp_path / f"{name}.safetensors", "--json")
        assert outcome.codes == codes
        assert cli_ok("inspect", tmp_path / name, "--json").codes == codes
        assert facts_at(tmp_path / f"{name}.safetensors") == torch_facts(tensors)


def packed_again(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A torch file whose records somebody deflated."""
    torch.save(tensors, tmp_path / "stored.pt")
    path = tmp_path / "deflated.pt"
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    return path


def test_zeros_among_weights_are_no_bomb(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"zeros": torch.zeros(3 << 20), "weights": torch.rand(20_000)}
    path = packed_again(tensors, tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert any(one.file_size > 900 * one.compress_size for one in archive.infolist())
    assert facts_at(path) == torch_facts(tensors)


def test_nothing_but_zeros_is_one(tmp_path: Path) -> None:
    path = packed_again({"zeros": torch.zeros(4 << 20)}, tmp_path)
    outcome = cli("inspect", path, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC109"])
