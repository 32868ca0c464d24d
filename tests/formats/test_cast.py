"""Casts: bit-equal to torch where torch rounds once, to exact arithmetic where it rounds twice."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ckpt.formats.cast import CastCounts, cast_block
from flamingo_ckpt.tensors import DTYPES, TORCH_DTYPES
from tests.support import cli, facts_at, random_tensor, torch_bytes

FLOATS = {
    name: getattr(torch, DTYPES[name].torch or "")
    for name in ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
}
TARGETS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SPECIALS = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.5, 65504.0, 65519.99, 65520.0, 1e-45]
SPECIALS += [3.3895314e38, 3.4028235e38, 6e-8, 2.98e-8, 5.97e-8, 1e-40, 9.1835e-41, 4.6e-41]


def ours(data: bytes, src: str, dst: str) -> tuple[bytes, CastCounts]:
    counts = CastCounts()
    out = cast_block(memoryview(data), DTYPES[src], DTYPES[dst], counts)
    return bytes(out), counts


def inputs(src: str) -> torch.Tensor:
    """Every pattern of narrow dtypes; a million random ones and hard cases of the wide."""
    dtype = FLOATS[src]
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(65536).to(torch.int32).to(torch.uint16).view(dtype)
    random = random_tensor(dtype, (200_000,), 7)
    generator = torch.Generator().manual_seed(8)
    usual = torch.randn(100_000, dtype=dtype, generator=generator)
    usual *= 10.0 ** torch.randint(-45, 39, (100_000,), generator=generator)
    return torch.cat([random, usual, torch.tensor(SPECIALS, dtype=dtype)])


def nearest(value: float, dst: str) -> int:
    """The bits of the nearest value, ties to even, in exact rational arithmetic."""
    mantissa, least, bias, width = {
        "BF16": (7, -126, 127, 16),
        "F16": (10, -14, 15, 16),
        "F32": (23, -126, 127, 32),
    }[dst]
    sign = (1 << (width - 1)) if math.copysign(1, value) < 0 else 0
    exact = abs(Fraction(value))
    if exact == 0:
        return sign
    exponent = max(math.frexp(float(exact))[1] - 1, least)
    unit = Fraction(2) ** (exponent - mantissa)
    steps = round(exact / unit)  # a Fraction rounds half to even
    if exponent == least:
        return sign | steps  # subnormals and the first binade count on from zero
    bits = ((exponent + bias) << mantissa) + (steps - (1 << mantissa))
    top = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    return sign | min(bits, top)


@pytest.mark.parametrize("dst", TARGETS)
@pytest.mark.parametrize("src", FLOATS)
def test_values_are_those_of_torch(src: str, dst: str) -> None:
    values = inputs(src)
    wanted = values.to(TARGETS[dst])
    out, counts = ours(torch_bytes(values), src, dst)
    raw = numpy.frombuffer(out, dtype=f"u{TARGETS[dst].itemsize}")
    have = torch.frombuffer(bytearray(out), dtype=TARGETS[dst])
    nan = torch.isnan(values.double())
    assert torch.equal(torch.isnan(have), nan)
    theirs = numpy.frombuffer(torch_bytes(wanted), dtype=raw.dtype)
    differs = (raw != theirs) & ~nan.numpy()
    if src != "F64" or dst == "F32":
        assert not differs.any()
    # From float64 torch goes through float32 and rounds twice: what differs is right in ours.
    assert differs.mean() < 1e-3
    for index in numpy.flatnonzero(differs):
        assert raw[index] == nearest(values[index].item(), dst)
    finite_before = torch.isfinite(values.double())
    assert counts.elements == len(values)
    assert counts.nan_lost == 0
    # a value that overflowed is counted there and nowhere else
    overflowed = finite_before & torch.isinf(have)
    changed = (have.double() != values.double()) & ~nan & ~overflowed
    assert counts.overflowed == int(overflowed.sum())
    assert counts.inexact == int(changed.sum())
    assert counts.underflowed == int((changed & (have == 0)).sum())


@pytest.mark.parametrize(("dst", "bits"), [("F16", 10), ("BF16", 7)])
def test_a_double_that_torch_rounds_twice(dst: str, bits: int) -> None:
    """Just above the middle of two neighbours; as float32 it is the middle, and a tie."""
    value = 1.0 + 2.0 ** -(bits + 1) + 2.0**-40
    out, _ = ours(struct.pack("<d", value), "F64", dst)
    one = nearest(1.0, dst)
    assert int.from_bytes(out, "little") == one + 1
    assert torch.tensor(value, dtype=torch.float64).to(TARGETS[dst]).item() == 1.0


finite_doubles = st.floats(allow_nan=False, allow_infinity=False) | st.floats(
    min_value=-1e39, max_value=1e39
)


@settings(max_examples=400)
@given(value=finite_doubles, dst=st.sampled_from(sorted(TARGETS)))
def test_float64_is_rounded_once(value: float, dst: str) -> None:
    out, _ = ours(struct.pack("<d", value), "F64", dst)
    assert int.from_bytes(out, "little") == nearest(value, dst)


@given(
    bits=st.integers(0, (1 << 16) - 1),
    nudge=st.sampled_from([-1, 0, 1]),
    dst=st.sampled_from(["BF16", "F16"]),
)
def test_float64_beside_every_midpoint(bits: int, nudge: int, dst: str) -> None:
    """The doubles at and beside the middle of two neighbours: where a second rounding shows."""
    pair = []
    for one in (bits & 0x7FFF, (bits & 0x7FFF) + 1):
        tensor = torch.tensor([one], dtype=torch.int32).to(torch.uint16).view(TARGETS[dst])
        pair.append(float(tensor.double()))
    if not all(map(math.isfinite, pair)):
        return
    middle = (pair[0] + pair[1]) / 2
    value = math.nextafter(middle, math.inf * nudge) if nudge else middle
    value = -value if bits & 0x8000 else value
    out, _ = ours(struct.pack("<d", value), "F64", dst)
    assert int.from_bytes(out, "little") == nearest(value, dst)


@settings(max_examples=200)
@given(bits=st.integers(0, (1 << 64) - 1), dst=st.sampled_from(sorted(TARGETS)))
def test_no_nan_is_lost_and_none_is_made(bits: int, dst: str) -> None:
    data = bits.to_bytes(8, "little")
    (value,) = struct.unpack("<d", data)
    out, counts = ours(data, "F64", dst)
    result = torch.frombuffer(bytearray(out), dtype=TARGETS[dst])
    assert bool(torch.isnan(result)) == math.isnan(value)
    assert counts.nan_lost == 0


def test_every_nan_of_float32_survives_as_bfloat16() -> None:
    mantissas = numpy.arange(1, 1 << 23, 97, dtype="<u4")
    for sign in (0x7F800000, 0xFF800000):
        patterns = mantissas | numpy.uint32(sign)
        out, counts = ours(patterns.tobytes(), "F32", "BF16")
        result = numpy.frombuffer(out, dtype="<u2")
        assert ((result & 0x7FFF) > 0x7F80).all()
        assert ((result >> 15) == (patterns >> 31)).all()
        assert counts.inexact == counts.overflowed == 0


@pytest.mark.parametrize("block", [8, 64, 4096])
def test_blocks_add_up(block: int) -> None:
    data = torch_bytes(random_tensor(torch.float64, (2048,), 3))
    whole, total = ours(data, "F64", "F16")
    counts = CastCounts()
    parts = [
        bytes(cast_block(memoryview(data)[at : at + block], DTYPES["F64"], DTYPES["F16"], counts))
        for at in range(0, len(data), block)
    ]
    assert b"".join(parts) == whole
    assert counts == total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convert_casts_real_floats_and_nothing_else(dtype: str, tmp_path: Path) -> None:
    tensors = {
        name: random_tensor(kind, (40,)).nan_to_num(0.5, 1.0, 1.0)
        if kind.itemsize > 1
        else random_tensor(kind, (40,))
        for name, kind in FLOATS.items()
    }
    tensors["F64"] = torch.randn(40, dtype=torch.float64)
    tensors["F32"] = torch.randn(40)
    tensors["BF16"] = torch.randn(40).bfloat16()
    others = {"ints": torch.arange(3), "mask": torch.tensor([True]), "rotary": torch.randn(2) * 1j}
    torch.save({**tensors, **others}, tmp_path / "src.pt")
    outcome = cli(
        "convert", tmp_path / "src.pt", tmp_path / "a.safetensors", "--dtype", dtype, "--json"
    )
    assert outcome.code == 0, outcome
    facts = facts_at(tmp_path / "a.safetensors")
    target = TORCH_DTYPES[dtype].name
    for name in tensors:
        assert facts[name].dtype == target
    assert {name: facts[name].dtype for name in others} == {
        "ints": "I64",
        "mask": "BOOL",
        "rotary": "C64",
    }
    summary = outcome.document["summary"]
    assert summary["cast"] == sum(name != target for name in tensors)
    assert summary["verified"] == len(tensors) + len(others)
    verified = cli(
        "verify", tmp_path / "src.pt", tmp_path / "a.safetensors", "--dtype", dtype, "--json"
    )
    assert verified.code == 0
    assert verified.document["summary"]["cast"] == summary["cast"]
    assert cli("verify", tmp_path / "src.pt", tmp_path / "a.safetensors").code == 1


def test_overflow_is_a_finding_and_exit_1(tmp_path: Path) -> None:
    tensors = {"big": torch.tensor([1e5, -7e4, 1.0, math.inf, math.nan]), "ok": torch.ones(2)}
    torch.save(tensors, tmp_path / "src.pt")
    target = tmp_path / "a.safetensors"
    outcome = cli("convert", tmp_path / "src.pt", target, "--dtype", "float16", "--json")
    assert outcome.code == 1
    document = outcome.document
    assert (document["verdict"], document["exit_code"]) == ("fail", 1)
    (finding,) = [f for f in document["findings"] if f["code"] == "FC303"]
    assert (finding["key"], finding["severity"]) == ("big", "error")
    assert "2 of 5" in finding["detail"]
    halves = torch.frombuffer(bytearray(facts_at(target)["big"].data), dtype=torch.float16)
    assert halves[:2].tolist() == [math.inf, -math.inf]


def test_rounding_is_counted(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1.0 + 2**-20, 1e-44, math.nan])
    torch.save({"w": values}, tmp_path / "src.pt")
    outcome = cli(
        "convert", tmp_path / "src.pt", tmp_path / "a.pt", "--dtype", "bfloat16", "--json"
    )
    (finding,) = outcome.document["findings"]
    assert (outcome.code, finding["code"], finding["severity"]) == (0, "FC302", "info")
    assert "2 of 4 values" in finding["detail"]
    assert "1 of them to zero" in finding["detail"]


@pytest.mark.parametrize("kind", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2], ids=str)
def test_a_cast_that_needs_scales_is_refused(kind: torch.dtype, tmp_path: Path) -> None:
    torch.save({"w": random_tensor(kind, (4,)), "v": torch.ones(2)}, tmp_path / "src.pt")
    outcome = cli("convert", tmp_path / "src.pt", tmp_path / "a.pt", "--dtype", "float32", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC305"])
