"""What Linux offers and Python does not: exchange by rename, allocation, early writeback.

Each does nothing, or says so, where the system or the filesystem has no such call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_SYNC_FILE_RANGE_WRITE = 2
_WRITEBACK_SECONDS = 0.1
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def renameat2(src: str, dst: str, flags: int) -> bool:
    """Rename with flags; False where there is no such call.

    Raises:
        OSError: as rename does; EEXIST with `RENAME_NOREPLACE`.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), dst)


def allocate(fd: int, num_bytes: int) -> None:
    """Give a file its size and, where the filesystem can, its room on disk.

    A full disk is then known before the first byte, and the kernel has less to do for each page.
    Not `os.posix_fallocate`: the C library emulates it by writing where the filesystem cannot.

    Raises:
        OSError: ENOSPC where there is no room.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is not None and num_bytes:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        while function(fd, 0, 0, num_bytes):
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
    os.ftruncate(fd, num_bytes)


@contextmanager
def early_writeback(fd: int) -> Iterator[None]:
    """Let the disk work while the file is being written, so that the sync at the end is short.

    Left alone, the kernel begins only when a tenth of the memory is dirty.
    """
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        yield
        return
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    done = threading.Event()

    def push() -> None:
        while not done.wait(_WRITEBACK_SECONDS):
            function(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
