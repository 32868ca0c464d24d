"""A hub on this machine: the calls that `huggingface_hub` makes to download, answered from memory.

Weights are kept on a second port, to which the first redirects, as the real one does. Every request
is written down, and the server can be told to misbehave.

    with HubServer() as hub:
        commit = hub.push("someone/model", {"config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

#: Kept on the second port, under the SHA-256 of their content.
LFS_SUFFIXES = (".pt", ".bin", ".safetensors", ".npz", ".gguf")


@dataclass
class Repository:
    """Files of each commit, and which commit a branch or tag is at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
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
        status: answer everything with this status, where it is not None.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.ignore_ranges = False
        self.drop_after: int | None = None
        self.status: int | None = None
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self)) for _ in range(2)]

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
        self, repo_id: str, files: Mapping[str, bytes], *, branch: str = "main", **options: Any
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

    def find(self, digest: str) -> bytes | None:
        """The content of a large file."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return content
        return None

    def asked(self, method: str, part: str = "") -> list[Request]:
        """The requests of a method whose path has a part."""
        return [one for one in self.requests if one.method == method and part in one.path]


@contextlib.contextmanager
def serving(monkeypatch: Any) -> Iterator[HubServer]:
    """A hub that the whole process takes for the real one."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        port = self.server.server_address[1]
        self.hub.requests.append(Request(self.command, path, int(port), dict(self.headers)))
        if self.hub.status is not None:
            self._send(self.hub.status, b"", {"Retry-After": "0"})
        elif match := re.fullmatch(r"/store/([0-9a-f]{64})", path):
            content = self.hub.find(match[1])
            assert content is not None
            self._send_file(content, {"ETag": f'"{match[1]}"'})
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path):
            self._describe(*match.groups())
        elif match := re.fullmatch(r"/api/models/(.+)", path):
            self._describe(match[1], "revision", "main")
        else:
            self._send(404, b"", {})

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
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
            self._send_file(content, headers | {"ETag": f'"{_blob_id(content)}"'})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers |= {
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://127.0.0.1:{self.hub.ports[1]}/store/{digest}",
        }
        self._send(302, b"", headers)

    def _describe(self, repo_id: str, what: str, revision: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        commit, files = found
        if what == "tree":
            answer: Any = [_entry(name, content) for name, content in files.items()]
        else:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
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

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        dropped, self.hub.drop_after = self.hub.drop_after, None
        if dropped is None:
            self.wfile.write(body)
        else:
            self.wfile.write(body[:dropped])
            self.close_connection = True


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": _blob_id(content),
    }
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 130,
        }
    return entry
