"""Byte sources: a local file, and a deflated run inside another source.

Readers ask a source for ranges and for nothing else, so that a remote file can stand behind them.
"""

from __future__ import annotations

import os
import stat
import threading
import zlib
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import CkptError, FormatError, UnsafeError
from flamingo_ckpt.tensors import ByteSource, escape

_CHECKPOINT_BYTES = 32 << 20  # inflated bytes between two kept decompressor states
_INFLATE_BLOCK = 256 << 10


class FileSource:
    """A regular file, opened once; reads are positional, so threads may share it."""

    def __init__(self, path: str, name: str | None = None) -> None:
        self.path = path
        self._name = name or path
        try:
            # O_NONBLOCK: opening a FIFO must not hang before we can see that it is one.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CkptError(
                f"cannot open `{self._name}`: {error.strerror}", code="FC002", where=self._name
            ) from error
        self.status = os.fstat(self._fd)
        if not stat.S_ISREG(self.status.st_mode):
            self.close()
            raise CkptError(f"`{self._name}` is not a regular file", code="FC002", where=self._name)

    @property
    def name(self) -> str:
        """The path as the user named it."""
        return self._name

    @property
    def size(self) -> int:
        """Length when it was opened."""
        return self.status.st_size

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self._short(offset, size)
        try:
            data = os.pread(self._fd, size, offset)
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    raise self._short(offset, size)
                data += more
        except OSError as error:
            raise self._failed(error) from error
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        wanted = len(buffer)
        try:
            done = os.preadv(self._fd, [buffer], offset)
            while done < wanted:
                more = os.preadv(self._fd, [buffer[done:]], offset + done)
                if not more:
                    raise self._short(offset, wanted)
                done += more
        except OSError as error:
            raise self._failed(error) from error

    def fileno(self) -> int:
        """The descriptor, for mapping the file; it stays this object's."""
        return self._fd

    def check_unchanged(self) -> None:
        """Raise FC007 when the file is no longer the one that was opened."""
        now = os.fstat(self._fd)
        before = self.status
        facts = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in (before, now)]
        try:
            there = os.stat(self.path)
            facts.append((there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns))
        except OSError:
            facts.append((0, 0, 0, 0))
        if any(fact != facts[0] for fact in facts):
            raise CkptError(
                f"`{self._name}` changed while it was read",
                code="FC007",
                where=self._name,
                hint="wait until its writer has finished, then run the same command again",
            )

    def close(self) -> None:
        """Give the descriptor back; reading afterwards fails."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _short(self, offset: int, size: int) -> FormatError:
        return FormatError(
            f"bytes {offset} to {offset + size} are asked for, the file has {self.size}",
            code="FC102",
            where=self._name,
            hint="the file is truncated or damaged; copy or download it again",
        )

    def _failed(self, error: OSError) -> CkptError:
        return CkptError(f"cannot read: {error.strerror}", code="FC002", where=self._name)


@dataclass(slots=True)
class _Resume:
    """A decompressor state: everything up to `produced` has been inflated."""

    produced: int
    consumed: int
    state: Any


class InflatedSource:
    """A raw deflate run seen as its inflated bytes, in bounded memory.

    Reading forward is cheap; reading backward resumes from the nearest kept decompressor state.

    Args:
        source: where the compressed bytes are.
        offset: of the first compressed byte.
        compressed: length of the compressed run.
        size: length it must inflate to; more or less is an error.
        name: what to call it in messages.
    """

    def __init__(
        self, source: ByteSource, offset: int, compressed: int, size: int, name: str
    ) -> None:
        self._source = source
        self._offset = offset
        self._compressed = compressed
        self._size = size
        self._name = name
        self._lock = threading.Lock()
        self._resumes = [_Resume(0, 0, zlib.decompressobj(-zlib.MAX_WBITS))]
        self._at = self._fork(self._resumes[0])
        self._window_start = 0
        self._window = b""

    @property
    def name(self) -> str:
        """The record's name."""
        return self._name

    @property
    def size(self) -> int:
        """Inflated length."""
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` inflated bytes from `offset`."""
        if offset < 0 or size < 0 or offset + size > self._size:
            raise self._bad(f"bytes {offset} to {offset + size} of {self._size} are asked for")
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with inflated bytes from `offset`."""
        with self._lock:
            self._seek(offset)
            done = 0
            while done < len(buffer):
                begin = offset + done - self._window_start
                if begin >= len(self._window):
                    self._advance()
                    continue
                piece = self._window[begin : begin + len(buffer) - done]
                buffer[done : done + len(piece)] = piece
                done += len(piece)

    def _seek(self, offset: int) -> None:
        if self._window_start <= offset <= self._at.produced:
            return
        if offset < self._window_start:
            nearest = max(
                (resume for resume in self._resumes if resume.produced <= offset),
                key=lambda resume: resume.produced,
            )
            self._at = self._fork(nearest)
            self._window_start, self._window = self._at.produced, b""

    def _advance(self) -> None:
        """Inflate one more block into the window."""
        at = self._at
        pending: bytes = at.state.unconsumed_tail
        if not pending and at.consumed < self._compressed:
            take = min(_INFLATE_BLOCK, self._compressed - at.consumed)
            pending = self._source.read(self._offset + at.consumed, take)
            at.consumed += take
        room = min(_INFLATE_BLOCK, self._size + 1 - at.produced)
        try:
            block: bytes = at.state.decompress(pending, room)
        except zlib.error as error:
            raise self._bad(f"compressed data is damaged: {error}") from error
        self._window_start, self._window = at.produced, block
        at.produced += len(block)
        if at.produced > self._size:
            raise self._bad(f"it inflates to more than the {self._size} bytes declared")
        exhausted = at.consumed >= self._compressed and not at.state.unconsumed_tail
        if not block and (at.state.eof or exhausted):
            raise self._bad(f"it inflates to {at.produced} of {self._size} bytes")
        if at.produced - self._resumes[-1].produced >= _CHECKPOINT_BYTES:
            self._resumes.append(self._fork(at))

    @staticmethod
    def _fork(resume: _Resume) -> _Resume:
        return _Resume(resume.produced, resume.consumed, resume.state.copy())

    def _bad(self, message: str) -> FormatError:
        return FormatError(message, code="FC102", where=self._name)


def check_contained(folder: str, path: str) -> None:
    """A symbolic link may lead within the folder, or into the blobs of the hub cache above it."""
    real_folder, real = os.path.realpath(folder), os.path.realpath(path)
    allowed = [real_folder]
    at = real_folder
    while at != (above := os.path.dirname(at)):  # the folder of a commit, or one below it
        if os.path.basename(above) == "snapshots":
            allowed.append(os.path.join(os.path.dirname(above), "blobs"))
        at = above
    if not any(os.path.commonpath([root, real]) == root for root in allowed):
        raise UnsafeError(
            f"`{escape(os.path.basename(path))}` is a link that leads out of the folder",
            code="FC503",
            where=path,
            hint="copy the file into the folder, or name its target",
        )
