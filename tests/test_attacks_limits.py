"""Files that lie about sizes, or grow when they are read: bounded time, bounded memory."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import handmade as hm
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.formats.pickle_machine import MAX_OPCODES
from tests.attacks_support import (
    converted,
    doubled_tuples,
    finding_codes,
    inspected,
    put_file,
    refused,
)

# One that goes off must not hold up the run.
pytestmark = pytest.mark.timeout(60)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python held for `work`, beyond what it held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refusal(path: Path) -> str:
    """The code with which opening fails."""
    with pytest.raises(CkptError) as caught:
        open_checkpoint(str(path))
    return caught.value.code


def in_bounds(path: Path, *, seconds: float = 30, mebibytes: int = 1024, text: bool = False) -> str:
    """The code of `inspect` within so much time and address space; '' if it lists the file.

    In a process of its own, so that a bomb cannot take the tests with it.
    """
    lines = (
        "import json, sys",
        "from flamingo_ckpt.cli.main import run",
        "sys.exit(run(['inspect', *sys.argv[1:]]))",
    )
    limit = mebibytes << 20
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(path), *([] if text else ["--json"])],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode in (0, 2), done.stderr
    assert "FC008" not in done.stdout
    if done.returncode == 0:
        return ""
    return str(json.loads(done.stdout)["findings"][0]["code"])


# -- lengths that lie


@pytest.mark.parametrize(
    ("opcode", "code"),
    [
        (b"N" + b"r\xff\xff\xff\xff" + b"0N", ""),  # LONG_BINPUT
        (b"Np4294967295\n" + b"0N", ""),  # PUT
        (b"\x8d" + struct.pack("<Q", 1 << 62), "FC102"),  # BINUNICODE8
        (b"\x8e" + struct.pack("<Q", (1 << 64) - 1), "FC102"),  # BINBYTES8
        (b"\x96" + struct.pack("<Q", 1 << 33), "FC102"),  # BYTEARRAY8
        (b"X\xff\xff\xff\xff", "FC102"),  # BINUNICODE
        (b"B\xff\xff\xff\xff", "FC102"),  # BINBYTES
        (b"T\xff\xff\xff\x7f", "FC102"),  # BINSTRING
        (b"T\xff\xff\xff\xff", "FC110"),  # BINSTRING of negative length
        (b"\x8b\xff\xff\xff\x7f", "FC102"),  # LONG4
        (b"\x8b\xff\xff\xff\xff", "FC110"),  # LONG4 of negative length
        (b"\x95" + struct.pack("<Q", 1 << 62) + b"N", ""),  # FRAME, which is only a hint
        (b"I" + b"9" * 4500 + b"\n", "FC110"),  # INT of very many digits
        (b"p-1\n", "FC110"),  # PUT below zero
    ],
)
def test_lengths_are_checked_before_memory_is_asked_for(
    opcode: bytes, code: str, tmp_path: Path
) -> None:
    path = put_file(tmp_path, hm.torch_zip(hm.state_dict(note=opcode)))
    good = put_file(tmp_path, hm.torch_zip(hm.state_dict(note=b"N")), "good.pt")
    open_checkpoint(str(good))  # imports and caches are not the file's doing
    if code:
        assert peak_bytes(lambda: refusal(path)) < 4 << 20
        assert refusal(path) == code
    else:
        assert peak_bytes(lambda: open_checkpoint(str(path))) < 4 << 20


@pytest.mark.parametrize("digits", [5000, 100_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_of_very_many_digits(digits: int, sign: int, tmp_path: Path) -> None:
    huge = sign * (1 << digits * 4)
    bodies = {
        "numel": hm.tensor(hm.storage(numel=huge)),
        "offset": hm.tensor(offset=huge),
        "shape": hm.tensor(shape=(huge, 1)),
        "strides": hm.tensor(strides=(huge, 1)),
    }
    for name, body in bodies.items():
        state = hm.mapping([("weight", body)])
        for wrapped, kind in ((hm.torch_zip(state), "zip"), (hm.legacy(state), "legacy")):
            path = put_file(tmp_path, wrapped, f"{name}-{kind}.pt")
            refused(path, {"FC103", "FC110", "FC111"})


def test_numbers_of_very_many_digits_beside_the_weights(tmp_path: Path) -> None:
    huge = hm.number(1 << 40_000)
    pairs = [("weight", hm.tensor()), ("step", huge), (huge, b"N")]
    path = put_file(tmp_path, hm.torch_zip(hm.mapping(pairs)))
    assert inspected(path)["summary"]["num_tensors"] == 1
    assert list(converted(path)) == ["weight"]


# -- tensors outside their storage


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 62},
        {"shape": (2, 3)},
        {"shape": (-2, 2)},
        {"shape": (1 << 63, 2)},
        {"shape": (1 << 62, 1 << 62), "strides": (0, 1)},
        {"strides": (3, 1)},
        {"strides": (1 << 62, 1)},
        {"strides": (-2, 1)},
        {"shape": (2,), "strides": (2, 1)},
        {"shape": (1,) * 65, "strides": (1,) * 65},
        {"shape": (0,), "strides": (1,), "offset": 5},
    ],
)
def test_a_tensor_stays_inside_its_storage(fields: dict[str, object], tmp_path: Path) -> None:
    body = hm.mapping([("weight", hm.tensor(**fields))])  # type: ignore[arg-type]
    refused(put_file(tmp_path, hm.torch_zip(body)), {"FC103", "FC110"})
    refused(put_file(tmp_path, hm.legacy(body), "legacy.pt"), {"FC103", "FC110"})


def test_a_view_that_expands_is_listed_and_not_written(tmp_path: Path) -> None:
    wide = hm.tensor(shape=(1 << 34, 4), strides=(0, 1))
    path = put_file(tmp_path, hm.torch_zip(hm.mapping([("weight", wide)])))
    assert len(path.read_bytes()) < 1600
    document = inspected(path)
    assert document["tensors"][0]["num_bytes"] == 1 << 38
    assert "FC307" in finding_codes(document)
    refused(path, "FC307", inspect=False)


def test_many_views_that_expand_together(tmp_path: Path) -> None:
    store = hm.storage(numel=64)
    views = [(f"v{n}", hm.tensor(store, shape=(60,), strides=(1,), offset=n)) for n in range(5)]
    few = put_file(tmp_path, hm.torch_zip(hm.mapping(views[:4]), {"0": hm.WEIGHT * 16}), "few.pt")
    assert len(converted(few)) == 4
    path = put_file(tmp_path, hm.torch_zip(hm.mapping(views), {"0": hm.WEIGHT * 16}))
    refused(path, "FC307", inspect=False)


def test_a_small_expansion_can_be_asked_for(tmp_path: Path) -> None:
    wide = hm.tensor(shape=(3, 4), strides=(0, 1))
    path = put_file(tmp_path, hm.torch_zip(hm.mapping([("weight", wide)])))
    refused(path, "FC307", inspect=False)
    assert converted(path, "--max-expansion", "4")["weight"] == ("F32", [3, 4], hm.WEIGHT * 3)


# -- graphs that grow when they are walked


@pytest.mark.parametrize(
    "place", ["beside", "key", "state", "args", "dtype", "shape", "hooks", "metadata", "location"]
)
def test_doubled_tuples_anywhere(place: str, tmp_path: Path) -> None:
    laughs = doubled_tuples(60)
    hooks = hm.call(hm.named("collections", "OrderedDict"))
    args = [hm.storage(), hm.number(0), hm.naturals((2, 2)), hm.naturals((2, 1)), b"\x89", hooks]
    v2, v3 = (hm.named("torch._utils", f"_rebuild_tensor_{version}") for version in ("v2", "v3"))
    pairs: list[tuple[bytes | str, bytes]] = {
        "beside": [("weight", hm.tensor()), ("note", laughs)],
        "key": [("weight", hm.tensor()), (laughs, hm.number(1))],
        "state": [("weight", hm.tensor())],
        "args": [("weight", hm.tensor()), ("note", hm.call(hm.named("my", "Class"), laughs))],
        "dtype": [("weight", hm.call(v3, *args, laughs))],
        "shape": [("weight", hm.call(v2, *args[:2], laughs, *args[3:]))],
        "hooks": [("weight", hm.call(v2, *args[:5], laughs))],
        "metadata": [("weight", hm.call(v2, *args, laughs))],
        "location": [("weight", hm.tensor(_storage_at(laughs)))],
    }[place]
    body = hm.mapping(pairs)
    if place == "state":
        # An OrderedDict with attributes, whose names are the doubled tuples.
        empty = hm.call(hm.named("collections", "OrderedDict"))
        body = empty + body[1:] + hm.mapping([(laughs, b"N")]) + b"b"
    path = put_file(tmp_path, hm.torch_zip(body))
    assert path.stat().st_size < 4000
    begin = time.monotonic()
    in_bounds(path)
    assert time.monotonic() - begin < 20


def _storage_at(location: bytes) -> bytes:
    kind = hm.named("torch", "FloatStorage")
    return hm.group(hm.text("storage"), kind, hm.text("0"), location, hm.number(4)) + b"Q"


def _ring() -> bytes:
    """A list that holds itself."""
    return b"]" + hm.put(5) + hm.get(5) + b"a"


@pytest.mark.parametrize(
    "body",
    [
        hm.state_dict(note=_ring()),
        _ring(),
        b"}" + hm.put(1) + hm.text("state_dict") + hm.get(1) + b"s",
        b"}" + hm.put(1) + hm.text("w") + hm.tensor() + b"s" + hm.text("model") + hm.get(1) + b"s",
        hm.named("my", "Class") + b")\x81" + hm.put(1) + hm.get(1) + b"b",
    ],
)
def test_graphs_that_loop(body: bytes, tmp_path: Path) -> None:
    in_bounds(put_file(tmp_path, hm.torch_zip(body)))


def test_a_key_that_cannot_be_hashed(tmp_path: Path) -> None:
    pairs = [(hm.listing(hm.number(1)), b"N"), ("weight", hm.tensor()), (hm.mapping([]), b"N")]
    path = put_file(tmp_path, hm.torch_zip(hm.mapping(pairs)))
    assert list(converted(path)) == ["weight"]


@pytest.mark.parametrize("place", ["key", "value", "args", "dtype", "storage"])
def test_nesting_very_deep(place: str, tmp_path: Path) -> None:
    deep = b")" + b"\x85" * 300_000
    v3 = hm.named("torch._utils", "_rebuild_tensor_v3")
    ints = (hm.naturals((2, 2)), hm.naturals((2, 1)))
    odd = hm.call(v3, hm.storage(), hm.number(0), *ints, b"\x89", b"N", deep)
    pairs: list[tuple[bytes | str, bytes]] = {
        "key": [("weight", hm.tensor()), (deep, b"N")],
        "value": [("weight", hm.tensor()), ("note", deep)],
        "args": [("weight", hm.tensor()), ("note", hm.call(hm.named("my", "Class"), deep))],
        "dtype": [("weight", odd)],
        "storage": [("weight", hm.tensor(deep))],
    }[place]
    in_bounds(put_file(tmp_path, hm.torch_zip(hm.mapping(pairs))))


def test_parameters_of_parameters(tmp_path: Path) -> None:
    function = hm.named("torch._utils", "_rebuild_parameter")
    body = hm.tensor()
    for _ in range(2000):
        body = function + b"(" + body + b"\x88NtR"
    refused(put_file(tmp_path, hm.torch_zip(hm.mapping([("weight", body)]))), {"FC110", "FC111"})


def _levels(levels: int, wide: int) -> bytes:
    """Dicts in dicts: each level holds the one below `wide` times, so paths multiply."""
    body = hm.mapping([("deep", hm.tensor())]) + hm.put(0) + b"0"
    for level in range(levels):
        pairs = ((f"k{n}", hm.get(level)) for n in range(wide))
        body += hm.mapping(pairs) + hm.put(level + 1) + b"0"
    return body + hm.get(levels)


@pytest.mark.parametrize(("levels", "wide"), [(4, 200), (5, 60), (60, 2)])
def test_the_search_for_weights_does_not_multiply(levels: int, wide: int, tmp_path: Path) -> None:
    in_bounds(put_file(tmp_path, hm.torch_zip(_levels(levels, wide))))


def test_many_entries_that_share_one_large_value(tmp_path: Path) -> None:
    shared = b"(" + b"N" * 60_000 + b"l" + hm.put(1) + b"0"
    boxed = b"]" + b"(" + b"".join(b"]" for _ in range(60_000)) + b"e" + hm.put(2) + b"0"
    pairs = [("weight", hm.tensor()), *((f"n{n}", hm.get(2)) for n in range(20_000))]
    in_bounds(put_file(tmp_path, hm.torch_zip(shared + boxed + hm.mapping(pairs))))


def test_a_module_name_of_very_many_parts(tmp_path: Path) -> None:
    long_name = "a." * 1_000_000 + "b"
    note = hm.call(hm.stack_named(long_name, "c"))
    in_bounds(put_file(tmp_path, hm.torch_zip(hm.state_dict(note=note))))
    note = hm.call(hm.stack_named("a", long_name))
    in_bounds(put_file(tmp_path, hm.torch_zip(hm.state_dict(note=note)), "name.pt"))


@pytest.mark.parametrize(("levels", "key_bytes"), [(40, 1), (14, 20_000)])
def test_shared_modules_of_torchscript_do_not_multiply(
    levels: int, key_bytes: int, tmp_path: Path
) -> None:
    left, right = hm.text("l" * key_bytes) + hm.put(1000), hm.text("r" * key_bytes) + hm.put(1001)
    body = left + b"0" + right + b"0" + hm.module("Leaf", [("w", hm.tensor())]) + hm.put(0) + b"0"
    for level in range(levels):
        pairs = [(hm.get(1000), hm.get(level)), (hm.get(1001), hm.get(level))]
        body += hm.module("Node", pairs) + hm.put(level + 1) + b"0"
    in_bounds(put_file(tmp_path, hm.script_zip(body + hm.get(levels))))


def test_too_many_opcodes(tmp_path: Path) -> None:
    body = b"N0" * (MAX_OPCODES // 2 + 1)
    path = put_file(tmp_path, hm.torch_zip(body + hm.state_dict()))
    assert in_bounds(path) == "FC111"


def test_as_many_objects_as_opcodes_allow(tmp_path: Path) -> None:
    body = b"]" * (MAX_OPCODES - 10) + b"."
    path = put_file(tmp_path, hm.torch_zip(body))
    assert in_bounds(path, mebibytes=2048) == "FC110"
