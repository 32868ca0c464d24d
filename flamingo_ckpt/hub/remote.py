"""Files that stay on the hub and are read by ranges: a source of bytes, and a folder of them.

Pinned to one commit; every answer is held to what was asked for. A server that ignores ranges is
refused before it has sent the file.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.hub import failures
from flamingo_ckpt.hub.http import Again, Answer, Http
from flamingo_ckpt.hub.listing import HubFile, Listing, ask_for, find_file, list_folder, pin
from flamingo_ckpt.hub.names import HubUri

# One request brings at least so much: a header, a directory and its neighbours in one piece.
_BLOCK_BYTES = 16 << 10
# The end of a file is where a zip keeps its directory, of which its last bytes tell the length.
_TAIL_BYTES = 32 << 10
# A request for more than this is for a known length, and brings exactly that.
_EXACT_BYTES = 4 << 10
# What git itself keeps is small, and read whole when it is read: an index, a config.
_WHOLE_BYTES = 1 << 20
# Headers lie at the ends of a file. What needs more than this lies all over it.
_MAX_REQUESTS = 64
_MAX_BYTES = 32 << 20
# The address of a store is signed, and runs out.
_EXPIRED = (400, 401, 403, 404, 410)


class RemoteSource:
    """A file on the hub as a source of bytes; what was read once is kept.

    Args:
        http: the conversation that it is part of.
        uri: of the file, at a commit.
        file: as listed.
        name: what to call it in messages.
    """

    def __init__(self, http: Http, uri: HubUri, file: HubFile, name: str) -> None:
        self._http, self._file, self._name = http, file, name
        self._ask = ask_for(uri, file.path)
        self._commit = uri.revision or ""
        self._resolve = f"{http.endpoint}/{uri.repo_id}/resolve/{self._commit}/{quote(file.path)}"
        self._store: str | None = None
        self._etag: str | None = None
        self._pieces: dict[int, bytes] = {}
        self._num_fetches = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Its address."""
        return self._name

    @property
    def size(self) -> int:
        """As the repository lists it."""
        return self._file.num_bytes

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`.

        Raises:
            FormatError: FC102 past the end.
            CkptError: FC474 the hub cannot be reached, FC476 a wrong answer, FC477 another file.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise FormatError(
                f"bytes {offset} to {offset + size} are asked for, the file has {self.size}",
                code="FC102",
                where=self._name,
                hint="the file is truncated or damaged; its repository should be told",
            )
        with self._lock:
            for first, end in self._gaps(offset, offset + size):
                self._fetch(first, end)
            return self._kept(offset, offset + size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        buffer[:] = self.read(offset, len(buffer))

    def stream(self, begin: int, write: Callable[[bytes], None]) -> None:
        """Everything from `begin` to the end, in pieces as they arrive; nothing is kept.

        A server that knows no ranges is made use of all the same: what comes twice is dropped.

        Raises:
            CkptError: as `read`.
        """
        at = begin

        def attempt() -> None:
            nonlocal at
            started = at
            headers = {"Range": f"bytes={at}-{self.size - 1}"}
            with self._http.get(self._store or self._resolve, headers, self._ask) as answer:
                is_whole = answer.status == 200 and self._is_whole(answer)
                self._check(answer, 0 if is_whole else at, self.size)
                dropped = at if is_whole else 0
                try:
                    for chunk in answer.chunks:
                        fresh = chunk[min(dropped, len(chunk)) :]
                        dropped -= len(chunk) - len(fresh)
                        if len(fresh) > self.size - at:
                            raise failures.bad_answer(self._ask, "it is longer than was listed")
                        write(fresh)
                        at += len(fresh)
                except Again:
                    if at - started < _BLOCK_BYTES:
                        raise
            if at < self.size and at - started < _BLOCK_BYTES:
                raise Again(f"the connection broke after {at} bytes")

        while at < self.size:
            self._http.persistently(attempt, self._ask)

    def _is_whole(self, answer: Answer) -> bool:
        return answer.headers.get("content-length") == str(self.size)

    def _gaps(self, first: int, end: int) -> list[tuple[int, int]]:
        """What of a range is not kept yet."""
        gaps, at = [], first
        for begin in sorted(self._pieces):
            stop = begin + len(self._pieces[begin])
            if stop <= at or begin >= end:
                continue
            if begin > at:
                gaps.append((at, begin))
            at = max(at, stop)
        if at < end:
            gaps.append((at, end))
        return gaps

    def _kept(self, first: int, end: int) -> bytes:
        out = bytearray(end - first)
        for begin, piece in self._pieces.items():
            low, high = max(first, begin), min(end, begin + len(piece))
            if low < high:
                out[low - first : high - first] = piece[low - begin : high - begin]
        return bytes(out)

    def _fetch(self, first: int, end: int) -> None:
        if self._file.sha256 is None and self.size <= _WHOLE_BYTES and not self._pieces:
            first, end = 0, self.size
        elif end - first <= _EXACT_BYTES:
            ends = (begin + len(piece) for begin, piece in self._pieces.items())
            before = max((stop for stop in ends if stop <= first), default=0)
            after = min((begin for begin in self._pieces if begin >= end), default=self.size)
            if first >= self.size - _TAIL_BYTES:
                first, end = max(before, self.size - _TAIL_BYTES), after
            else:
                end = min(first + _BLOCK_BYTES, after)
        self._num_fetches += 1
        have = sum(map(len, self._pieces.values()))
        if self._num_fetches > _MAX_REQUESTS or have + end - first > _MAX_BYTES:
            raise CkptError(
                "its headers are "
                + (
                    f"more than {_MAX_BYTES >> 20} MiB"
                    if have + end - first > _MAX_BYTES
                    else "spread over the whole file, which ranges are no way to read"
                ),
                code="FC002",
                where=self._name,
                hint="download it: `flamingo-ckpt pull`",
            )
        got = bytearray()

        def attempt() -> None:
            begin = first + len(got)
            url = self._store or self._resolve
            headers = {"Range": f"bytes={begin}-{end - 1}"}
            with self._http.get(url, headers, self._ask) as answer:
                self._check(answer, begin, end)
                for chunk in answer.chunks:
                    got.extend(chunk)
                    if len(got) > end - first:
                        raise failures.bad_answer(self._ask, "it is longer than the range")
            if len(got) < end - first:
                raise Again(f"the connection broke after {len(got)} bytes")

        self._http.persistently(attempt, self._ask)
        self._pieces[first] = bytes(got)

    def _check(self, answer: Answer, begin: int, end: int) -> None:
        """Hold an answer to what was asked for, before its body is read."""
        if answer.status in _EXPIRED and self._store is not None:
            self._store = None
            raise Again(f"the store answered with status {answer.status}")
        if answer.status == 416:
            raise failures.bad_answer(
                self._ask, f"it has no bytes {begin} to {end}, and {self.size} are listed"
            )
        self._http.check_status(answer, self._ask, (200, 206))
        self._check_identity(answer)
        self._check_length(answer, begin, end)
        if answer.url != self._resolve:
            self._store = answer.url

    def _check_identity(self, answer: Answer) -> None:
        commit = answer.told.get("x-repo-commit")
        if commit is not None and commit != self._commit:
            raise failures.bad_answer(self._ask, f"it is of commit `{commit[:40]}`")
        told = _tag(answer.told.get("x-linked-etag") or answer.told.get("etag"))
        is_digest = bool(told and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", told))
        if is_digest and self._file.digest and told != self._file.digest:
            raise failures.changed(self._ask, f"its digest is `{told}` now")
        size = answer.told.get("x-linked-size")
        if size is not None and size != str(self.size):
            raise failures.bad_answer(
                self._ask, f"it claims {size[:40]} bytes, and {self.size} are listed"
            )
        tag = _tag(answer.headers.get("etag"))
        if tag and self._etag and tag != self._etag:
            raise failures.changed(self._ask, "its ETag is another one than before")
        self._etag = self._etag or tag

    def _check_length(self, answer: Answer, begin: int, end: int) -> None:
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise failures.bad_answer(self._ask, "it is compressed, which nobody asked for")
        length = answer.headers.get("content-length")
        if answer.status == 200 and not self._is_whole(answer):
            told = length or "an unknown number of"
            raise failures.bad_answer(self._ask, f"{told} bytes, and {self.size} are listed")
        if answer.status == 200 and (begin, end) != (0, self.size):
            raise failures.bad_answer(
                self._ask,
                "the whole file instead of a range",
                "this server knows no ranges, and nothing was downloaded: `flamingo-ckpt pull` "
                "downloads the file",
            )
        span = answer.headers.get("content-range", "")
        if answer.status == 206 and span != f"bytes {begin}-{end - 1}/{self.size}":
            raise failures.bad_answer(
                self._ask, f"the range `{span[:80]}` instead of {begin}-{end - 1}/{self.size}"
            )
        if length is not None and length != str(end - begin):
            raise failures.bad_answer(self._ask, f"{length} bytes instead of {end - begin}")


class RemoteFolder:
    """A folder of a repository at one commit, its files read by ranges.

    Args:
        http: the conversation that it is part of.
        listing: its entries.
        name: the address as the user wrote it.
    """

    path: str | None = None
    is_remote = True

    def __init__(self, http: Http, listing: Listing, name: str) -> None:
        self._http, self._listing, self._name = http, listing, name.rstrip("/")
        start = f"{listing.uri.path}/" if listing.uri.path else ""
        self._files = {one.path.removeprefix(start): one for one in listing.files}
        self._folders = {one.removeprefix(start) for one in listing.folders}
        self._opened: dict[str, RemoteSource] = {}

    @property
    def name(self) -> str:
        """Its address."""
        return self._name

    def names(self) -> list[str]:
        """Everything in it, sorted."""
        return sorted({*self._files, *self._folders})

    def is_file(self, name: str) -> bool:
        """Whether it has this file."""
        return name in self._files

    def exists(self, name: str) -> bool:
        """Whether it has an entry of this name."""
        return name in self._files or name in self._folders

    def join(self, name: str) -> str:
        """The address of a file in it."""
        return f"{self._name}/{name}"

    def open(self, name: str) -> RemoteSource:
        """A file as a source of bytes; the same one at every call, with what it has read.

        Raises:
            CkptError: FC471 where there is none.
        """
        file = self._files.get(name)
        if file is None:
            raise failures.no_file(ask_for(self._listing.uri.join(name)))
        if name not in self._opened:
            self._opened[name] = RemoteSource(self._http, self._listing.uri, file, self.join(name))
        return self._opened[name]

    def cost(self) -> Mapping[str, Any]:
        """The `remote` field of a report's input, as of now."""
        return {
            "repo_id": self._listing.uri.repo_id,
            "revision": self._listing.commit,
            "num_bytes_read": self._http.meter.num_bytes,
            "num_requests": self._http.meter.num_requests,
            "num_bytes_total": sum(one.size for one in self._opened.values()),
            "downloaded": False,
        }


def open_remote(uri: HubUri, name: str) -> tuple[RemoteFolder, str | None]:
    """The folder that an address is or lies in, and the name of the file in it, if it is one.

    Args:
        uri: of a file or a folder.
        name: the address as the user wrote it.

    Raises:
        CkptError: FC470 to FC476.
    """
    http = Http()
    pinned = pin(http, uri)
    if not pinned.path:
        return RemoteFolder(http, list_folder(http, pinned), name), None
    above, _, last = pinned.path.rpartition("/")
    parent = HubUri(repo_id=pinned.repo_id, revision=pinned.revision, path=above)
    listing = list_folder(http, parent)
    if listing.find(pinned.path) is not None:
        return RemoteFolder(http, listing, name.rstrip("/").rpartition("/")[0]), last
    if pinned.path not in listing.folders:
        raise failures.no_file(ask_for(pinned))
    return RemoteFolder(http, list_folder(http, pinned), name), None


def list_all(uri: HubUri, name: str) -> tuple[RemoteFolder, Listing, str | None]:
    """Everything below an address at its commit.

    Args:
        uri: of a file or a folder.
        name: the address as the user wrote it.

    Returns:
        The folder that it is or lies in; its files, of a folder also those in folders below; the
        name of the file, where it is one.

    Raises:
        CkptError: as `open_remote`.
    """
    http = Http()
    pinned = pin(http, uri)
    if find_file(http, pinned) is None:
        listing = list_folder(http, pinned, recursive=True)
        start = f"{pinned.path}/" if pinned.path else ""
        own = [one for one in listing.files if "/" not in one.path.removeprefix(start)]
        top = Listing(uri=pinned, files=tuple(own), folders=listing.folders)
        return RemoteFolder(http, top, name), listing, None
    above, _, last = pinned.path.rpartition("/")
    parent = HubUri(repo_id=pinned.repo_id, revision=pinned.revision, path=above)
    listing = list_folder(http, parent)
    return RemoteFolder(http, listing, name.rstrip("/").rpartition("/")[0]), listing, last


def _tag(value: str | None) -> str | None:
    return value.removeprefix("W/").strip('"') if value else None
