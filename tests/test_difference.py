"""How two tensors differ: counted in blocks, and held to an oracle that looks at all of it."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.difference import Difference, Tally, describe, facts_of
from flamingo_ckpt.tensors import DTYPES
from tests.support import cli

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def tally(name: str, ours: bytes, theirs: bytes, block: int = 64) -> Difference | None:
    """As the streaming loop does it: block by block, and only where blocks differ."""
    dtype = DTYPES[name]
    found = Tally(dtype, (len(ours) * 8 // dtype.bits,))
    for at in range(0, len(ours), block):
        one, other = ours[at : at + block], theirs[at : at + block]
        if one != other:
            found.add(memoryview(one), memoryview(other), at)
    return found.result()


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def bits32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def ordinal(bits: int, num_bits: int) -> int:
    """The place of a float among all of its dtype; +0 and -0 share one."""
    magnitude = bits & ((1 << (num_bits - 1)) - 1)
    return -magnitude if bits >> (num_bits - 1) else magnitude


@given(data=st.data(), name=st.sampled_from(FLOATS))
def test_counts_are_those_of_a_plain_loop(data: st.DataObject, name: str) -> None:
    width = DTYPES[name].bits // 8
    num_bits = width * 8
    values = data.draw(st.lists(st.tuples(*[st.binary(min_size=width, max_size=width)] * 2)))
    pairs = [(int.from_bytes(a, "little"), int.from_bytes(b, "little")) for a, b in values]
    found = tally(name, b"".join(a for a, _ in values), b"".join(b for _, b in values))
    different = [(a, b) for a, b in pairs if a != b]
    if not different:
        assert found is None
        return
    assert found is not None
    assert found.num_different == len(different)
    assert found.index == (next(at for at, (a, b) in enumerate(pairs) if a != b),)
    assert list(found.bits_flipped) == [
        sum((a ^ b) >> bit & 1 for a, b in different) for bit in range(num_bits)
    ]
    finite = [pair for pair in different if all(map(is_finite(name), pair))]
    assert found.num_not_finite == len(different) - len(finite)
    distances = [abs(ordinal(a, num_bits) - ordinal(b, num_bits)) for a, b in finite]
    assert found.max_ulp == max(distances, default=None)
    assert sum(count for *_, count in found.ulp_histogram) == len(distances)
    for low, high, count in found.ulp_histogram:
        assert count == sum(low <= distance <= high for distance in distances)
    starts = [low for low, *_ in found.ulp_histogram]
    assert starts == sorted(starts)
    assert all(low == 0 or low.bit_count() == 1 for low in starts)


def is_finite(name: str) -> object:
    from flamingo_ckpt.formats.cast import CastCounts, cast_block

    def check(bits: int) -> bool:
        raw = memoryview(bits.to_bytes(DTYPES[name].bits // 8, "little"))
        wide = cast_block(raw, DTYPES[name], DTYPES["F64"], CastCounts())
        return math.isfinite(wide.cast("d")[0])

    return check


def test_nothing_differs() -> None:
    assert tally("F32", f32(1, 2, 3), f32(1, 2, 3)) is None


def test_neighbours_are_one_apart_also_across_zero() -> None:
    found = tally("F32", bits32(0x3F800000, 1, 0), bits32(0x3F800001, 0x80000001, 0x80000000))
    assert found is not None
    assert found.ulp_histogram == ((0, 0, 1), (1, 1, 1), (2, 3, 1))
    assert found.max_ulp == 2
    assert found.max_abs == pytest.approx(2**-23)


def test_the_largest_distance_there_is() -> None:
    big = struct.pack("<d", 1.7976931348623157e308)
    found = tally("F64", big, struct.pack("<d", -1.7976931348623157e308))
    assert found is not None
    assert found.max_ulp == 2 * 0x7FEFFFFFFFFFFFFF
    assert found.max_abs == math.inf
    assert found.ulp_histogram == ((1 << 63, (1 << 64) - 1, 1),)


def test_what_is_no_number_has_no_distance() -> None:
    found = tally("F32", f32(1, math.inf), f32(math.nan, 2))
    assert found is not None
    assert (found.num_not_finite, found.max_ulp, found.max_abs) == (2, None, None)
    assert found.ulp_histogram == ()


@pytest.mark.parametrize("name", ["I64", "U8", "BOOL", "C64", "I16"])
def test_what_is_no_float_has_its_bits_counted_only(name: str) -> None:
    width = DTYPES[name].bits // 8
    found = tally(name, bytes(2 * width), bytes([*[0] * width, 1, *[0] * (width - 1)]))
    assert found is not None
    assert found.bits_flipped == (1, *[0] * (8 * width - 1))
    assert found.max_ulp is None


@pytest.mark.parametrize("name", ["C128", "F4"])
def test_what_has_no_whole_or_no_narrow_elements_is_only_counted(name: str) -> None:
    found = tally(name, bytes(32), bytes([*[0] * 31, 1]))
    assert found is not None
    assert (found.num_different, found.bits_flipped, found.conclusion) == (1, (), "")


def rounded(values: numpy.ndarray, keep: int) -> numpy.ndarray:
    """float32 with `keep` bits left, to nearest, ties to even."""
    bits = values.view("<u4").astype("<u8")
    drop = 32 - keep
    half = (1 << (drop - 1)) - 1
    return ((bits + half + ((bits >> drop) & 1)) >> drop << drop).astype("<u4").view("<f4")


RANDOM = numpy.random.default_rng(0).normal(size=300).astype("<f4")


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (-RANDOM, "wherever they differ, only the sign does"),
        (abs(RANDOM) * 0, "wherever they differ, B is 0"),
        (rounded(RANDOM, 16), "wherever they differ, B is A rounded through BF16"),
        (
            RANDOM.astype("<f2").astype("<f4"),
            "wherever they differ, B is A rounded through F16",
        ),
        (
            (RANDOM.view("<u4") & 0xFFFF0000).view("<f4"),
            "wherever they differ, B is A cut to BF16, not rounded",
        ),
        (
            RANDOM.byteswap(),
            "wherever they differ, the bytes of B are A's in the other order",
        ),
        (RANDOM + 1, ""),
    ],
)
def test_conclusions(theirs: numpy.ndarray, words: str) -> None:
    found = tally("F32", RANDOM.tobytes(), theirs.tobytes())
    assert found is not None
    assert facts_of(found, "A", "B").get("conclusion", "") == words
    # one element more that it is not true of, in another block, and nothing is concluded
    other = numpy.concatenate([theirs, [numpy.float32(3.3)] * 17]).astype("<f4")
    found = tally("F32", RANDOM.tobytes() + f32(*[1.1] * 17), other.tobytes())
    assert found is not None
    assert found.conclusion == ""


def test_the_other_side_may_be_the_rounded_one() -> None:
    found = tally("F32", rounded(RANDOM, 16).tobytes(), RANDOM.tobytes())
    assert found is not None
    assert facts_of(found, "A", "B")["conclusion"].endswith("A is B rounded through BF16")


@pytest.mark.parametrize(
    ("bit", "part"), [(0, "mantissa"), (22, "mantissa"), (23, "exponent"), (31, "sign")]
)
def test_a_single_bit(bit: int, part: str) -> None:
    found = tally("F32", bits32(0x3F800000), bits32(0x3F800000 ^ 1 << bit))
    assert found is not None
    assert describe(found, "A", "B").endswith(f"one bit of it is flipped, bit {bit} ({part})")


def test_what_is_said() -> None:
    found = tally("F32", f32(1.0, 2.0), f32(1.0, math.nextafter(2.0, 3.0) + 3e-7))
    assert found is not None
    assert describe(found, "A", "B").startswith("; at most 1 ulp apart (max_abs 2.4e-07); ")


def test_on_the_command_line(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": RANDOM.reshape(30, 10)}, tmp_path / "a.safetensors")
    save_file({"w": rounded(RANDOM, 16).reshape(30, 10)}, tmp_path / "b.safetensors")
    sides = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for arguments, ours, theirs in (
        (("verify", *sides), "the expected value", "the found one"),
        (("diff", *sides, "--level", "bits"), "A", "B"),
    ):
        outcome = cli(*arguments, "--json")
        (finding,) = [one for one in outcome.document["findings"] if one["code"] == "FC301"]
        words = f"wherever they differ, {theirs} is {ours} rounded through BF16"
        assert finding["data"]["conclusion"] == words
        assert finding["detail"].endswith(words)
        assert len(finding["data"]["bits_flipped"]) == 32
        assert finding["data"]["max_ulp"] <= 1 << 15
        assert words in cli(*arguments).out
