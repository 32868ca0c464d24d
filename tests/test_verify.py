"""verify: every way two checkpoints can differ is found, named, and placed."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ckpt.formats import extract, open_checkpoint
from flamingo_ckpt.plan import make_plan
from flamingo_ckpt.selection import PlanOptions
from flamingo_ckpt.verify import verify
from tests.support import Outcome, cli, cli_ok, facts_at

Change = Callable[[dict[str, torch.Tensor]], None]


def base() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(4, 5),
        "b": torch.randn(3, dtype=torch.float64),
        "n": torch.tensor([float("nan"), 0.0, -1.0]),
        "h": torch.randn(6).bfloat16(),
        "i": torch.arange(4),
        "m": torch.tensor([True, False]),
        "s": torch.tensor(2.5),
        "e": torch.empty(0, 3),
    }


def changed(tmp_path: Path, change: Change, *options: str) -> Outcome:
    """Verify a copy that differs by `change`."""
    torch.save(base(), tmp_path / "src.pt")
    tensors = base()
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "dst.safetensors", {"format": "pt"})
    return cli("verify", tmp_path / "src.pt", tmp_path / "dst.safetensors", "--json", *options)


def flip(name: str, index: int, bit: int) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        raw = tensors[name].reshape(-1).view(torch.uint8)
        raw[index] ^= 1 << bit

    return change


def test_equal(tmp_path: Path) -> None:
    outcome = changed(tmp_path, lambda _: None)
    assert outcome.code == 0
    assert outcome.document["verdict"] == "pass"
    assert outcome.document["summary"] == {
        "bit_exact": 8,
        "cast": 0,
        "different": 0,
        "missing": 0,
        "unexpected": 0,
    }


@pytest.mark.parametrize(
    ("name", "byte", "bit", "index"),
    [
        ("a", 0, 0, [0, 0]),
        ("a", 4 * 13 + 2, 7, [2, 3]),
        ("a", 4 * 19 + 3, 7, [3, 4]),
        ("b", 8, 0, [1]),
        ("n", 0, 0, [0]),
        ("h", 11, 3, [5]),
        ("i", 24, 1, [3]),
        ("m", 1, 0, [1]),
        ("s", 3, 0, []),
    ],
)
def test_one_flipped_bit(name: str, byte: int, bit: int, index: list[int], tmp_path: Path) -> None:
    outcome = changed(tmp_path, flip(name, byte, bit))
    (finding,) = outcome.document["findings"]
    assert (outcome.code, outcome.document["verdict"]) == (1, "fail")
    assert (finding["code"], finding["key"], finding["severity"]) == ("FC301", name, "error")
    assert finding["data"]["first_index"] == index
    assert finding["data"]["num_elements_different"] == 1
    xor = int(finding["data"]["expected_bits"], 16) ^ int(finding["data"]["found_bits"], 16)
    width = base()[name].element_size()
    assert xor == 1 << (8 * (byte % width) + bit)
    summary = outcome.document["summary"]
    assert (summary["different"], summary["bit_exact"]) == (1, 7)


def test_negative_zero_and_nan_payloads_are_bits(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        raw = struct.pack("<Iff", 0x7FC00001, -0.0, -1.0)
        tensors["n"] = torch.frombuffer(bytearray(raw), dtype=torch.float32)

    outcome = changed(tmp_path, change)
    (finding,) = outcome.document["findings"]
    assert finding["data"] == {
        "dtype": "F32",
        "num_elements_different": 2,
        "first_index": [0],
        "expected_bits": "7fc00000",
        "found_bits": "7fc00001",
        # the payload of the NaN, and the sign of the zero: which are 0 apart
        "bits_flipped": [1, *[0] * 30, 1],
        "num_not_finite": 1,
        "max_abs": 0.0,
        "max_ulp": 0,
        "ulp_histogram": [[0, 0, 1]],
    }
    assert "2 of 3 elements" in finding["detail"]


def shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"] = tensors["a"].reshape(5, 4)


def dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"] = tensors["a"].half()


def same_bits_other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a"] = tensors["a"].view(torch.int32)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["a"]


def unexpected(tensors: dict[str, torch.Tensor]) -> None:
    tensors["z"] = torch.ones(1)


def empty_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["e"] = torch.empty(3, 0)


@pytest.mark.parametrize(
    ("change", "code", "key", "count"),
    [
        (shape, "FC205", "a", "different"),
        (dtype, "FC206", "a", "different"),
        (same_bits_other_dtype, "FC206", "a", "different"),
        (missing, "FC203", "a", "missing"),
        (unexpected, "FC204", "z", "unexpected"),
        (empty_shape, "FC205", "e", "different"),
    ],
)
def test_headers(change: Change, code: str, key: str, count: str, tmp_path: Path) -> None:
    outcome = changed(tmp_path, change)
    (finding,) = outcome.document["findings"]
    assert (outcome.code, finding["code"], finding["key"]) == (1, code, key)
    assert outcome.document["summary"][count] == 1


def test_every_difference_is_its_own_finding(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        flip("a", 0, 0)(tensors)
        del tensors["b"]
        tensors["i"] = tensors["i"].int()
        unexpected(tensors)

    outcome = changed(tmp_path, change)
    found = {finding["key"]: finding["code"] for finding in outcome.document["findings"]}
    assert found == {"a": "FC301", "b": "FC203", "i": "FC206", "z": "FC204"}
    assert outcome.document["summary"] == {
        "bit_exact": 5,
        "cast": 0,
        "different": 2,
        "missing": 1,
        "unexpected": 1,
    }


def test_a_forgotten_keep_prefix_is_hinted_at(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2)}, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "dst.safetensors", "--keep-prefix")
    outcome = cli("verify", tmp_path / "src.pt", tmp_path / "dst.safetensors", "--json")
    assert outcome.code == 1
    assert "--keep-prefix" in outcome.document["findings"][0]["hint"]
    cli_ok("verify", tmp_path / "src.pt", tmp_path / "dst.safetensors", "--keep-prefix")


def test_a_cast_is_hinted_at_and_verified(tmp_path: Path) -> None:
    torch.save(base(), tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "dst.pt", "--dtype", "bfloat16")
    outcome = cli("verify", tmp_path / "src.pt", tmp_path / "dst.pt", "--json")
    assert outcome.code == 1
    assert "--dtype bfloat16" in outcome.document["findings"][0]["hint"]
    outcome = cli(
        "verify", tmp_path / "src.pt", tmp_path / "dst.pt", "--dtype", "bfloat16", "--json"
    )
    assert outcome.code == 0
    summary = outcome.document["summary"]
    assert (summary["cast"], summary["bit_exact"]) == (5, 3)


def test_a_cast_with_one_wrong_rounding_is_found(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(10)}, tmp_path / "src.pt")
    halves = torch.load(tmp_path / "src.pt")["w"].bfloat16()
    halves.view(torch.int16)[7] += 1
    torch.save({"w": halves}, tmp_path / "dst.pt")
    outcome = cli(
        "verify", tmp_path / "src.pt", tmp_path / "dst.pt", "--dtype", "bfloat16", "--json"
    )
    (finding,) = [f for f in outcome.document["findings"] if f["code"] == "FC301"]
    assert (outcome.code, finding["data"]["first_index"]) == (1, [7])


def test_formats_may_differ(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in base().items() if name != "h"}
    torch.save(tensors, tmp_path / "src.pt", _use_new_zipfile_serialization=False)
    for dst in ("a.safetensors", "a.pt", "a.npz", "folder"):
        cli_ok("convert", tmp_path / "src.pt", tmp_path / dst)
        cli_ok("verify", tmp_path / "src.pt", tmp_path / dst)
        cli_ok("verify", tmp_path / dst, tmp_path / "src.pt")


def test_tied_names_that_were_untied_are_still_faithful(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    torch.save({"a": weight, "b": weight}, tmp_path / "src.pt")
    torch.save({"a": weight.clone(), "b": weight.clone()}, tmp_path / "dst.pt")
    cli_ok("verify", tmp_path / "src.pt", tmp_path / "dst.pt")
    other = weight.clone()
    other[1, 1] += 1
    torch.save({"a": weight.clone(), "b": other}, tmp_path / "dst.pt")
    outcome = cli("verify", tmp_path / "src.pt", tmp_path / "dst.pt", "--json")
    assert [(f["code"], f["key"]) for f in outcome.document["findings"]] == [("FC301", "b")]


def test_a_view_is_derived_again(tmp_path: Path) -> None:
    tensor = torch.randn(6, 8)
    torch.save({"w": tensor.t()[1:5]}, tmp_path / "src.pt")
    safetensors.torch.save_file(
        {"w": tensor.t()[1:5].contiguous()}, tmp_path / "dst.safetensors", {"format": "pt"}
    )
    cli_ok("verify", tmp_path / "src.pt", tmp_path / "dst.safetensors")


def test_damage_in_either_side_is_no_answer(tmp_path: Path) -> None:
    tensor = torch.randn(64)
    torch.save({"w": tensor}, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "dst.pt")
    for name, other in (("src.pt", "dst.pt"), ("dst.pt", "src.pt")):
        data = (tmp_path / name).read_bytes()
        broken = bytearray(data)
        broken[data.index(tensor.numpy().tobytes()) + 17] ^= 1
        (tmp_path / name).write_bytes(broken)
        outcome = cli("verify", tmp_path / name, tmp_path / other, "--json")
        assert outcome.code == 2
        assert outcome.codes == ["FC105"]
        (tmp_path / name).write_bytes(data)


@settings(max_examples=15)
@given(index=st.integers(0, 9999), bit=st.integers(0, 7), block=st.sampled_from([512, 4096]))
def test_the_place_is_right_whatever_the_blocks(index: int, bit: int, block: int) -> None:
    """Blocks of the two sides need not be the same: one is gathered, the other contiguous."""
    tensor = torch.arange(10_000, dtype=torch.int16).reshape(100, 100)
    other = tensor.t().contiguous()
    other.reshape(-1).view(torch.uint8)[2 * index] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        src, dst = Path(folder) / "src.pt", Path(folder) / "dst.safetensors"
        torch.save({"w": tensor.t()}, src)
        safetensors.torch.save_file({"w": other}, dst, {"format": "pt"})
        with (
            mock.patch.object(extract, "BLOCK_BYTES", block),
            mock.patch.object(extract, "_GATHER_BYTES", 300),
        ):
            result = verify(
                make_plan(open_checkpoint(str(src)), PlanOptions()), open_checkpoint(str(dst))
            )
    (finding,) = result.findings
    assert finding.data["first_index"] == [index // 100, index % 100]
    assert finding.data["num_elements_different"] == 1


def test_convert_puts_nothing_in_place_that_reads_back_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not keep what was written."""
    import flamingo_ckpt.convert as convert_module

    torch.save({"w": torch.randn(100), "v": torch.randn(5)}, tmp_path / "src.pt")
    write_all = convert_module.write_all

    def forgetful(fd: int, block: memoryview, offset: int) -> None:
        data = bytearray(block)
        if len(data) == 400:
            data[123] ^= 16
        write_all(fd, memoryview(data), offset)

    monkeypatch.setattr(convert_module, "write_all", forgetful)
    for target in ("out", "out.safetensors"):
        outcome = cli("convert", tmp_path / "src.pt", tmp_path / target, "--json")
        assert outcome.code == 1
        assert outcome.codes == ["FC301"]
        assert outcome.document["findings"][0]["key"] == "w"
        assert not (tmp_path / target).exists()
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "out", "--no-verify")
    assert facts_at(tmp_path / "out") != facts_at(tmp_path / "src.pt")


def test_what_a_cast_loses_is_said_and_no_difference(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1e6, 1.0])}, tmp_path / "src.pt")
    dst = tmp_path / "dst.safetensors"
    safetensors.torch.save_file({"w": torch.tensor([1e6, 1.0]).half()}, dst, {"format": "pt"})
    command = ("verify", tmp_path / "src.pt", dst, "--dtype", "float16")
    outcome = cli_ok(*command, "--json")
    assert outcome.document["verdict"] == "pass"
    found = {item["code"]: item["severity"] for item in outcome.document["findings"]}
    assert found["FC303"] == "warning"
    assert "error" not in found.values()
    assert "bit for bit after the cast" in cli_ok(*command).out
    same = cli_ok("verify", dst, dst).out
    assert "bit for bit" in same
    assert "after the cast" not in same
