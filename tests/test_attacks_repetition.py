"""Small files that say one large thing again and again: bounded work, bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures import handmade as hm
from tests.attacks_support import put_file
from tests.test_attacks_limits import in_bounds, refusal

# One that goes off must not hold up the run.
pytestmark = pytest.mark.timeout(120)


def again(first: bytes, times: int) -> bytes:
    """`first` under one name, and references to it under many others."""
    pairs = [("first", first + hm.put(0))]
    return hm.mapping([*pairs, *((f"k{n}", hm.get(0)) for n in range(times))])


def test_a_large_dict_named_often_is_described_cheaply(tmp_path: Path) -> None:
    pair = hm.listing(hm.number(0), hm.number(0))
    big = hm.call(hm.named("collections", "OrderedDict"), hm.listing(*[pair] * 30_000))
    body = hm.mapping([("state_dict", hm.state_dict()), ("beside", again(big, 30_000))])
    flat = hm.mapping(
        [
            ("weight", hm.tensor()),
            ("big", big + hm.put(0)),
            *((f"k{n}", hm.get(0)) for n in range(30_000)),
        ]
    )
    for name, content in (("nested.pt", body), ("flat.pt", flat)):
        assert in_bounds(put_file(tmp_path, hm.torch_zip(content), name)) == ""


def test_tensor_metadata_is_short(tmp_path: Path) -> None:
    metadata = hm.mapping((f"k{n}", b"N") for n in range(17))
    body = hm.mapping([("w", hm.tensor(rest=[metadata]))])
    assert refusal(put_file(tmp_path, hm.torch_zip(body))) == "FC110"
    few = hm.mapping((f"k{n}", b"N") for n in range(16))
    body = hm.mapping([("w", hm.tensor(rest=[few]))])
    assert in_bounds(put_file(tmp_path, hm.torch_zip(body), "few.pt")) == ""


def test_names_of_very_many_dots_are_listed(tmp_path: Path) -> None:
    names = ["a." * 20_000 + "w", "b." * 20_000 + "w", "." * 20_000]
    header = {name: hm.entry(16 * n, 16 * n + 16) for n, name in enumerate(names)}
    path = put_file(tmp_path, hm.safetensors(header, hm.WEIGHT * 3), "deep.safetensors")
    assert in_bounds(path, text=True) == ""
    assert in_bounds(path) == ""


def test_modules_shared_by_very_many_are_bounded(tmp_path: Path) -> None:
    shared = hm.module("X", [(str(n), hm.number(0)) for n in range(1000)])
    pairs = [("A", shared + hm.put(0)), *((f"m{n}", hm.get(0)) for n in range(30_000))]
    path = put_file(tmp_path, hm.script_zip(hm.module("R", pairs)))
    assert in_bounds(path) == "FC111"
