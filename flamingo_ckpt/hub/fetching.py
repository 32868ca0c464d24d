"""A listed file into the cache of `huggingface_hub`: resumed, and held to its digest.

`huggingface_hub` itself starts a large file over when its process was ended, and compares no
digest. So the bytes are brought here: into a partial file beside the blobs of its cache, which the
next run goes on with, and which becomes a blob once its digest is the one that the hub lists. The
links of the cache are left to the library, which finds the blob there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from typing import Any

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.hub.download import download
from flamingo_ckpt.hub.failures import Ask
from flamingo_ckpt.hub.http import Http
from flamingo_ckpt.hub.listing import HubFile, ask_for
from flamingo_ckpt.hub.names import HubUri
from flamingo_ckpt.hub.remote import RemoteSource
from flamingo_ckpt.tensors import escape

# Smaller files are brought by the library, in one request and one answer.
_LARGE_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_PARTIAL = ".flamingo-partial"


def fetch_file(
    place: HubUri, file: HubFile, on_bytes: Callable[[int], None], *, force: bool = False
) -> str:
    """The local path of a file in the cache; downloaded unless it is there.

    Args:
        place: of the repository, at a commit.
        file: as listed.
        on_bytes: told of bytes as they arrive.
        force: bring it again, whatever the cache has.

    Raises:
        CkptError: FC004 the cache cannot be written, FC470 to FC477, FC479 another digest than the
            listed one, twice.
    """

    def by_the_library(*, again: bool) -> str:
        return download(
            place.repo_id, file.path, revision=place.revision, on_bytes=on_bytes, force=again
        )

    blob = _blob_path(place.repo_id, file)
    if file.num_bytes < _LARGE_BYTES or blob is None:
        return by_the_library(again=force)
    if force and os.path.exists(blob):
        os.unlink(blob)
    if not os.path.exists(blob):
        ask = ask_for(place, file.path)
        try:
            os.makedirs(os.path.dirname(blob), exist_ok=True)
            _bring(place, file, blob, on_bytes)
        except OSError as error:
            raise _not_written(error, ask) from error
    return by_the_library(again=False)


def _blob_path(repo_id: str, file: HubFile) -> str | None:
    """Where the cache keeps a content; None where the hub lists no digest of it."""
    from huggingface_hub import constants

    if file.digest is None:
        return None
    folder = "--".join(["models", *repo_id.split("/")])
    return os.path.join(constants.HF_HUB_CACHE, folder, "blobs", file.digest)


def _bring(place: HubUri, file: HubFile, blob: str, on_bytes: Callable[[int], None]) -> None:
    partial = blob + _PARTIAL
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # another run that brings the same file is waited for
        if os.path.exists(blob):
            return
        for is_last in (False, True):
            if _fill(place, file, fd, on_bytes):
                os.fsync(fd)
                os.rename(partial, blob)
                return
            os.ftruncate(fd, 0)  # damaged on the way, or what was there before: once more
            if is_last:
                raise _differs(place, file)
    finally:
        os.close(fd)


def _fill(place: HubUri, file: HubFile, fd: int, on_bytes: Callable[[int], None]) -> bool:
    """Bring what is missing; whether the whole has the digest that is listed."""
    digest = _new_digest(file)
    have = os.fstat(fd).st_size
    if have > file.num_bytes:
        os.ftruncate(fd, 0)
        have = 0
    os.lseek(fd, 0, os.SEEK_SET)
    for _ in range(0, have, _BLOCK_BYTES):
        digest.update(os.read(fd, _BLOCK_BYTES))
    on_bytes(0)
    os.lseek(fd, have, os.SEEK_SET)

    def write(chunk: bytes) -> None:
        digest.update(chunk)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(fd, rest) :]
        on_bytes(len(chunk))

    source = RemoteSource(Http(), place, file, str(place))
    source.stream(have, write)
    return bool(digest.hexdigest() == file.digest)


def _new_digest(file: HubFile) -> Any:
    if file.sha256 is not None:
        return hashlib.sha256()
    # all that the hub has of small files; it is no protection against malice
    return hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)


def _differs(place: HubUri, file: HubFile) -> CkptError:
    return CkptError(
        f"`{escape(file.path)}` does not have the digest `{str(file.digest)[:16]}...` that the hub "
        "lists, and was downloaded twice",
        code="FC479",
        where=str(place),
        hint="nothing was kept of it; if it stays so, ask the owner of the repository, or of the "
        "mirror that HF_ENDPOINT names",
    )


def _not_written(error: OSError, ask: Ask) -> CkptError:
    return CkptError(
        f"cannot write {ask} into the cache: {error.strerror or error}",
        code="FC004",
        where=ask.where,
        hint="the cache lies under HF_HOME: free some space there, or name another place",
    )
