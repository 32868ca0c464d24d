"""What a repository holds, at one commit: names, sizes, digests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from flamingo_ckpt.errors import UnsafeError
from flamingo_ckpt.hub import failures
from flamingo_ckpt.hub.failures import Ask
from flamingo_ckpt.hub.http import Http
from flamingo_ckpt.hub.names import HubUri, is_plain_path
from flamingo_ckpt.tensors import escape

_MAX_PAGES = 100
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """One file of a repository.

    Attributes:
        path: in the repository.
        num_bytes: its size.
        sha256: of its content, where the hub keeps it as a large file.
        blob_id: git's SHA-1 of its content, where it does not.
    """

    path: str
    num_bytes: int
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def digest(self) -> str | None:
        """What its ETag has to be."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The entries of a folder of a repository.

    Attributes:
        uri: the folder, at the commit.
        files: sorted by path; with those of folders below, where that was asked for.
        folders: paths of the folders in it.
    """

    uri: HubUri
    files: tuple[HubFile, ...]
    folders: tuple[str, ...] = ()

    @property
    def commit(self) -> str:
        """Forty hexadecimal digits."""
        return self.uri.revision or ""

    def find(self, path: str) -> HubFile | None:
        """A file by its path in the repository."""
        return next((one for one in self.files if one.path == path), None)


def pin(http: Http, uri: HubUri) -> HubUri:
    """The same place at the commit that its revision is at now.

    Raises:
        CkptError: FC470 to FC474, FC476 for an answer without a commit.
    """
    ask = ask_for(uri)
    revision = quote(uri.revision or "main", safe="")
    path = f"api/models/{uri.repo_id}/revision/{revision}?expand=sha"
    document, _ = http.get_json(path, ask)
    sha = document.get("sha") if isinstance(document, dict) else None
    if not isinstance(sha, str) or not _SHA1.fullmatch(sha):
        raise failures.bad_answer(ask, "it names no commit")
    if uri.revision is not None and _SHA1.fullmatch(uri.revision) and sha != uri.revision:
        raise failures.bad_answer(ask, f"it is of commit `{sha}`")
    return uri.at(sha)


def list_folder(http: Http, uri: HubUri, *, recursive: bool = False) -> Listing:
    """The entries of a folder of a pinned place.

    Raises:
        CkptError: FC470 to FC474, FC476 for an answer that is no list of files.
        UnsafeError: FC503 for a name that leads out of the repository.
    """
    ask = ask_for(uri)
    below = f"/{quote(uri.path)}" if uri.path else ""
    flag = "true" if recursive else "false"
    path: str | None = (
        f"api/models/{uri.repo_id}/tree/{uri.revision}{below}?recursive={flag}&expand=false"
    )
    files: dict[str, HubFile] = {}
    folders: list[str] = []
    for _ in range(_MAX_PAGES):
        assert path is not None
        document, headers = http.get_json(path, ask)
        if not isinstance(document, list):
            raise failures.bad_answer(ask, "it is no list of files")
        for entry in document:
            _read_entry(entry, uri, files, folders, ask)
        path = _next_page(headers)
        if path is None:
            ordered = tuple(files[name] for name in sorted(files))
            return Listing(uri=uri, files=ordered, folders=tuple(sorted(folders)))
    raise failures.bad_answer(ask, "the list of files is endless")


def _read_entry(
    entry: Any, uri: HubUri, files: dict[str, HubFile], folders: list[str], ask: Ask
) -> None:
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str):
        raise failures.bad_answer(ask, "an entry has no path")
    if not is_plain_path(path) or not (f"{path}/").startswith(f"{uri.path}/" if uri.path else ""):
        raise UnsafeError(
            f"the hub lists `{escape(path)[:200]}`, which is no path of the repository",
            code="FC503",
            where=str(uri),
            hint="do not use this repository or this endpoint",
        )
    if entry.get("type") == "directory":
        folders.append(path)
        return
    size, lfs = entry.get("size"), entry.get("lfs")
    if isinstance(lfs, Mapping):
        size, digest = lfs.get("size", size), lfs.get("oid", lfs.get("sha256"))
        digest = str(digest).removeprefix("sha256:")
        if not _SHA256.fullmatch(digest):
            raise failures.bad_answer(ask, f"`{escape(path)}` has no SHA-256")
        found = HubFile(path=path, num_bytes=_size(size, path, ask), sha256=digest)
    else:
        blob = entry.get("oid")
        is_blob = isinstance(blob, str) and _SHA1.fullmatch(blob)
        found = HubFile(
            path=path, num_bytes=_size(size, path, ask), blob_id=blob if is_blob else None
        )
    if path in files:
        raise failures.bad_answer(ask, f"it lists `{escape(path)}` twice")
    files[path] = found


def _size(value: object, path: str, ask: Ask) -> int:
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise failures.bad_answer(ask, f"`{escape(path)}` has no size")
    return value


def _next_page(headers: Mapping[str, str]) -> str | None:
    """Path and query of the next page: a mirror may pass the public endpoint's own address on."""
    match = re.search(r'<([^>]+)>\s*;\s*rel="next"', headers.get("link", ""))
    if match is None:
        return None
    parts = urlsplit(match[1])
    return f"{parts.path.lstrip('/')}?{parts.query}"


def find_file(http: Http, uri: HubUri) -> HubFile | None:
    """The file that a pinned place is; None where it is a folder.

    Raises:
        CkptError: FC471 where it is neither; else what `list_folder` raises.
    """
    if not uri.path:
        return None
    parent = HubUri(repo_id=uri.repo_id, revision=uri.revision, path=uri.path.rpartition("/")[0])
    listing = list_folder(http, parent)
    found = listing.find(uri.path)
    if found is None and uri.path not in listing.folders:
        raise failures.no_file(ask_for(uri))
    return found


def ask_for(uri: HubUri, path: str | None = None) -> Ask:
    """What is asked for, for messages."""
    what = path if path is not None else uri.path
    return Ask(
        repo_id=uri.repo_id,
        what=f"`{what}`" if what else "the list of files",
        revision=uri.revision,
    )
