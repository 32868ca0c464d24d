"""numpy files, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from tests.support import FIXTURES, Facts, cli, cli_ok, facts_at, random_tensor, torch_facts

CODES = {
    "b1": "BOOL",
    "i1": "I8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "u1": "U8",
    "u2": "U16",
    "u4": "U32",
    "u8": "U64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
    "c8": "C64",
    "c16": "C128",
}


def numpy_facts(array: numpy.ndarray) -> Facts:
    """The oracle: logical bytes, little-endian, row-major."""
    plain = numpy.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return Facts(CODES[array.dtype.str[1:]], array.shape, plain.tobytes())


def random_array(code: str, shape: tuple[int, ...], seed: int = 0) -> numpy.ndarray:
    rng = numpy.random.default_rng(seed)
    dtype = numpy.dtype(code)
    raw = rng.integers(0, 256, size=int(numpy.prod(shape)) * dtype.itemsize, dtype="u1")
    if dtype.kind == "b":
        raw %= 2
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("code", CODES)
def test_every_dtype_in_both_byte_orders(code: str, order: str, tmp_path: Path) -> None:
    arrays = {
        "plain": random_array(order + code, (3, 4)),
        "fortran": numpy.asfortranarray(random_array(order + code, (3, 4, 2), 1)),
        "scalar": random_array(order + code, (), 2),
        "empty": random_array(order + code, (0, 3), 3),
        "line": numpy.asfortranarray(random_array(order + code, (1, 5), 4)),
    }
    numpy.savez(tmp_path / "src.npz", **arrays)
    oracle = {name: numpy_facts(array) for name, array in arrays.items()}
    assert facts_at(tmp_path / "src.npz") == oracle
    cli_ok("convert", tmp_path / "src.npz", tmp_path / "dst.npz")
    with numpy.load(tmp_path / "dst.npz") as loaded:
        assert {name: numpy_facts(loaded[name]) for name in loaded} == oracle


@pytest.mark.parametrize("name", ["arrays.npz", "arrays-compressed.npz"])
def test_fixtures_to_every_format_and_back(name: str, tmp_path: Path) -> None:
    with numpy.load(FIXTURES / name) as loaded:
        oracle = {key: numpy_facts(loaded[key]) for key in loaded}
    assert facts_at(FIXTURES / name) == oracle
    previous = FIXTURES / name
    for suffix in (".safetensors", ".pt", ".npz"):
        cli_ok("convert", previous, tmp_path / f"a{suffix}")
        previous = tmp_path / f"a{suffix}"
        assert facts_at(previous) == oracle
    with numpy.load(previous) as loaded:
        assert {key: numpy_facts(loaded[key]) for key in loaded} == oracle


@pytest.mark.parametrize("name", ["fortran.npy", "big-endian.npy"])
def test_single_arrays(name: str, tmp_path: Path) -> None:
    oracle = {"arr_0": numpy_facts(numpy.load(FIXTURES / name))}
    assert facts_at(FIXTURES / name) == oracle
    cli_ok("convert", FIXTURES / name, tmp_path / "a.safetensors")
    assert facts_at(tmp_path / "a.safetensors") == oracle


def test_bfloat16_needs_the_flag_both_ways(tmp_path: Path) -> None:
    tensors = {"w": random_tensor(torch.bfloat16, (3, 4)), "b": torch.ones(2)}
    torch.save(tensors, tmp_path / "src.pt")
    refused = cli("convert", tmp_path / "src.pt", tmp_path / "a.npz", "--json")
    assert (refused.code, refused.codes) == (2, ["FC305"])
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "a.npz", "--npy-bfloat16")
    with numpy.load(tmp_path / "a.npz") as loaded:
        assert loaded["w"].dtype == numpy.dtype("V2")
        assert loaded["w"].tobytes() == torch_facts(tensors)["w"].data
    assert cli("inspect", tmp_path / "a.npz", "--json").codes == ["FC206"]
    cli_ok("convert", tmp_path / "a.npz", tmp_path / "b.safetensors", "--npy-bfloat16")
    assert facts_at(tmp_path / "b.safetensors") == torch_facts(tensors)
    cli_ok("verify", tmp_path / "src.pt", tmp_path / "a.npz", "--npy-bfloat16")


def test_tied_names_each_get_their_copy(tmp_path: Path) -> None:
    weight = random_tensor(torch.float32, (20, 30))
    torch.save({"a": weight, "b": weight, "c": torch.ones(3)}, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "a.npz")
    with numpy.load(tmp_path / "a.npz") as loaded:
        assert loaded["a"].tobytes() == loaded["b"].tobytes() == weight.numpy().tobytes()
    cli_ok("verify", tmp_path / "src.pt", tmp_path / "a.npz")


def test_dtypes_without_a_numpy_code_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "src.pt")
    outcome = cli("convert", tmp_path / "src.pt", tmp_path / "a.npz", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC305"])
    assert outcome.document["findings"][0]["key"] == "w"


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "a.npz", bad=numpy.array([{"a": 1}], dtype=object))
    assert cli("inspect", tmp_path / "a.npz", "--json").codes == ["FC501"]
    fields = numpy.zeros(2, dtype=[("x", "<f4"), ("y", "O")])
    numpy.save(tmp_path / "b.npy", fields, allow_pickle=True)
    assert cli("inspect", tmp_path / "b.npy", "--json").codes == ["FC501"]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    array = random_array("<f4", (40,))
    numpy.savez(tmp_path / "a.npz", w=array)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(array.tobytes()) + 5] ^= 4
    (tmp_path / "a.npz").write_bytes(data)
    outcome = cli("convert", tmp_path / "a.npz", tmp_path / "dst.safetensors", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC105"])
