"""safetensors: read strictly, written byte for byte as the library writes it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.formats.safetensors import build_header, read_safetensors
from flamingo_ckpt.tensors import DTYPES
from tests.formats.test_torch_zip import LOADABLE
from tests.support import (
    FIXTURES,
    MemorySource,
    cli,
    cli_ok,
    facts_at,
    facts_of,
    load_torch,
    random_tensor,
    torch_facts,
)


def many_tensors() -> dict[str, torch.Tensor]:
    """More than 200, of every dtype the library saves, with names that sort and encode oddly."""
    names = ["ß.weight", "层.0", "emoji.🦩", 'quote".x', "back\\slash", "a b", "Z", "a", "a.b", "é"]
    tensors = {}
    for number in range(220):
        dtype = LOADABLE[number % len(LOADABLE)]
        name = f"{names[number % len(names)]}.{number}"
        shape = [(3, 5), (), (0, 4), (17,), (2, 1, 3)][number % 5]
        tensors[name] = random_tensor(dtype, shape, number)
    return tensors


def test_output_is_byte_identical_to_the_library(tmp_path: Path) -> None:
    tensors = many_tensors()
    torch.save(tensors, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "ours.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_output_is_deterministic_with_metadata(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    torch.save({"b": weight, "a": weight, "c": torch.randn(3)}, tmp_path / "src.pt")
    for name in ("one", "two"):
        target = tmp_path / f"{name}.safetensors"
        cli_ok("convert", tmp_path / "src.pt", target, "--record-source")
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    with safetensors.safe_open(tmp_path / "one.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["flamingo_ckpt.aliases"]) == {"a": "b"}
    assert metadata["flamingo_ckpt.source_digest"].startswith("xxh3-128:")
    assert set(metadata["flamingo_ckpt.source_digest"][9:]) != {"0"}


def test_the_fixture_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    src = FIXTURES / "tiny.safetensors"
    oracle = torch_facts(safetensors.torch.load_file(src))
    assert facts_at(src) == oracle
    cli_ok("convert", src, tmp_path / "a.pt")
    assert torch_facts(load_torch(tmp_path / "a.pt")) == oracle
    cli_ok("convert", tmp_path / "a.pt", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == src.read_bytes()


def test_packed_four_bit_floats(tmp_path: Path) -> None:
    """safetensors counts the elements, torch the bytes that hold two of them."""
    tensors = {"w": random_tensor(torch.float4_e2m1fn_x2, (3, 4))}
    safetensors.torch.save_file(tensors, tmp_path / "src.safetensors", {"format": "pt"})
    facts = facts_at(tmp_path / "src.safetensors")
    assert facts == torch_facts(tensors)
    assert facts["w"].shape == (3, 8)
    cli_ok("convert", tmp_path / "src.safetensors", tmp_path / "a.pt")
    assert torch_facts(load_torch(tmp_path / "a.pt")) == facts
    cli_ok("convert", tmp_path / "a.pt", tmp_path / "back.safetensors")
    back = (tmp_path / "back.safetensors").read_bytes()
    assert back == (tmp_path / "src.safetensors").read_bytes()


def test_sharing_written_by_save_model_is_understood(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    )
    model[1].weight = model[0].weight
    safetensors.torch.save_model(model, str(tmp_path / "src.safetensors"), {"format": "pt"})
    cli_ok("convert", tmp_path / "src.safetensors", tmp_path / "a.pt")
    back = load_torch(tmp_path / "a.pt")
    assert torch_facts(back) == torch_facts(model.state_dict())
    assert back["0.weight"].data_ptr() == back["1.weight"].data_ptr()


def test_foreign_metadata_is_kept(tmp_path: Path) -> None:
    metadata = {"format": "pt", "author": "somebody ✓", "step": "12"}
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "src.safetensors", metadata)
    cli_ok("convert", tmp_path / "src.safetensors", tmp_path / "dst.safetensors")
    with safetensors.safe_open(tmp_path / "dst.safetensors", "pt") as opened:
        assert opened.metadata() == metadata


def test_a_missing_format_entry_is_said_and_mended(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "src.safetensors")
    assert cli("inspect", tmp_path / "src.safetensors", "--json").codes == ["FC101"]
    cli_ok("convert", tmp_path / "src.safetensors", tmp_path / "dst.safetensors")
    assert cli("inspect", tmp_path / "dst.safetensors", "--json").codes == []


def test_an_unordered_header_and_unaligned_data_are_read() -> None:
    header = (
        b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    data = struct.pack("<Q", len(header)) + header + b"\x07\x01\x02\x03\x04"
    facts = facts_of(read_safetensors(MemorySource(data)))
    assert facts["a"].data == b"\x07"
    assert facts["b"].data == b"\x01\x02\x03\x04"


def test_noncanonical_bools_are_kept_and_reported(tmp_path: Path) -> None:
    header, offsets, size = build_header([("m", DTYPES["BOOL"], (4,), 4)], {"format": "pt"})
    assert size == len(header) + 4
    assert offsets["m"] == len(header)
    (tmp_path / "src.safetensors").write_bytes(header + b"\x00\x01\x02\xff")
    outcome = cli("convert", tmp_path / "src.safetensors", tmp_path / "dst.safetensors", "--json")
    assert (outcome.code, outcome.codes) == (0, ["FC308"])
    assert facts_at(tmp_path / "dst.safetensors")["m"].data == b"\x00\x01\x02\xff"


_names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
_entries = st.dictionaries(
    _names,
    st.tuples(
        st.sampled_from([name for name, dtype in DTYPES.items() if dtype.rank and dtype.bits >= 8]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@given(
    entries=_entries,
    metadata=st.dictionaries(
        _names, st.text(st.characters(exclude_categories=("Cs",)), max_size=8), max_size=3
    ),
)
def test_any_header_we_build_is_read_by_us_and_by_the_library(
    entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    tensors = []
    for name, (dtype, shape) in entries.items():
        num_bytes = DTYPES[dtype].bits // 8
        for size in shape:
            num_bytes *= size
        tensors.append((name, DTYPES[dtype], tuple(shape), num_bytes))
    metadata = {key: value for key, value in metadata.items() if value not in entries}
    header, offsets, size = build_header(tensors, metadata)
    data = header + bytes(index % 251 for index in range(size - len(header)))
    facts = facts_of(read_safetensors(MemorySource(data)))
    theirs = dict(safetensors.deserialize(data))
    assert facts.keys() == theirs.keys() == entries.keys()
    for name, dtype, shape, num_bytes in tensors:
        assert (facts[name].dtype, facts[name].shape) == (dtype.name, shape)
        assert theirs[name]["dtype"] == dtype.name
        assert facts[name].data == bytes(theirs[name]["data"])
        assert facts[name].data == data[offsets[name] : offsets[name] + num_bytes]


@pytest.mark.parametrize("name", ["__metadata__"])
def test_the_reserved_name_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({name: torch.ones(1)}, tmp_path / "src.pt")
    outcome = cli("convert", tmp_path / "src.pt", tmp_path / "dst.safetensors", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC505"])
