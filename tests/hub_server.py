"""A hub on this machine: the calls that `huggingface_hub` makes, answered from memory.

Weights are kept on a second port, to which the first redirects, as the real one does. Every request
is written down, and the server can be told to misbehave.

    with HubServer() as hub:
        commit = hub.push("someone/model", {"config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

#: Kept on the second port, under the SHA-256 of their content.
LFS_SUFFIXES = (".pt", ".bin", ".safetensors", ".npz", ".gguf")


@dataclass(frozen=True)
class Hollow:
    """A large file of which only the ends are written down; what lies between is zeros."""

    size: int
    head: bytes
    tail: bytes = b""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> bytes:
        first, end, _ = span.indices(self.size)
        at = self.size - len(self.tail)
        head = self.head[first:end]
        tail = self.tail[max(first, at) - at : max(end, at) - at] if end > at else b""
        return head + bytes(max(0, end - first) - len(head) - len(tail)) + tail


Content = bytes | Hollow


@dataclass
class Repository:
    """Files of each commit, and which commit a branch or tag is at."""

    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    is_read_only: bool = False
    token: str | None = None  # who may see it; None: everybody


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    port: int
    headers: Mapping[str, str]


class HubServer:
    """The two servers, what they serve, and what they were asked.

    Attributes:
        ignore_ranges: answer 200 with everything to a request for a range.
        drop_after: close the connection after so many bytes of a body, once.
        drops: how often `drop_after` does that.
        status: answer everything with this status, where it is not None.
        num_status: how often it does; None is for ever.
        retry_after: what such an answer asks for.
        lie: header -> what to say in it, whatever is true.
        changes_etag: give another ETag at every request.
        page: entries of a list of files in one answer.
        verify_port: 0 or 1: where the store asks to be told that an upload has arrived.
        objects: large files that were uploaded, by digest.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.ignore_ranges = False
        self.drop_after: int | None = None
        self.drops = 1
        self.status: int | None = None
        self.num_status: int | None = None
        self.retry_after = "0"
        self.lie: dict[str, str] = {}
        self.changes_etag = False
        self.page = 1000
        self.verify_port = 0
        self.objects: dict[str, bytes] = {}
        self._servers = [_Server(("127.0.0.1", 0), _handler(self)) for _ in range(2)]

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def ports(self) -> tuple[int, int]:
        """Of the hub and of the store of large files."""
        hub, store = (server.server_address[1] for server in self._servers)
        return hub, store

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.ports[0]}"

    def push(
        self, repo_id: str, files: Mapping[str, Content], *, branch: str = "main", **options: Any
    ) -> str:
        """Put a commit with exactly these files on a branch, and return its hash."""
        repository = self.repositories.setdefault(repo_id, Repository())
        for name, value in options.items():
            setattr(repository, name, value)
        digest = hashlib.sha1(f"{repo_id} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[digest] = dict(files)
        repository.refs[branch] = digest
        return digest

    def push_folder(self, repo_id: str, folder: Path, **options: Any) -> str:
        """Put a commit with the files of a folder on a branch, and return its hash."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return self.push(repo_id, files, **options)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, Content]:
        """What a branch holds."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.refs[branch]]

    def find(self, digest: str) -> Content | None:
        """The content of a large file."""
        if digest in self.objects:
            return self.objects[digest]
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if sha256_of(content) == digest:
                        return content
        return None

    def asked(self, method: str, part: str = "") -> list[Request]:
        """The requests of a method whose path has a part."""
        return [one for one in self.requests if one.method == method and part in one.path]

    def misbehaves(self) -> int | None:
        """The status to answer with instead, this once."""
        if self.status is not None and self.num_status is not None:
            if self.num_status == 0:
                return None
            self.num_status -= 1
        return self.status


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Whoever asked hung up, which is no news; a failed assertion is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*_)


@contextlib.contextmanager
def serving(monkeypatch: Any) -> Iterator[HubServer]:
    """A hub that the whole process takes for the real one."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    from tests.hub_uploads import Uploads

    class Handler(Uploads, _Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets, and the second would wait

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _note(self) -> str:
        """Write the request down; its path."""
        path = unquote(urlsplit(self.path).path)
        port = self.server.server_address[1]
        self.hub.requests.append(Request(self.command, path, int(port), dict(self.headers)))
        return path

    def _answer(self) -> None:
        path = self._note()
        status = self.hub.misbehaves()
        if status is not None:
            self._send(status, b"", {"Retry-After": self.hub.retry_after})
        elif match := re.fullmatch(r"/store/([0-9a-f]{64})", path):
            content = self.hub.find(match[1])
            assert content is not None
            self._send_file(content, {"ETag": f'"{match[1]}"'})
        elif match := re.fullmatch(r"/(.+?)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            self._describe(*match.groups())
        elif match := re.fullmatch(r"/api/models/(.+?)/tree/(refs/pr/\d+|[^/]+)/?(.*)", path):
            self._list(*match.groups())
        elif match := re.fullmatch(r"/api/models/(.+)", path):
            self._describe(match[1], "main")
        else:
            self._send(404, b"", {})

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, Content]] | None:
        """The commit and its files; None after the refusal was sent."""
        repository = self.hub.repositories.get(repo_id)
        sent = self.headers.get("authorization", "")
        if repository is None or (repository.token and sent != f"Bearer {repository.token}"):
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif repository.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        else:
            commit = repository.refs.get(revision, revision)
            if commit in repository.commits:
                return commit, repository.commits[commit]
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        return None

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, told | {k.replace("_", "-"): v for k, v in headers.items()})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self._refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
            return
        content = files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not name.endswith(LFS_SUFFIXES):
            assert isinstance(content, bytes)
            self._send_file(content, headers | {"ETag": f'"{blob_id(content)}"'})
            return
        digest = sha256_of(content)
        headers |= {
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://127.0.0.1:{self.hub.ports[1]}/store/{digest}",
        }
        self._send(302, b"", headers)

    def _describe(self, repo_id: str, revision: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        commit, files = found
        siblings = [{"rfilename": name} for name in files]
        self._send_json({"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings})

    def _list(self, repo_id: str, revision: str, folder: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        query = parse_qs(urlsplit(self.path).query)
        start = f"{folder}/" if folder else ""
        below = {name: one for name, one in found[1].items() if name.startswith(start)}
        if not below and folder:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        entries: dict[str, Any] = {}
        for name, content in below.items():
            *folders, last = name.removeprefix(start).split("/")
            for depth in range(1, len(folders) + 1):
                path = start + "/".join(folders[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            entries[start + "/".join([*folders, last])] = entry_of(name, content)
        if query.get("recursive") != ["true"]:
            entries = {one: e for one, e in entries.items() if "/" not in one.removeprefix(start)}
        at = int(query.get("cursor", ["0"])[0])
        page = list(entries.values())[at : at + self.hub.page]
        headers = {}
        if at + self.hub.page < len(entries):
            flag = query.get("recursive", ["false"])[0]
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            headers["Link"] = f'<{url}?recursive={flag}&cursor={at + self.hub.page}>; rel="next"'
        self._send_json(page, headers)

    def _send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        told = {"Content-Type": "application/json", **(headers or {})}
        self._send(200, json.dumps(value).encode(), told)

    def _send_file(self, content: Content, headers: dict[str, str]) -> None:
        if self.hub.changes_etag:
            headers = headers | {"ETag": f'"{len(self.hub.requests)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if asked is None or self.hub.ignore_ranges:
            self._send(200, content, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if first > last:
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        told = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], headers | told)

    def _send(self, status: int, body: Content, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {**headers, "Content-Length": str(len(body))}
        lies = self.hub.lie if status in (200, 206, 302) and "/api/" not in self.path else {}
        for name, value in headers.items():
            self.send_header(name, lies.get(name, value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.drop_after is not None and self.hub.drops and len(body) > self.hub.drop_after:
            self.hub.drops -= 1
            self.wfile.write(body[: self.hub.drop_after])
            self.close_connection = True
            return
        if "Content-Length" in lies:
            self.close_connection = True
        for at in range(0, len(body), 1 << 20):
            try:
                self.wfile.write(body[at : at + (1 << 20)])
            except OSError:  # whoever asked has heard enough
                self.close_connection = True
                return


@functools.lru_cache(maxsize=64)
def sha256_of(content: Content) -> str:
    """The digest of a file; of a hollow one, of what is written down of it."""
    if isinstance(content, Hollow):
        content = content.head + content.tail + str(content.size).encode()
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """Git's name for a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry_of(name: str, content: Content) -> dict[str, Any]:
    """A file as a list of files tells it."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    if name.endswith(LFS_SUFFIXES):
        digest = sha256_of(content)
        entry["oid"] = hashlib.sha1(digest.encode()).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    else:
        assert isinstance(content, bytes)
        entry["oid"] = blob_id(content)
    return entry
