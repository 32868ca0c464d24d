"""Tensors through canonical names and back: real bytes, read as a conversion reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.layouts.mapping import Assembled, Assembly, Reading, assemble, joined, read_atoms
from flamingo_ckpt.layouts.rules import Rule, Table, dropped, rename
from flamingo_ckpt.tensors import DTYPES, DType, Storage, TensorInfo
from tests.support import MemorySource, stored_bytes

WIDTHS = {1: "U8", 2: "BF16", 4: "F32", 8: "F64"}


def rule(native: str, canonical: str, axes: str = "", mode: str = "both") -> Rule:
    return Rule(native=native, canonical=canonical, axes=axes, mode=mode)


#: Two layouts of one model: everything that is fused, stacked or turned in one is not in the other.
FUSED = Table(
    (
        rule(
            "blocks.{layer}.qkv.{p:weight|bias}",
            "layers.{layer}.{part:q|k|v}.{p}",
            "(part r) c -> r c",
        ),
        rule("conv", "patch", "row column c d -> d c row column"),
        rule("mlp", "layers.{layer}.mlp.weight", "layer in out -> out in"),
        rule("out", "layers.{layer}.out", "layer heads h d -> d (heads h)"),
        rule("kv", "layers.{layer}.{part:key|value}", "layer part heads d h -> (heads h) d"),
        rule("position", "position", "1 p d -> p d"),
        rule("scale", "scale"),
        *dropped({"blocks.{layer}.mask": "computed"}),
        rule("twin.{layer}.out", "layers.{layer}.out", "", "alias"),
    )
)
PLAIN = Table(
    rename(
        {
            "{layer}.{m:q|k|v}.{p:weight|bias}": "layers.{layer}.{m}.{p}",
            "{layer}.mlp": "layers.{layer}.mlp.weight",
            "{layer}.{m:out|key|value}": "layers.{layer}.{m}",
            "{m:patch|position|scale}": "{m}",
        }
    )
)


def stored(name: str, array: Any, dtype: DType, byteorder: str = "little") -> TensorInfo:
    """A tensor over the bytes that an array is a view of, 5 bytes into a file."""
    whole = array
    while whole.base is not None:
        whole = whole.base
    source = MemorySource(b"\xee" * 5 + whole.tobytes())
    storage = Storage(key=name, num_bytes=whole.nbytes, locate=lambda: (source, 5))
    place = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=array.shape,
        storage=storage,
        offset_bytes=place,
        strides=None if array.flags.c_contiguous else strides,
        byteorder=byteorder,
    )


def content(tensor: Assembled | TensorInfo, width: int) -> Any:
    """The bytes that a conversion would write, as integers in the tensor's shape."""
    runs = joined(tensor.pieces, tensor.name) if isinstance(tensor, Assembled) else (tensor,)
    raw = b"".join(stored_bytes(run) if run.storage else bytes(run.num_bytes) for run in runs)
    assert len(raw) == math.prod(tensor.shape) * width
    return np.frombuffer(raw, f"<u{width}").reshape(tensor.shape)


def read(tensors: Iterable[TensorInfo], table: Table, **dims: int) -> Reading:
    reading = read_atoms(tensors, table, dims)
    assert not reading.unknown
    assert not reading.bent
    return reading


def put_together(reading: Reading, table: Table, **dims: int) -> dict[str, Assembled]:
    assembly = assemble(reading.atoms, table, dims)
    assert not assembly.faults
    assert not assembly.unplaced
    return {one.name: one for one in assembly.tensors}


@st.composite
def placed(draw: Any, shape: tuple[int, ...], width: int) -> Any:
    """Random elements of a shape, somewhere in a larger array and in any order of axes."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    room = [n * k + draw(st.integers(0, 1)) for n, k in zip(shape, steps, strict=True)]
    seed = draw(st.integers(0, 2**32 - 1))
    start = draw(st.integers(0, 2))
    flat = np.random.default_rng(seed).integers(
        0, 256, (start + math.prod(room)) * width, dtype=np.uint8
    )
    inner = flat.view(f"<u{width}")[start:].reshape([room[at] for at in order])
    inner = inner.transpose(np.argsort(order))
    return inner[tuple(slice(0, n * k, k) for n, k in zip(shape, steps, strict=True))]


SHAPES = {
    "blocks.0.qkv.weight": (6, 5),
    "blocks.11.qkv.weight": (6, 6),
    "conv": (2, 2, 3, 4),
    "mlp": (12, 3, 3),
    "out": (12, 3, 2, 4),
    "kv": (12, 2, 3, 4, 2),
    "position": (1, 4, 4),
    "scale": (),
}


def numpy_parts(name: str, a: Any) -> dict[str, Any]:
    """What each tensor above is made of, by numpy's own functions."""
    if name.startswith("blocks."):
        layer = name.split(".")[1]
        return {f"{layer}.{m}.weight": one for m, one in zip("qkv", np.split(a, 3), strict=True)}
    if name == "conv":
        return {"patch": np.transpose(a, (3, 2, 0, 1))}
    if name == "mlp":
        return {f"{i}.mlp": one.T for i, one in enumerate(a)}
    if name == "out":
        return {f"{i}.out": one.reshape(6, 4).T for i, one in enumerate(a)}
    if name == "kv":
        return {
            f"{i}.{m}": np.swapaxes(a[i, at], 1, 2).reshape(6, 4)
            for i in range(12)
            for at, m in enumerate(("key", "value"))
        }
    return {name: a[0] if name == "position" else a}


@given(st.data())
def test_there_and_back_with_real_bytes(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from(sorted(WIDTHS)))
    names = data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    arrays = {name: data.draw(placed(SHAPES[name], width)) for name in names}
    order = data.draw(st.sampled_from(["little", "big"]))
    tensors = [stored(name, array, DTYPES[WIDTHS[width]], order) for name, array in arrays.items()]
    if order == "big":
        arrays = {name: array.byteswap() for name, array in arrays.items()}
    # forth
    reading = read(tensors, FUSED)
    made = put_together(reading, PLAIN)
    wanted = {key: part for name, a in arrays.items() for key, part in numpy_parts(name, a).items()}
    assert made.keys() == wanted.keys()
    for name, tensor in made.items():
        assert tensor.shape == wanted[name].shape
        assert np.array_equal(content(tensor, width), wanted[name]), name
    # back without a stop: the very bytes
    dims = {"heads": 3}
    for name, tensor in put_together(reading, FUSED, **dims).items():
        assert np.array_equal(content(tensor, width), arrays[name]), name
    # back from what was written in between
    between = [
        stored(name, content(tensor, width).copy(), tensor.dtype) for name, tensor in made.items()
    ]
    again = put_together(read(between, PLAIN), FUSED, **dims)
    assert again.keys() == arrays.keys()
    for name, tensor in again.items():
        assert np.array_equal(content(tensor, width), arrays[name]), name


def test_what_is_cut_and_joined_again_is_one_run() -> None:
    array = np.arange(30, dtype=np.uint32).reshape(6, 5)
    (tensor,) = put_together(
        read([stored("blocks.3.qkv.weight", array, DTYPES["F32"])], FUSED), FUSED
    ).values()
    (run,) = joined(tensor.pieces, "x")
    assert run.is_plain
    assert (run.num_elements, run.offset_bytes) == (30, 0)
    assert stored_bytes(run) == array.tobytes()


def test_neighbours_in_other_files_or_out_of_order_are_not_joined() -> None:
    arrays = [np.full((2, 5), at, np.uint32) for at in range(3)]
    parts = [
        stored(f"3.{m}.weight", one, DTYPES["F32"]) for m, one in zip("kqv", arrays, strict=True)
    ]
    (tensor,) = put_together(read(parts, PLAIN), FUSED).values()
    assert tensor.canonical == tuple(f"layers.3.{m}.weight" for m in "qkv")
    assert len(joined(tensor.pieces, "x")) == 3
    assert content(tensor, 4)[:, 0].tolist() == [1, 1, 0, 0, 2, 2]


def test_a_square_that_is_turned_is_not_the_square() -> None:
    """Same shape, same place, other strides."""
    table = Table((rule("w", "w", "a b -> b a"),))
    plain = Table((rule("w", "w"),))
    array = np.arange(32, dtype=np.uint32).reshape(4, 8)[:, :4]
    tensor = stored("w", array, DTYPES["F32"])
    assert tensor.strides == (8, 1)
    (turned,) = put_together(read([tensor], table), plain).values()
    assert np.array_equal(content(turned, 4), array.T)
    (run,) = joined(turned.pieces, "w")
    assert (run.shape, run.strides) == ((4, 4), (1, 8))


@pytest.mark.parametrize("shape", [(0, 4), (6, 0), (0, 0)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    tensor = stored("blocks.0.qkv.weight", np.empty(shape, np.uint32), DTYPES["F32"])
    reading = read([tensor], FUSED)
    assert {piece.shape for piece in reading.atoms.values()} == {(shape[0] // 3, shape[1])}
    for table in (PLAIN, FUSED):
        for one in put_together(reading, table).values():
            assert content(one, 4).size == 0
    (back,) = put_together(reading, FUSED).values()
    assert back.shape == shape


def test_every_key_is_accounted_for() -> None:
    names = ["blocks.0.qkv.weight", "blocks.0.mask", "blocks.0.qkv", "conv"]
    tensors = [stored(name, np.ones((6, 5), np.uint32), DTYPES["F32"]) for name in names]
    reading = read_atoms(tensors, FUSED, {})
    assert dict(reading.names) == {
        "blocks.0.qkv.weight": tuple(f"layers.0.{m}.weight" for m in "qkv")
    }
    assert dict(reading.dropped) == {"blocks.0.mask": "computed"}
    assert reading.unknown == ("blocks.0.qkv",)
    assert dict(reading.bent) == {"conv": "4 axes wanted, 2 found"}


def test_a_shape_that_does_not_divide_is_bent() -> None:
    tensor = stored("blocks.0.qkv.weight", np.ones((7, 5), np.uint32), DTYPES["F32"])
    reading = read_atoms([tensor], FUSED, {})
    assert reading.bent["blocks.0.qkv.weight"] == "an axis of 7 cannot be divided by 3"
    assert not reading.atoms


def faults(arrays: dict[str, Any], dtypes: dict[str, str] | None = None, **dims: int) -> Assembly:
    tensors = [
        stored(name, array, DTYPES[(dtypes or {}).get(name, "F32")])
        for name, array in arrays.items()
    ]
    return assemble(read(tensors, PLAIN).atoms, FUSED, dims)


def test_what_keeps_a_fused_tensor_from_being_made() -> None:
    one, other = np.ones((2, 5), np.uint32), np.ones((2, 6), np.uint32)
    key = "blocks.4.qkv.weight"
    found = faults({"4.q.weight": one, "4.v.weight": one})
    assert dict(found.faults) == {key: "2 of its 3 parts are there"}
    found = faults({"4.q.weight": one, "4.k.weight": other, "4.v.weight": one})
    assert dict(found.faults) == {key: "its parts have several shapes"}
    found = faults({f"4.{m}.weight": one for m in "qkv"}, {"4.k.weight": "I32"})
    assert "its parts have several dtypes" in found.faults[key]
    assert "`layers.4.k.weight` is I32" in found.faults[key]
    found = faults({"0.mlp": one, "2.mlp": one})
    assert dict(found.faults) == {"mlp": "2 of its 3 parts are there"}
    found = faults({"0.out": one})
    assert "`heads`" in found.faults["out"]
    assert "are not known" in found.faults["out"]
    found = faults({"0.out": np.ones((4, 7), np.uint32)}, heads=3)
    assert found.faults["out"] == "an axis of 7 cannot be divided by 3"
    assert not found.tensors


def test_one_layer_number_that_is_huge_makes_no_huge_list() -> None:
    found = faults({"999999999.mlp": np.ones((2, 5), np.uint32)})
    assert dict(found.faults) == {"mlp": "1 of its 1000000000 parts are there"}


def test_what_has_no_place_is_named() -> None:
    tensors = [stored("blocks.0.qkv.weight", np.ones((6, 5), np.uint32), DTYPES["F32"])]
    assembly = assemble(read(tensors, FUSED).atoms, Table(rename({"a": "b"})), {})
    assert assembly.unplaced == tuple(f"layers.0.{m}.weight" for m in "qkv")
    assert not assembly.tensors


def test_two_names_of_one_tensor_have_to_be_equal_where_they_lie_apart() -> None:
    table = Table((rule("a", "x"), rule("b", "x", mode="alias"), rule("c", "x", mode="read")))
    array = np.ones((2, 5), np.uint32)
    first = stored("a", array, DTYPES["F32"])
    apart = stored("b", array, DTYPES["F32"])
    shared = TensorInfo(name="c", dtype=first.dtype, shape=first.shape, storage=first.storage)
    reading = read([first, apart, shared], table)
    assert [(one.name, other.name) for one, other in reading.equal] == [("a", "b")]
    assert list(reading.atoms) == ["x"]
    assert reading.atoms["x"].source is first
