"""Digests of files while they are read, as the hub and a report of `check` state them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.hub.listing import HubFile

_BLOCK_BYTES = 1 << 20


def sha256_of(path: str, on_bytes: Callable[[int], None] = lambda _: None) -> tuple[str, int]:
    """(SHA-256, number of bytes) of a file.

    Raises:
        CkptError: FC002 where it cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                num_bytes += len(block)
                on_bytes(len(block))
    except OSError as error:
        raise CkptError(
            f"cannot read `{path}`: {error.strerror}", code="FC002", where=path
        ) from error
    return digest.hexdigest(), num_bytes


def copy_checked(src: str, dst: str, expected: HubFile) -> tuple[str, bool]:
    """Copy a file to a new one, synced, and compare what was copied with what the hub lists.

    Returns:
        Its SHA-256, and whether size and digest are as listed.
    """
    sha256 = hashlib.sha256()
    # git's own digest is all that the hub has of small files; it is no protection against malice
    blob = hashlib.sha1(b"blob %d\0" % expected.num_bytes, usedforsecurity=False)
    num_bytes = 0
    fd = os.open(dst, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    with open(src, "rb") as source, open(fd, "wb") as target:
        while block := source.read(_BLOCK_BYTES):
            sha256.update(block)
            if expected.blob_id is not None:
                blob.update(block)
            num_bytes += len(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    found = sha256.hexdigest()
    is_right = num_bytes == expected.num_bytes
    if expected.sha256 is not None:
        is_right = is_right and found == expected.sha256
    elif expected.blob_id is not None:
        is_right = is_right and blob.hexdigest() == expected.blob_id
    return found, is_right


def git_blob_id(content: bytes) -> str:
    """Git's name for a small file."""
    start = b"blob %d\0" % len(content)
    return hashlib.sha1(start + content, usedforsecurity=False).hexdigest()
