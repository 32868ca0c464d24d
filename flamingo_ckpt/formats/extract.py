"""A tensor's logical bytes (row-major, little-endian) in bounded blocks, however it is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import FormatError
from flamingo_ckpt.formats.source import InflatedSource
from flamingo_ckpt.tensors import ByteSource, TensorInfo, contiguous_strides, escape

if TYPE_CHECKING:
    import numpy

#: The block that every copy is made of: larger ones are slower where memory is given on touch.
BLOCK_BYTES = 256 << 10
# Strided tensors: output gathered per step, and the largest single read for it.
_GATHER_BYTES = 4 << 20
_SPAN_BYTES = 1 << 20
# A deflated record can only be read forward, and a gather goes over it once per box.
_MAX_INFLATED_GATHER = 64 << 20
# Below this share of wanted bytes in a span, its runs are read one by one.
_MIN_DENSITY = 1 / 32


def read_blocks(
    tensor: TensorInfo, buffer: bytearray, into: memoryview | None = None
) -> Iterator[memoryview]:
    """Yield the tensor's bytes in order; each block is valid until the next one is asked for.

    Args:
        tensor: must have a storage.
        buffer: at least `BLOCK_BYTES` long, reused for every block.
        into: as long as the tensor: where a contiguous one's bytes are read to, instead of
            `buffer`; the blocks are then parts of it.

    Raises:
        FormatError: where the file has fewer bytes than its header promises.
    """
    if tensor.storage is None:
        raise ValueError(f"{tensor.name} has no bytes")
    if tensor.num_bytes == 0:
        return
    source, base = tensor.storage.locate()
    swap = tensor.byteorder == "big" and tensor.dtype.swap_bytes > 1
    if tensor.strides is not None:
        if isinstance(source, InflatedSource) and source.size > _MAX_INFLATED_GATHER:
            raise FormatError(
                f"`{escape(tensor.name)}` is not contiguous, and deflated: it would be inflated "
                "again and again",
                code="FC109",
                where=source.name,
                hint="pack the archive again without compression",
            )
        yield from _gathered(tensor, source, base, swap)
        return
    view = memoryview(buffer)[:BLOCK_BYTES]
    start, end = base + tensor.offset_bytes, base + tensor.offset_bytes + tensor.num_bytes
    at = start
    while at < end:
        size = min(BLOCK_BYTES, end - at)
        block = view[:size] if into is None else into[at - start : at - start + size]
        source.read_into(at, block)
        if swap:
            _swap_in_place(block, tensor.dtype.swap_bytes)
        yield block
        at += len(block)


def _swap_in_place(block: memoryview, width: int) -> None:
    import numpy

    numpy.frombuffer(block, dtype=f"u{width}").byteswap(inplace=True)


def _gathered(
    tensor: TensorInfo, source: ByteSource, base: int, swap: bool
) -> Iterator[memoryview]:
    """Split the tensor into runs of its leading dimensions, gather each into one array."""
    import numpy

    width = tensor.dtype.bits // 8
    strides = tensor.strides or contiguous_strides(tensor.shape)
    origin = base + tensor.offset_bytes
    limit = min(max(_GATHER_BYTES // width, 1), math.prod(tensor.shape))
    # Allocated once: a new array for each box would come to stand beside the last one.
    room: numpy.ndarray[Any, Any] = numpy.empty(limit, dtype=f"V{width}")
    raw: numpy.ndarray[Any, Any] = numpy.empty(max(_SPAN_BYTES // width, 1), dtype=f"V{width}")
    for starts, sizes in _boxes(tensor.shape, limit):
        out = room[: math.prod(sizes)].reshape(sizes)
        first = origin + width * sum(a * s for a, s in zip(starts, strides, strict=True))
        _gather(source, first, strides, out, raw)
        if swap:
            out.reshape(-1).view(f"u{tensor.dtype.swap_bytes}").byteswap(inplace=True)
        flat = memoryview(out.reshape(-1).view("u1"))  # type: ignore[arg-type]
        for at in range(0, len(flat), BLOCK_BYTES):
            yield flat[at : at + BLOCK_BYTES]


def _boxes(shape: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, size) boxes of at most `limit` elements that follow each other in row-major order."""
    dim = 0
    while dim < len(shape) - 1 and math.prod(shape[dim + 1 :]) > limit:
        dim += 1
    inner = math.prod(shape[dim + 1 :])
    step = max(limit // max(inner, 1), 1)
    tail_start, tail_size = (0,) * (len(shape) - dim - 1), shape[dim + 1 :]
    for outer in _indices(shape[:dim]):
        for start in range(0, shape[dim], step):
            size = min(step, shape[dim] - start)
            yield (*outer, start, *tail_start), (*(1,) * dim, size, *tail_size)


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for head in range(shape[0]):
        for tail in _indices(shape[1:]):
            yield (head, *tail)


def _gather(
    source: ByteSource,
    first: int,
    strides: tuple[int, ...],
    out: numpy.ndarray[Any, Any],
    raw: numpy.ndarray[Any, Any],
) -> None:
    """Fill `out` from strided elements; reads one span where the wanted bytes are dense in it.

    Args:
        source: the file.
        first: offset of the first element, in bytes.
        strides: of the source, in elements.
        out: to be filled; its dtype is as wide as an element.
        raw: scratch for one span.
    """
    import numpy

    width = out.dtype.itemsize
    sizes = out.shape
    span = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    wanted = math.prod(n for n, s in zip(sizes, strides, strict=True) if s)
    if (span * width <= _SPAN_BYTES and wanted >= span * _MIN_DENSITY) or span == 1:
        source.read_into(first, memoryview(raw[:span].view("u1")))  # type: ignore[arg-type]
        byte_strides = tuple(s * width for s in strides)
        out[...] = numpy.lib.stride_tricks.as_strided(raw, sizes, byte_strides)
        return
    # Split along the widest dimension: into halves where a span is only too long, into single
    # indices where it is mostly bytes that nobody wants.
    dim = max((d for d, n in enumerate(sizes) if n > 1), key=lambda d: strides[d])
    sparse = wanted < span * _MIN_DENSITY
    step = 1 if sparse else (sizes[dim] + 1) // 2
    for start in range(0, sizes[dim], step):
        part = [slice(None)] * len(sizes)
        part[dim] = slice(start, start + step)
        begin = first + start * strides[dim] * width
        _gather(source, begin, strides, out[tuple(part)], raw)


def read_whole_crc(tensor_storage: Any, buffer: bytearray) -> int:
    """CRC-32 of a whole storage, in blocks."""
    from flamingo_ckpt.formats.checksum import crc32

    source, at = tensor_storage.locate()
    end = at + tensor_storage.num_bytes
    view, crc = memoryview(buffer)[:BLOCK_BYTES], 0
    while at < end:
        block = view[: min(BLOCK_BYTES, end - at)]
        source.read_into(at, block)
        crc = crc32(block, crc)
        at += len(block)
    return crc


def check_crc(stored: int, computed: int, where: str) -> None:
    """Raise FC105 where a storage's checksum does not fit its bytes."""
    if stored != computed:
        raise FormatError(
            f"the stored CRC-32 is {stored:08x}, the bytes have {computed:08x}: they are damaged",
            code="FC105",
            where=where,
            hint="torch does not notice this; copy or download the file again",
        )
