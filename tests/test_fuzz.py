"""Any bytes: an answer or a clean refusal, never another exception, in bounded time and memory."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import handmade as hm
from fixtures.make_broken import CASES, HERE
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.opening import read_source
from flamingo_ckpt.formats.pickle_machine import read_pickle
from flamingo_ckpt.inspection import inspect, tensor_rows
from flamingo_ckpt.plan import make_plan
from flamingo_ckpt.selection import PlanOptions
from flamingo_ckpt.tensors import Manifest

pytestmark = pytest.mark.timeout(120)
MIB = 1 << 20


def bounded(examples: int) -> settings:
    """So many examples, however slow the machine is today."""
    checks = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=checks, database=None
    )


class Bytes:
    """A byte source over bytes."""

    name = "fuzzed"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CkptError("past the end", code="FC102")
        return self.data[offset : offset + size]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))


def answer(data: bytes) -> Manifest | None:
    """What `inspect` and the planning half of `convert` make of the bytes; None for a refusal."""
    try:
        manifest = read_source(Bytes(data))
        inspect(manifest)
        json.dumps(tensor_rows(manifest))
    except CkptError:
        return None
    try:
        plan = make_plan(manifest, PlanOptions())
        for step in plan.steps:
            assert step.source.storage is not None
            source, offset = step.source.storage.locate()
            assert 0 <= offset <= offset + step.source.storage.num_bytes <= source.size
    except CkptError:
        pass
    return manifest


@cache
def seeds() -> tuple[bytes, ...]:
    """Valid files of every format, by several writers, and every broken one."""
    import numpy
    from safetensors.numpy import save

    arrays = {"a": numpy.arange(4, dtype="f4").reshape(2, 2), "b": numpy.ones(3, dtype="i8")}
    stored, deflated, single = io.BytesIO(), io.BytesIO(), io.BytesIO()
    numpy.savez(stored, **arrays)
    numpy.savez_compressed(deflated, **arrays)
    numpy.save(single, arrays["a"])
    body = hm.mapping(
        [
            ("epoch", hm.number(3)),
            ("args", hm.call(hm.named("argparse", "Namespace")) + hm.mapping([]) + b"b"),
            ("state_dict", hm.state_dict(again=hm.tensor(offset=1, shape=(3,), strides=(1,)))),
        ]
    )
    script = hm.script_zip(hm.module("Net", [("weight", hm.tensor())]))
    broken = [one.build() for one in CASES]
    good = [path.read_bytes() for path in sorted(HERE.parent.glob("*.*")) if path.suffix != ".py"]
    return (
        hm.torch_zip(body),
        hm.legacy(body),
        script,
        stored.getvalue(),
        deflated.getvalue(),
        single.getvalue(),
        save(arrays, {"format": "pt"}),
        *(data for data in broken if isinstance(data, bytes) and len(data) < 20_000),
        *(data for data in good if len(data) < 20_000),
    )


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file with bits flipped, pieces cut out, repeated, or spliced in from another file."""
    data = bytearray(seeds()[draw(st.integers(0, len(seeds()) - 1))])
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    for _ in range(draw(st.integers(1, 6))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, *b"().RQ}]0"))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(40)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(40)]
        elif kind == 5:
            other = rng.choice(seeds())
            begin = rng.randrange(len(other) + 1)
            data[at : at + rng.randrange(60)] = other[begin : begin + rng.randrange(60)]
        else:
            width = rng.choice((1, 2, 4, 8))
            data[at : at + width] = rng.choice((b"\xff", b"\0", b"\x7f")) * width
    return bytes(data)


@bounded(400)
@given(mutated())
def test_mutated_files(data: bytes) -> None:
    answer(data)


@bounded(150)
@given(
    st.sampled_from((b"", b"PK\3\4", b"\x80\x02\x8a\x0a", b"\x93NUMPY\x01\0", b"\x80\x02")),
    st.binary(max_size=300),
)
def test_any_bytes_behind_any_magic(magic: bytes, data: bytes) -> None:
    answer(magic + data)


# -- the header of safetensors

_numbers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from((1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 70, 2.0, 1e308, True, None)),
)
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("F32", "BOOL", "F4", "F6_E2M3", "C64", "U8", "f32", 3, None)),
        "shape": st.one_of(st.lists(_numbers, max_size=5), st.none(), st.just("x")),
        "data_offsets": st.lists(_numbers, max_size=3),
    },
    optional={"more": st.integers()},
)
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
_headers = st.dictionaries(
    st.one_of(st.sampled_from(("a", "b", "__metadata__", "")), st.text(max_size=4)),
    st.one_of(_entries, st.dictionaries(st.text(max_size=3), st.text(max_size=3)), _json),
    max_size=4,
)


@bounded(250)
@given(_headers, st.binary(max_size=64), st.integers(-3, 3))
def test_any_header(header: dict[str, Any], data: bytes, slip: int) -> None:
    raw = json.dumps(header).encode()
    answer(hm.safetensors(raw, data, length=max(len(raw) + slip, 0)))


@st.composite
def _layouts(draw: st.DrawFn) -> bytes:
    """Headers that are nearly right: tensors in a row, with one slip here and there."""
    header, at = {}, 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype, width = draw(st.sampled_from((("F32", 4), ("U8", 1), ("I64", 8), ("BF16", 2))))
        size = width
        for one in shape:
            size *= one
        slip = draw(st.sampled_from((0,) * 12 + (1, -1)))
        header[name] = hm.entry(at, at + size + slip, shape, dtype)
        at += size
    return hm.safetensors(header, bytes(max(at + draw(st.sampled_from((0, 0, 0, 0, 1, -1))), 0)))


@bounded(250)
@given(_layouts())
def test_what_is_accepted_the_library_accepts_and_reads_alike(data: bytes) -> None:
    from safetensors import deserialize

    manifest = answer(data)
    if manifest is None:
        return
    theirs = {name: (one["dtype"], tuple(one["shape"])) for name, one in deserialize(data)}
    assert {t.name: (t.dtype.name, t.shape) for t in manifest.tensors} == theirs


# -- the pickle machine


_OPCODES = b"().012FIJKLMNQRSTUVXabcd}eghijloprstuGBC]q\x80\x81\x85\x86\x87\x88\x89" + bytes(
    range(0x8A, 0x99)
)
_PIECES = (
    b"N",
    b"]",
    b"}",
    b")",
    b"(",
    b"K\x01",
    b"q\x00",
    b"h\x00",
    b"\x94",
    b"2",
    b"0",
    b"\x85",
    b"\x86",
    b"R",
    b"b",
    b"\x81",
    b"Q",
    b"u",
    b"e",
    b"t",
    hm.text("weight"),
    hm.text("state_dict"),
    hm.text("model"),
    hm.named("collections", "OrderedDict"),
    hm.named("torch._utils", "_rebuild_tensor_v2"),
    hm.named("torch._utils", "_rebuild_tensor_v3"),
    hm.named("torch._utils", "_rebuild_parameter"),
    hm.named("torch._tensor", "_rebuild_from_type_v2"),
    hm.named("torch", "Size"),
    hm.named("torch", "float32"),
    hm.named("my.module", "Thing"),
    hm.storage(),
    hm.tensor(),
    hm.naturals((2, 2)),
    hm.number(-1),
    hm.number(1 << 70),
    hm.mapping([("a", hm.number(1))]),
)
_pieces = st.lists(st.sampled_from(_PIECES), max_size=40)
_opcodes = st.lists(
    st.builds(
        lambda op, tail: bytes([op]) + tail, st.sampled_from(_OPCODES), st.binary(max_size=5)
    ),
    max_size=30,
)


@bounded(400)
@given(st.one_of(_pieces, _opcodes), st.booleans())
def test_any_opcodes(parts: list[bytes], stop: bool) -> None:
    data = b"\x80\x02" + b"".join(parts) + (b"." if stop else b"")
    try:
        read_pickle(Bytes(data), 0, len(data), "fuzzed")
    except CkptError:
        pass


@bounded(300)
@given(st.one_of(_pieces, _opcodes), st.sampled_from(("zip", "legacy", "script", "beside")))
def test_any_opcodes_as_a_checkpoint(parts: list[bytes], container: str) -> None:
    # Whatever the pieces leave on the stack is gathered into one tuple, so that most of them pass.
    body = b"(" + b"".join(parts) + b"t"
    make: dict[str, Callable[[], bytes]] = {
        "zip": lambda: hm.torch_zip(b"".join(parts)),
        "legacy": lambda: hm.legacy(body),
        "script": lambda: hm.script_zip(hm.module("Net", [("weight", hm.tensor()), ("x", body)])),
        "beside": lambda: hm.torch_zip(
            hm.mapping([("state_dict", hm.state_dict()), ("x", body), (body, b"N")])
        ),
    }
    answer(make[container]())


@st.composite
def _arguments(draw: st.DrawFn) -> bytes:
    """A tensor rebuilt from odd arguments."""
    odd = st.sampled_from((*_PIECES[20:], b"N", b")", b"]", b"}", b"\x88"))
    function = draw(st.sampled_from(_PIECES[24:28]))
    good = [hm.storage(), hm.number(0), hm.naturals((2, 2)), hm.naturals((2, 1)), b"\x89"]
    good += [hm.call(hm.named("collections", "OrderedDict")), hm.named("torch", "float32"), b"}"]
    args = good[: draw(st.integers(0, len(good)))]
    for _ in range(draw(st.integers(0, 2))):
        if args:
            args[draw(st.integers(0, len(args) - 1))] = draw(odd)
    return hm.call(function, *args)


@bounded(250)
@given(_arguments())
def test_any_arguments_of_a_tensor(rebuilt: bytes) -> None:
    answer(hm.torch_zip(hm.mapping([("weight", rebuilt)])))
    answer(hm.legacy(hm.mapping([("weight", rebuilt), ("good", hm.tensor())])))


# -- numpy headers


@bounded(200)
@given(
    st.one_of(
        st.text(alphabet="{}[]()'\"descrfortan_orderTrueFals:, <f4|O0123-+\\", max_size=120),
        st.builds(
            "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format,
            st.sampled_from(("'<f4'", "'|O'", "'|V2'", "[('a','<f4')]", "'<f٤'", "7", "'>i8'")),
            st.sampled_from(("False", "True", "0", "None")),
            st.sampled_from(("()", "(2, 2)", "(2,)", "[2]", "(-1,)", "(1e3,)", "(99999999999,)")),
        ),
    )
)
def test_any_numpy_header(header: str) -> None:
    answer(hm.npy_raw(header.encode("latin-1", "replace").decode("latin-1")))


# -- memory


def _memory_bombs() -> Iterator[tuple[str, bytes]]:
    for name, opcode in {
        "LONG_BINPUT": b"Nr\xff\xff\xff\xff",
        "BINUNICODE8": b"\x8d" + b"\xff" * 7 + b"\x7f",
        "BINBYTES8": b"\x8e" + b"\xff" * 8,
        "BYTEARRAY8": b"\x96\0\0\0\0\x01\0\0\0",
        "LONG4": b"\x8b\xff\xff\xff\x7f",
    }.items():
        yield name, hm.torch_zip(hm.state_dict(note=opcode))
    doubling = b"".join(hm.put(n) + b"0" + hm.get(n) + hm.get(n) + b"\x86" for n in range(100))
    yield "laughs", hm.torch_zip(hm.state_dict(note=hm.text("ha") + doubling))
    yield "npy", hm.npy(shape=f"({1 << 50},)")
    yield "header", hm.safetensors({}, length=100_000_000)


_BOMBS = dict(_memory_bombs())


@pytest.mark.parametrize("name", _BOMBS)
def test_little_memory_for_large_claims(name: str) -> None:
    data = _BOMBS[name]
    answer(hm.torch_zip(hm.state_dict()))  # imports are not the file's doing
    tracemalloc.start()
    try:
        answer(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


def test_the_seeds_are_worth_mutating() -> None:
    accepted = [data for data in seeds() if answer(data) is not None]
    assert len(accepted) >= 15
    assert len({answer(data).format for data in accepted}) == 6  # type: ignore[union-attr]
