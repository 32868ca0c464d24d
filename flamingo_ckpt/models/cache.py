"""Expectations on disk, so that a model is constructed once.

An entry is a file of two lines of JSON, named by a digest of everything that the expectation
depends on. Whatever is wrong with an entry, it is as if it were not there; whatever is wrong with
the folder, nothing is kept. Reading one imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt import __version__
from flamingo_ckpt.models.expectation import Expectation, ExpectedTensor
from flamingo_ckpt.tensors import DTYPES

#: Changes whenever an entry of an earlier version of the tool would be misread.
_SCHEMA = 1
_LIBRARIES = ("torch", "transformers", "open_clip_torch", "timm")
#: The largest model here has some two thousand names.
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where an expectation is kept, and what it depends on."""

    path: str
    key: Mapping[str, Any]


def entry_for(digest: str, layout: str) -> Entry:
    """The entry of a config in a layout, with the libraries that are installed now."""
    key = {
        "schema": _SCHEMA,
        "config": digest,
        "layout": layout,
        "flamingo_ckpt": __version__,
        **{name: _version(name) for name in _LIBRARIES},
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Entry(path=os.path.join(_folder(), f"{name}.json"), key=key)


def load(entry: Entry, layout: str) -> Expectation | None:
    """The expectation that was kept, or None."""
    try:
        with open(entry.path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        head, _, body = raw.partition(b"\n")
        if len(raw) > _MAX_BYTES or json.loads(head) != _head(entry, body):
            return None
        return Expectation(layout=layout, tensors=tuple(_tensor(row) for row in json.loads(body)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def store(entry: Entry, expectation: Expectation) -> None:
    """Keep an expectation; a reader sees the whole entry or none of it."""
    rows = [_row(tensor) for tensor in expectation.tensors]
    body = json.dumps(rows, separators=(",", ":")).encode()
    head = json.dumps(_head(entry, body)).encode()
    staged = f"{entry.path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(entry.path), mode=0o700, exist_ok=True)
        try:
            with open(staged, "xb") as file:
                file.write(head + b"\n" + body)
            os.replace(staged, entry.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(staged)
            raise
    except OSError:
        pass  # a cache that cannot be written is no reason to fail


def _head(entry: Entry, body: bytes) -> dict[str, Any]:
    """The first line of an entry: what it is about, and what the rest must be."""
    return {"key": dict(entry.key), "digest": hashlib.sha256(body).hexdigest()}


def _folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "flamingo_ckpt")


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _row(tensor: ExpectedTensor) -> list[Any]:
    return [
        tensor.name,
        tensor.dtype,
        list(tensor.shape),
        tensor.kind,
        tensor.alias_of,
        tensor.group,
        tensor.base,
        tensor.in_checkpoint,
    ]


def _tensor(row: Any) -> ExpectedTensor:
    name, dtype, shape, kind, alias_of, group, base, in_checkpoint = row
    if dtype not in DTYPES or not isinstance(name, str):
        raise ValueError(dtype)
    return ExpectedTensor(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        kind=kind,
        alias_of=alias_of,
        group=group,
        base=base,
        in_checkpoint=in_checkpoint,
    )
