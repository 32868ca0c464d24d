"""The other half of the hub on this machine: repositories are made, files are uploaded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from tests.hub_server import Content, HubServer, Repository

    _Base: Any = BaseHTTPRequestHandler
else:
    _Base = object


class Uploads(_Base):
    """What a handler needs to take commits."""

    hub: HubServer

    def do_PUT(self) -> None:  # noqa: N802
        path = self._note()
        body = self._body()
        match = re.fullmatch(r"/upload/([0-9a-f]{64})", path)
        assert match is not None
        if hashlib.sha256(body).hexdigest() != match[1]:
            self._send(400, b"", {})
            return
        self.hub.objects[match[1]] = body
        self._send(200, b"", {})

    def do_POST(self) -> None:  # noqa: N802
        path = self._note()
        body = self._body()
        status = self.hub.misbehaves()
        if status is not None:
            self._send(status, b"", {"Retry-After": self.hub.retry_after})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path == "/verify":
            sent = json.loads(body)
            is_there = len(self.hub.objects.get(sent["oid"], b"")) == sent["size"]
            self._send(200 if is_there else 404, b"{}", {})
        elif match := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            self._preupload(match[1], match[2], json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+?)/paths-info/(.+)", path):
            self._tell_paths(match[1], match[2], body)
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._batch(match[1], json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            self._take_commit(match[1], match[2], body)
        else:
            self._send(404, b"", {})

    def _tell_paths(self, repo_id: str, revision: str, body: bytes) -> None:
        """A question that is asked by POST: what the mirror of `test_mirror.py` wants to know."""
        from tests.hub_server import entry_of

        found = self._commit(repo_id, revision)
        if found is not None:
            is_json = body.startswith(b"{")
            paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
            files = found[1]
            self._send_json([entry_of(path, files[path]) for path in paths if path in files])

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return bytes(self.rfile.read(int(self.headers.get("content-length") or 0)))

    def _writable(self, repo_id: str) -> Repository | None:
        if self._commit(repo_id, "main") is None:
            return None
        repository = self.hub.repositories[repo_id]
        if repository.is_read_only:
            self._refuse(403, "", "You don't have the rights to write here: hf_leaked")
            return None
        return repository

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if repo_id in self.hub.repositories:
            self._refuse(409, "", "You already created this repo")
            return
        self.hub.push(
            repo_id,
            {".gitattributes": b"* text\n"},
            private=asked.get("visibility") == "private" or bool(asked.get("private")),
        )
        self._send_json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})

    def _preupload(self, repo_id: str, revision: str, asked: dict[str, Any]) -> None:
        from tests.hub_server import LFS_SUFFIXES

        if self._writable(repo_id) is None:
            return
        found = self._commit(repo_id, revision)
        if found is None:
            return
        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for one in asked["files"]
        ]
        self._send_json({"files": modes})

    def _batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        if self._writable(repo_id) is None:
            return
        objects: list[dict[str, Any]] = []
        for one in asked["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if self.hub.find(one["oid"]) is None:
                hub, store = (f"http://127.0.0.1:{port}" for port in self.hub.ports)
                verify = f"{(hub, store)[self.hub.verify_port]}/verify"
                entry["actions"] = {
                    "upload": {"href": f"{store}/upload/{one['oid']}"},
                    "verify": {"href": verify},
                }
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def _take_commit(self, repo_id: str, revision: str, body: bytes) -> None:
        repository = self._writable(repo_id)
        found = self._commit(repo_id, revision) if repository is not None else None
        if repository is None or found is None:
            return
        parent, before = found
        files: dict[str, Content] = dict(before)
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = f"{value['summary']}\n{value.get('description') or ''}".strip()
                if value.get("parentCommit") not in (None, parent):
                    self._refuse(412, "", "A commit has happened since")
                    return
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.find(value["oid"])
                assert content is not None
                assert len(content) == value["size"]
                files[value["path"]] = content
            else:
                assert entry["key"] in ("deletedFile", "deletedFolder")
                files.pop(value["path"], None)
        url = None
        branch = revision
        if parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]:
            number = sum(1 for one in repository.refs if one.startswith("refs/pr/")) + 1
            branch = f"refs/pr/{number}"
            url = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        commit = self.hub.push(repo_id, files, branch=branch)
        repository.messages[commit] = message
        answer = {
            "commitOid": commit,
            "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}",
            "pullRequestUrl": url,
        }
        self._send_json(answer)
