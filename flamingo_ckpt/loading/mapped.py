"""Tensors whose bytes stay in the file until they are touched.

A map is private: writing to a weight gives this process a page of its own, and never reaches the
file. The file itself has to stay as it is while the module lives, as with every mapped file.
"""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

from flamingo_ckpt.formats.checksum import crc32
from flamingo_ckpt.formats.extract import BLOCK_BYTES, check_crc
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.stream import covers

if TYPE_CHECKING:
    import torch

    from flamingo_ckpt.plan import Step
    from flamingo_ckpt.tensors import TensorInfo


class MappedFiles:
    """The files of one load, each mapped once."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def tensor(self, step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """The tensor over the file's own bytes; None where they are not a tensor's as they lie.

        Raises:
            FormatError: FC105 where the checksum of a torch file's record does not fit.
        """
        import torch

        (run, *more) = step.runs
        if more or run.storage is None or not run.is_plain or not run.num_bytes:
            return None
        source, base = run.storage.locate()
        start = base + run.offset_bytes
        if not isinstance(source, FileSource) or start % dtype.itemsize:
            return None
        with self._lock:
            held = self._maps.get(id(source))
            if held is None:
                held = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
                self._maps[id(source)] = held
        if start + run.num_bytes > len(held):
            return None
        _check(run, memoryview(held)[base : base + run.storage.num_bytes])
        count = run.num_elements
        return torch.frombuffer(held, dtype=dtype, count=count, offset=start).view(shape)

    def release(self, step: Step) -> None:
        """Let go of the pages of a tensor that nobody has written to; they can be read again."""
        run = step.runs[0]
        if run.storage is None:
            return
        source, base = run.storage.locate()
        with self._lock:
            held = self._maps.get(id(source))
        if held is None:
            return
        start = base + run.offset_bytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # its neighbours keep theirs
        last = (start + run.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            held.madvise(mmap.MADV_DONTNEED, first, last - first)


def _check(run: TensorInfo, storage_bytes: memoryview) -> None:
    """The storage's checksum, where there is one and the tensor is all of it."""
    storage = run.storage
    if storage is None or storage.crc32 is None or not covers(run):
        return
    crc = 0
    for at in range(0, len(storage_bytes), BLOCK_BYTES):
        crc = crc32(storage_bytes[at : at + BLOCK_BYTES], crc)
    check_crc(storage.crc32, crc, storage.where)
