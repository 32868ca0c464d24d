"""What a pickle may say about a tensor, and what of it would change the tensor."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fixtures import handmade as hm
from tests.attacks_support import converted, put_file, refused

STORES = {"0": hm.WEIGHT, "1": struct.pack("<4f", 9.0, 8.0, 7.0, 6.0)}
KEPT = {"w": ("F32", [2, 2], STORES["0"]), "x": ("F32", [2, 2], STORES["1"])}
OTHER = hm.tensor(hm.storage("1"))


def put(folder: Path, weight: bytes) -> Path:
    body = hm.mapping([("w", weight), ("x", OTHER)])
    return put_file(folder, hm.torch_zip(body, STORES))


def parameter(state: bytes) -> bytes:
    return hm.call(
        hm.named("torch._utils", "_rebuild_parameter_with_state"),
        hm.tensor(),
        b"\x89",
        hm.call(hm.named("collections", "OrderedDict")),
        state,
    )


def from_type(state: bytes) -> bytes:
    whole = hm.tensor()
    function = hm.named("torch._utils", "_rebuild_tensor_v2")
    assert whole.startswith(function)
    assert whole.endswith(b"R")
    return hm.call(
        hm.named("torch._tensor", "_rebuild_from_type_v2"),
        function,
        hm.named("torch", "Tensor"),
        whole[len(function) : -1],
        state,
    )


@pytest.mark.parametrize("state", [hm.group(OTHER), hm.mapping([("data", OTHER)])])
def test_build_on_a_tensor_is_refused(state: bytes, tmp_path: Path) -> None:
    refused(put(tmp_path, hm.tensor() + state + b"b"), "FC110")


def test_items_set_on_a_tensor_are_refused(tmp_path: Path) -> None:
    refused(put(tmp_path, hm.tensor() + hm.text("data") + OTHER + b"s"), "FC110")


@pytest.mark.parametrize("wrap", [parameter, from_type])
@pytest.mark.parametrize("key", ["data", "grad", "real", "imag"])
def test_state_that_replaces_the_bytes_is_refused(wrap, key: str, tmp_path: Path) -> None:
    state = hm.mapping([(key, OTHER)])
    refused(put(tmp_path, wrap(state)), "FC110")


@pytest.mark.parametrize("wrap", [parameter, from_type])
def test_so_is_the_second_half_of_a_state(wrap, tmp_path: Path) -> None:
    slots = hm.group(hm.mapping([("note", b"N")]), hm.mapping([("data", OTHER)]))
    refused(put(tmp_path, wrap(slots)), "FC110")


@pytest.mark.parametrize("wrap", [parameter, from_type])
def test_state_that_is_no_mapping_is_refused(wrap, tmp_path: Path) -> None:
    refused(put(tmp_path, wrap(hm.number(5))), "FC110")
    body = hm.mapping([(hm.number(1), OTHER)])
    refused(put_file(tmp_path, put(tmp_path, wrap(body)).read_bytes(), "other.pt"), "FC110")


@pytest.mark.parametrize("wrap", [parameter, from_type])
@pytest.mark.parametrize(
    "state",
    [
        hm.mapping([("tensor_model_parallel", b"\x88"), ("note", hm.text("mine"))]),
        hm.group(b"N", hm.mapping([("note", hm.number(1))])),
        b"}",
    ],
    ids=["attributes", "slots", "empty"],
)
def test_plain_attributes_are_no_news(wrap, state: bytes, tmp_path: Path) -> None:
    assert converted(put(tmp_path, wrap(state))) == KEPT


def ordered(pairs: bytes) -> bytes:
    return hm.call(hm.named("collections", "OrderedDict"), pairs)


@pytest.mark.parametrize("outer", [hm.group, hm.listing])
@pytest.mark.parametrize("inner", [hm.group, hm.listing])
def test_pairs_of_a_dict_are_read_whole(outer, inner, tmp_path: Path) -> None:
    pairs = outer(inner(hm.text("w"), hm.tensor()))
    body = ordered(pairs) + hm.text("x") + OTHER + b"s"
    assert converted(put_file(tmp_path, hm.torch_zip(body, STORES))) == KEPT


@pytest.mark.parametrize(
    "pairs",
    [
        hm.group(hm.group(hm.text("w"), hm.tensor(), b"N")),
        hm.group(hm.group(hm.text("w"), hm.tensor()), hm.group(hm.text("alone"))),
        hm.listing(hm.text("wx")),
        hm.number(3),
    ],
    ids=["triple", "single", "text", "number"],
)
def test_malformed_pairs_are_no_dict(pairs: bytes, tmp_path: Path) -> None:
    body = ordered(pairs) + hm.text("x") + OTHER + b"s"
    refused(put_file(tmp_path, hm.torch_zip(body, STORES)), {"FC110", "FC201", "FC502"})
