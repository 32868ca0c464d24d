"""Strided extraction in tiny blocks gives what numpy and torch call contiguous."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ckpt.formats import extract
from flamingo_ckpt.tensors import DTYPES, Storage, TensorInfo
from tests.support import MemorySource, cli, facts_at

_WIDTHS = {"U8": 1, "F16": 2, "F32": 4, "F64": 8, "C128": 16}


@contextmanager
def limits(block: int, gather: int, span: int) -> Iterator[None]:
    """Small buffers, so that small tensors take every path that large ones take."""
    with (
        mock.patch.object(extract, "BLOCK_BYTES", block),
        mock.patch.object(extract, "_GATHER_BYTES", gather),
        mock.patch.object(extract, "_SPAN_BYTES", span),
    ):
        yield


def read(info: TensorInfo, block: int) -> bytes:
    return b"".join(bytes(part) for part in extract.read_blocks(info, bytearray(block)))


def tensor_info(
    data: bytes,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    offset: int,
    byteorder: str = "little",
) -> TensorInfo:
    source = MemorySource(b"\xaa" * 7 + data)
    storage = Storage(key="0", num_bytes=len(data), locate=lambda: (source, 7))
    return TensorInfo(
        name="t",
        dtype=DTYPES[dtype],
        shape=shape,
        storage=storage,
        offset_bytes=offset * _WIDTHS[dtype],
        strides=strides,
        byteorder=byteorder,
    )


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset: any that torch can save, overlapping and expanded ones too."""
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)))
    strides = tuple(draw(st.integers(0, 40)) for _ in shape)
    return shape, strides, draw(st.integers(0, 5))


_limits = st.tuples(
    st.sampled_from([16, 32, 48, 256]),
    st.sampled_from([1, 16, 64, 4096]),
    st.sampled_from([1, 40, 300]),
)


@settings(max_examples=200)
@given(
    layout=layouts(),
    dtype=st.sampled_from(sorted(_WIDTHS)),
    sizes=_limits,
    big=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_strides(
    layout: tuple[tuple[int, ...], tuple[int, ...], int],
    dtype: str,
    sizes: tuple[int, int, int],
    big: bool,
    seed: int,
) -> None:
    shape, strides, offset = layout
    width = _WIDTHS[dtype]
    count = offset + 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    data = numpy.random.default_rng(seed).integers(0, 256, count * width, dtype="u1")
    array = numpy.lib.stride_tricks.as_strided(
        data.view(f"V{width}")[offset:], shape, [s * width for s in strides]
    )
    wanted = numpy.ascontiguousarray(array).tobytes()
    if big:
        unit = DTYPES[dtype].swap_bytes
        wanted = numpy.frombuffer(wanted, dtype=f"u{unit}").byteswap().tobytes()
    info = tensor_info(data.tobytes(), dtype, shape, strides, offset, "big" if big else "little")
    with limits(*sizes):
        assert read(info, sizes[0]) == wanted


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    data=st.data(),
    sizes=_limits,
)
def test_views_that_torch_makes(
    shape: list[int], data: st.DataObject, sizes: tuple[int, int, int]
) -> None:
    base = torch.randn(shape)
    view = base.permute(data.draw(st.permutations(range(len(shape)))))
    for dim in range(view.dim()):
        start = data.draw(st.integers(0, view.shape[dim] - 1))
        step = data.draw(st.integers(1, 3))
        view = view[(slice(None),) * dim + (slice(start, None, step),)]
    info = tensor_info(
        base.numpy().tobytes(), "F32", tuple(view.shape), view.stride(), view.storage_offset()
    )
    with limits(*sizes):
        assert read(info, sizes[0]) == view.contiguous().numpy().tobytes()


def test_contiguous_tensors_come_in_blocks_of_the_limit() -> None:
    data = numpy.random.default_rng(0).bytes(1000)
    info = tensor_info(data, "U8", (1000,), None, 0)
    with limits(256, 64, 64):
        sizes = [len(part) for part in extract.read_blocks(info, bytearray(256))]
    assert sizes == [256, 256, 256, 232]


def test_reads_of_a_sparse_view_stay_near_the_wanted_bytes() -> None:
    """One column of a wide matrix must not read the matrix."""
    asked: list[int] = []

    class Counting(MemorySource):
        def read(self, offset: int, size: int) -> bytes:
            asked.append(size)
            return super().read(offset, size)

    data = numpy.random.default_rng(1).bytes(200 * 300 * 4)
    source = Counting(data)
    storage = Storage(key="0", num_bytes=len(data), locate=lambda: (source, 0))
    info = TensorInfo(name="t", dtype=DTYPES["F32"], shape=(200,), storage=storage, strides=(300,))
    array = numpy.frombuffer(data, dtype="<f4").reshape(200, 300)
    assert read(info, extract.BLOCK_BYTES) == array[:, 0].tobytes()
    assert sum(asked) <= 8 * 200 * 4
    assert max(asked) <= math.prod(info.shape) * 4


def test_a_gather_from_a_large_deflated_record_is_refused(tmp_path: Path) -> None:
    wide = numpy.asfortranarray(numpy.arange(400.0, dtype="<f4").reshape(20, 20))
    numpy.savez_compressed(tmp_path / "deflated.npz", w=wide)
    numpy.savez(tmp_path / "stored.npz", w=wide)
    numpy.savez_compressed(tmp_path / "rows.npz", w=numpy.ascontiguousarray(wide))
    wanted = facts_at(tmp_path / "rows.npz")
    assert facts_at(tmp_path / "deflated.npz") == wanted
    with mock.patch.object(extract, "_MAX_INFLATED_GATHER", 1000):
        dst = tmp_path / "a.safetensors"
        outcome = cli("convert", tmp_path / "deflated.npz", dst, "--json")
        assert (outcome.code, outcome.codes) == (2, ["FC109"])
        assert not dst.exists()
        assert facts_at(tmp_path / "stored.npz") == wanted
        assert facts_at(tmp_path / "rows.npz") == wanted
