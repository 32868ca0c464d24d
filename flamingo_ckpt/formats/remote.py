"""Checkpoints on the hub: their headers by ranges, or a local copy of what a reader needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flamingo_ckpt import hub
from flamingo_ckpt.formats.folder import WEIGHT_FILES, is_carried
from flamingo_ckpt.formats.opening import is_index, open_checkpoint, read_source
from flamingo_ckpt.formats.sharded import (
    choose_files,
    open_folder,
    open_index_in,
    require_there,
    shards_in,
)
from flamingo_ckpt.hub.fetching import fetch_file
from flamingo_ckpt.hub.listing import HubFile
from flamingo_ckpt.hub.remote import list_all, open_remote
from flamingo_ckpt.tensors import ByteSource, Manifest


def open_on_hub(
    uri: str, *, wrapper_key: str | None = None, npy_bfloat16: bool = False
) -> Manifest:
    """The manifest of a checkpoint on the hub, from its headers alone.

    The local headers of a zip's records are not read one by one, as they are of a local file: the
    central directory is taken at its word, and `details` says so. Offline, what is in the cache is
    opened instead.

    Raises:
        CkptError: what the hub and the formats raise; FC476 where the server knows no ranges.
    """
    if hub.is_offline():
        copy = fetch(uri)
        return open_checkpoint(copy, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    options: dict[str, Any] = {"wrapper_key": wrapper_key, "npy_bfloat16": npy_bfloat16}
    folder, name = open_remote(hub.parse_uri(uri), uri)
    if name is None:
        manifest = open_folder(folder, **options)
    else:
        source = folder.open(name)
        if is_index(source):
            manifest = open_index_in(folder, name, options)
        else:
            manifest = replace(read_source(source, **options), remote=folder.cost)
    details = dict(manifest.details)
    if manifest.format in ("torch-zip", "torchscript", "npz"):
        details["record_headers"] = "not read"
    return replace(manifest, uri=uri, details=details, check=lambda: None)


def open_file_on_hub(uri: str, names: tuple[str, ...]) -> tuple[ByteSource, str] | None:
    """A small file on the hub, and its address at the commit: a config, say.

    Args:
        uri: of the file, or of a folder with one of `names`.
        names: in order of preference.

    Raises:
        CkptError: what the hub raises.
    """
    place = hub.parse_uri(uri)
    if hub.is_offline():
        return _cached_file(place, names)
    folder, name = open_remote(place, uri)
    found = name or next((one for one in names if folder.is_file(one)), None)
    if found is None:
        return None
    pinned = place.at(str(folder.cost()["revision"]))
    return folder.open(found), str(pinned if name else pinned.join(found))


def _cached_file(place: hub.HubUri, names: tuple[str, ...]) -> tuple[ByteSource, str] | None:
    from flamingo_ckpt.formats.source import FileSource

    root = hub.cached_snapshot(place.repo_id, place.revision)
    path = os.path.join(root, place.path) if place.path else root
    found = path if os.path.isfile(path) else ""
    for name in names:
        found = found or (os.path.join(path, name) if _is_file(path, name) else "")
    if not found:
        return None
    pinned = place.at(os.path.basename(root.rstrip("/")))
    at = pinned if found == path else pinned.join(os.path.basename(found))
    return FileSource(found, str(at)), str(at)


def _is_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """What is to be downloaded for a reader of whole files.

    Attributes:
        uri: as the user wrote it.
        place: at its commit.
        files: that are needed.
        left: files beside those that stay: code, other weights, other kinds.
        num_requests: that it took to find out.
    """

    uri: str
    place: hub.HubUri
    files: tuple[HubFile, ...]
    left: tuple[HubFile, ...]
    num_requests: int

    @property
    def num_bytes(self) -> int:
        """Of the files, whether the cache has them or not."""
        return sum(one.num_bytes for one in self.files)


def plan_fetch(uri: str) -> Fetch | None:
    """What a reader of an address needs: its weights, and the configs, tokenizer and card beside.

    Never code, and never a second format of the same weights. None offline: nobody is asked.

    Raises:
        CkptError: as `open_on_hub`.
    """
    if hub.is_offline():
        return None
    folder, listing, name = list_all(hub.parse_uri(uri), uri)
    index, names = choose_files(folder) if name is None else (None, [name])
    if name is not None and name.endswith(".json") and is_index(folder.open(name)):
        index = name
    if index is not None:
        shards = shards_in(folder, index)
        require_there(folder, shards, folder.join(index))  # before gigabytes are on their way
        names = [index, *shards]
    weights = {listing.uri.join(one).path for one in names}
    alone = name is not None and index is None
    needed = [
        one for one in listing.files if one.path in weights or (not alone and _goes_along(one.path))
    ]
    left = tuple(one for one in listing.files if one not in needed)
    place = listing.uri if name is None else listing.uri.join(name)
    return Fetch(
        uri=uri,
        place=place,
        files=tuple(needed),
        left=left,
        num_requests=folder.cost()["num_requests"],
    )


def _goes_along(path: str) -> bool:
    *folders, name = path.split("/")
    is_hidden = any(part.startswith(".") for part in folders) or (
        name.startswith(".") and name != ".gitattributes"
    )
    return is_carried(name) and not WEIGHT_FILES.fullmatch(name) and not is_hidden


def fetch(
    uri: str, plan: Fetch | None = None, on_bytes: Callable[[int], None] = lambda _: None
) -> hub.LocalCopy:
    """A local copy of what a reader of an address needs, in the cache of `huggingface_hub`.

    What the cache has is not downloaded again, and a download that broke off is resumed.

    Args:
        uri: of a file, a folder or an index.
        plan: what `plan_fetch` gave for it.
        on_bytes: told of bytes as they arrive.

    Raises:
        CkptError: FC470 to FC477; FC473 offline, where the cache does not have it.
    """
    plan = plan or plan_fetch(uri)
    if plan is None:
        return _cached(uri)
    moved = [0]

    def count(num_bytes: int) -> None:
        moved[0] += num_bytes
        on_bytes(num_bytes)

    root = ""
    for one in plan.files:
        path = fetch_file(plan.place, one, count)
        root = path.removesuffix(one.path).rstrip("/")
    hub.remember_revision(root, hub.parse_uri(uri).revision)
    remote = _remote(plan.place, moved[0], plan.num_bytes, plan.num_requests)
    return hub.LocalCopy.of(
        os.path.join(root, plan.place.path) if plan.place.path else root,
        uri=uri,
        remote=remote,
        files=tuple(one.path for one in plan.files),
        left=tuple((one.path, one.num_bytes) for one in plan.left),
    )


def fetch_if_remote(path: str) -> str:
    """A path as it is; of an address on the hub, a local copy."""
    return fetch(path) if hub.is_uri(path) else path


def _cached(uri: str) -> hub.LocalCopy:
    place = hub.parse_uri(uri)
    root = hub.cached_snapshot(place.repo_id, place.revision).rstrip("/")
    path = os.path.join(root, place.path) if place.path else root
    if not os.path.exists(path):
        hub.download(place.repo_id, place.path, revision=place.revision)  # which says so
    pinned = place.at(os.path.basename(root))
    return hub.LocalCopy.of(path, uri=uri, remote=_remote(pinned, 0, None, 0))


def _remote(
    place: hub.HubUri, num_bytes: int, total: int | None, num_requests: int
) -> Mapping[str, Any]:
    return {
        "repo_id": place.repo_id,
        "revision": place.revision,
        "num_bytes_read": num_bytes,
        "num_requests": num_requests,  # our own: those of `huggingface_hub` are not counted
        "num_bytes_total": total,
        "downloaded": True,
    }
