"""Pairs of names that are probably one tensor: by content, else by name, and never by luck."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from flamingo_ckpt.diff.likeness import find_renamed
from flamingo_ckpt.diff.views import Entry
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.plan import Step
from flamingo_ckpt.tensors import DTYPES, TensorInfo


def entries(path: Path, **tensors: torch.Tensor) -> dict[str, Entry]:
    torch.save({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return {one.name: entry(one) for one in open_checkpoint(str(path)).tensors}


def entry(tensor: TensorInfo) -> Entry:
    step = Step(source=tensor, name=tensor.name, dtype=tensor.dtype)
    return Entry(keys=(tensor.name,), dtype=tensor.dtype, shape=tensor.shape, step=step)


def names(*found: str, shape: tuple[int, ...] = (4,)) -> dict[str, Entry]:
    return {name: entry(TensorInfo(name=name, dtype=DTYPES["F32"], shape=shape)) for name in found}


def paired(ours: dict[str, Entry], theirs: dict[str, Entry], *, reads: bool = False) -> Any:
    return [(one.ours, one.theirs, one.why) for one in find_renamed(ours, theirs, reads=reads)]


def test_content_is_better_evidence_than_a_name(tmp_path: Path) -> None:
    one, other = torch.randn(5, 7), torch.randn(5, 7)
    ours = entries(tmp_path / "a.pt", query=one, key=other)
    theirs = entries(tmp_path / "b.pt", to_k=other, queryy=other + 1, to_q=one)
    assert paired(ours, theirs, reads=True) == [
        ("query", "to_q", "same content"),
        ("key", "to_k", "same content"),
    ]
    assert ("query", "queryy", "same shape, nearest name") in paired(ours, theirs)


def test_content_of_another_shape_or_dtype_is_another_tensor(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    ours = entries(tmp_path / "a.pt", first=matrix)
    turned = entries(tmp_path / "b.pt", second=matrix.T.contiguous())
    assert paired(ours, turned, reads=True) == [("first", "second", "equal after transpose")]
    assert paired(ours, entries(tmp_path / "c.pt", x=matrix.reshape(6, 4)), reads=True) == []
    bits = entries(tmp_path / "d.pt", x=matrix.view(torch.int32))
    assert paired(ours, bits, reads=True) == []


def test_equal_content_on_one_side_decides_nothing(tmp_path: Path) -> None:
    ours = entries(tmp_path / "a.pt", alpha=torch.zeros(3), beta=torch.zeros(3))
    theirs = entries(tmp_path / "b.pt", gamma_long_name=torch.zeros(3))
    assert paired(ours, theirs, reads=True) == []


def test_a_name_that_two_are_as_near_to_stays_alone() -> None:
    assert paired(names("a.weightx"), names("a.weight")) == [
        ("a.weightx", "a.weight", "same shape, nearest name")
    ]
    assert paired(names("a.weight1x", "a.weight2x"), names("a.weightx")) == []
    # the nearer one wins where there is one
    found = paired(names("a.weightzz", "a.weightxx"), names("a.weightxy"))
    assert [one[:2] for one in found] == [("a.weightxx", "a.weightxy")]


def test_other_numbers_shapes_and_dtypes_are_other_tensors() -> None:
    assert paired(names("layers.1.weight"), names("layers.2.weight")) == []
    assert paired(names("weigth"), names("weight", shape=(2, 2))) == []
    assert paired(names("norm.bias"), names("projection.weight")) == []


def test_many_names_take_no_time() -> None:
    shape = (8,)
    ours = names(*(f"model.encoder.block{n:05d}abc.weight" for n in range(10_000)), shape=shape)
    theirs = names(*(f"model.decoder.block{n:05d}xyz.weight" for n in range(10_000)), shape=shape)
    layered = {f"layers.{n}.{k}": one for n in range(2500) for k, one in names(*"abcd").items()}
    other = {f"layers.{n}.{k}x": one for n in range(2500) for k, one in names(*"abcd").items()}
    hostile = names("a" * 100_000 + "b"), names("b" + "a" * 100_000)
    for pair in ((ours, theirs), (layered, other), hostile):
        started = time.perf_counter()
        find_renamed(*pair, reads=False)
        assert time.perf_counter() - started < 20  # seconds; unbounded it is hours
