"""Addresses on the hub, and what the environment says of it. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote, unquote

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape, has_control

URI_PREFIX: Final = "hf://"
PUBLIC_ENDPOINT: Final = "https://huggingface.co"
_TRUE = ("1", "ON", "YES", "TRUE")
# Revisions that hold slashes and may be written as they are, as fsspec's paths have it.
_SPECIAL_REVISION = re.compile(r"(refs/pr/\d+|refs/convert/[^/]+)(?:/(.*))?")
_OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubUri:
    """A place on the hub.

    Attributes:
        repo_id: `owner/name`.
        revision: branch, tag, commit or `refs/pr/1`; None is the main branch.
        path: of a file or a folder in the repository, without slashes at its ends; "" is the root.
    """

    repo_id: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = self.revision or ""
        if revision and not _SPECIAL_REVISION.fullmatch(revision):
            revision = quote(revision, safe="")
        return (
            f"{URI_PREFIX}{self.repo_id}"
            + (f"@{revision}" if revision else "")
            + (f"/{self.path}" if self.path else "")
        )

    def at(self, revision: str) -> HubUri:
        """The same place at another revision, such as the commit that a branch is at."""
        return replace(self, revision=revision)

    def join(self, name: str) -> HubUri:
        """A place below this one."""
        return replace(self, path=f"{self.path}/{name}" if self.path else name)


class LocalCopy(str):
    """The local path of what was downloaded, which remembers its address.

    A string, so that whatever takes a path takes it; `formats.open_checkpoint` gives its manifest
    the address as `uri`, and so the report names what the user named.

    Attributes:
        uri: as the user named it.
        remote: the `remote` field of a report's input.
        files: paths in the repository that were downloaded, or were in the cache.
        left: (path, number of bytes) of the files beside those, which stayed on the hub.
    """

    __slots__ = ("files", "left", "remote", "uri")

    uri: str
    remote: Mapping[str, Any]
    files: tuple[str, ...]
    left: tuple[tuple[str, int], ...]

    @classmethod
    def of(
        cls,
        path: str,
        *,
        uri: str,
        remote: Mapping[str, Any],
        files: tuple[str, ...] = (),
        left: tuple[tuple[str, int], ...] = (),
    ) -> LocalCopy:
        """A local path with what is known of its origin."""
        copy = cls(path)
        copy.uri, copy.remote, copy.files, copy.left = uri, remote, files, left
        return copy


def is_uri(text: str) -> bool:
    """Whether a text is meant as an address on the hub."""
    return text.startswith(URI_PREFIX)


def parse_uri(text: str) -> HubUri:
    """The place that `hf://OWNER/NAME[@REVISION][/PATH]` names.

    A revision with slashes is written `refs/pr/1`, or with `%2F`, as huggingface_hub's fsspec
    paths have it.

    Raises:
        CkptError: FC475 where it names none.

    >>> parse_uri("hf://a/b@refs/pr/1/sub/model.safetensors").path
    'sub/model.safetensors'
    """
    owner, _, rest = text.removeprefix(URI_PREFIX).partition("/")
    at, slash = rest.find("@"), rest.find("/")
    has_revision = at >= 0 and (slash < 0 or at < slash)
    if has_revision:
        name, rest = rest[:at], rest[at + 1 :]
        revision, path = _split_revision(rest)
    else:
        name, _, path = rest.partition("/")
        revision = ""
    path = path.rstrip("/")
    repo_id = f"{owner}/{name}"
    if not is_uri(text) or not is_repo_id(repo_id):
        raise _invalid(text, "`OWNER/NAME` does not follow `hf://`")
    if owner in _OTHER_KINDS:
        raise _invalid(text, f"{owner} hold no checkpoints, model repositories do")
    if has_revision and not _is_revision(revision):
        raise _invalid(text, "what follows `@` is no revision")
    if path and not is_plain_path(path):
        raise _invalid(text, "the path holds empty parts, `.` or `..`, or control characters")
    return HubUri(repo_id=repo_id, revision=revision or None, path=path)


def _split_revision(text: str) -> tuple[str, str]:
    special = _SPECIAL_REVISION.fullmatch(text)
    if special is not None:
        return special[1], special[2] or ""
    revision, _, path = text.partition("/")
    return unquote(revision), path


def _is_revision(text: str) -> bool:
    """By the rules of git for names of references, where they matter here."""
    return bool(re.fullmatch(r"[\w.+/-]+", text)) and not (
        ".." in text or "//" in text or text.startswith(("/", "-", ".")) or text.endswith("/")
    )


def is_plain_path(path: str) -> bool:
    """Whether a path of a repository stays below its root and can be written down.

    >>> is_plain_path("sub/model.safetensors"), is_plain_path("../x"), is_plain_path("/x")
    (True, False, False)
    """
    parts = path.split("/")
    return (
        all(part not in ("", ".", "..") for part in parts)
        and not has_control(path)
        and "\\" not in path
        and not any("\ud800" <= char <= "\udfff" for char in path)
    )


def is_repo_id(text: str) -> bool:
    """Whether a text can be the id of a repository: `owner/name` or, for old ones, `name`.

    >>> is_repo_id("openflamingo/OpenFlamingo-3B-vitl-mpt1b"), is_repo_id("./folder/x.pt")
    (True, False)
    """
    return bool(
        re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text)
    ) and not text.endswith((".git", ".", "-"))


def is_offline() -> bool:
    """Whether the environment forbids asking the hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in _TRUE


def endpoint() -> str | None:
    """`huggingface_hub` reads it once, when it is imported, which may have been before."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def is_public() -> bool:
    """Whether the endpoint is the public one."""
    return (endpoint() or PUBLIC_ENDPOINT) == PUBLIC_ENDPOINT


def _invalid(text: str, why: str) -> CkptError:
    return CkptError(
        f"`{escape(text)}` is no address on the hub: {why}",
        code="FC475",
        hint="write `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION` or `hf://OWNER/NAME/PATH`",
    )
