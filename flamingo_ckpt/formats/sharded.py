"""Folders of checkpoints: an index and its shards, one file, or shards without an index.

Index and shards are checked against each other both ways. An index is hostile text: a shard is
named by a plain file name, and lies in the folder (or in the blob store of the hub's cache that the
folder is a snapshot of).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding, FormatError, UnsafeError, name_some
from flamingo_ckpt.formats.opening import read_source
from flamingo_ckpt.formats.place import Folder, LocalFolder, beside, cost_of
from flamingo_ckpt.formats.safetensors import ALIASES_KEY, parse_json_object
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.tensors import (
    Beside,
    ByteSource,
    Manifest,
    TensorInfo,
    distinct,
    escape,
    has_control,
)

_MAX_INDEX_BYTES = 256 << 20
# In the order in which transformers looks for them.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy")
# Torch files that a training run leaves beside the weights.
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter|trainer_state).*"
)
# Of files on the hub, whose headers are read by one request each.
_NUM_THREADS = 4


def open_folder(
    folder: str | Folder, *, wrapper_key: str | None = None, npy_bfloat16: bool = False
) -> Manifest:
    """The manifest of a folder.

    Raises:
        CkptError: FC001 nothing to read, FC207 several candidates; else what its files raise.
    """
    options: dict[str, Any] = {"wrapper_key": wrapper_key, "npy_bfloat16": npy_bfloat16}
    place = LocalFolder(folder) if isinstance(folder, str) else folder
    index, files = choose_files(place)
    if index is not None:
        return open_index_in(place, index, options)
    return _gather(place, files, options)


def choose_files(folder: Folder) -> tuple[str | None, list[str]]:
    """What of a folder is read: the name of an index, or the names of files without one.

    Raises:
        CkptError: FC001 nothing to read, FC207 several candidates.
    """
    names = folder.names()
    for single, index in zip(_SINGLE_FILES, _INDEXES, strict=True):
        if single in names and index in names and single not in shards_in(folder, index):
            raise CkptError(
                f"the folder has both `{single}` and `{index}`",
                code="FC207",
                where=folder.name,
                hint="name the one you mean",
            )
        if index in names:
            return index, []
        if single in names:
            return None, [single]
    return None, _find_unindexed(folder, names)


def open_index(
    path: str, *, wrapper_key: str | None = None, npy_bfloat16: bool = False
) -> Manifest:
    """The manifest of the shards that an index names.

    Raises:
        FormatError: FC107 where index and shards disagree.
        UnsafeError: FC503 where a shard lies elsewhere.
    """
    folder, name = os.path.split(path)
    options: dict[str, Any] = {"wrapper_key": wrapper_key, "npy_bfloat16": npy_bfloat16}
    return open_index_in(LocalFolder(folder or "."), name, options, uri=path)


def open_index_in(
    folder: Folder, name: str, options: Mapping[str, Any], uri: str | None = None
) -> Manifest:
    """The same for an index in any folder.

    Args:
        folder: that it lies in.
        name: of the index.
        options: the further arguments of `open_index`.
        uri: what to call it; by default its name after the folder's.
    """
    # an index itself may be a link to anywhere: the user named it, or its folder
    source = folder.open(name) if folder.is_remote else FileSource(uri or folder.join(name))
    path = uri or folder.join(name)
    weight_map, metadata = _read_index(source)
    shards = sorted(set(weight_map.values()))
    require_there(folder, shards, path)
    manifest = _gather(folder, shards, options)
    _cross_check(weight_map, manifest, path)
    findings = [*manifest.findings, *_check_total(metadata, manifest)]
    details = {**manifest.details, "index": name}
    return replace(manifest, uri=path, findings=tuple(findings), details=details)


def require_there(folder: Folder, shards: list[str], path: str) -> None:
    """Raise FC107 for shards that an index names and that are not in its folder."""
    missing = [shard for shard in shards if not folder.exists(shard)]
    if missing:
        raise FormatError(
            f"the index names {len(missing)} files that are not there: "
            f"{name_some([escape(shard) for shard in missing])}",
            code="FC107",
            where=path,
            hint="download or copy the missing shards",
        )


def _read_index(source: ByteSource) -> tuple[dict[str, str], Mapping[str, Any]]:
    path = source.name
    if source.size > _MAX_INDEX_BYTES:
        raise FormatError("the index is too large", code="FC111", where=path)
    parsed = parse_json_object(source.read(0, source.size), path)
    weight_map, metadata = parsed.get("weight_map"), parsed.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            "it is JSON without a `weight_map`: not the index of a checkpoint",
            code="FC101",
            where=path,
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise UnsafeError(
                f"the index puts `{escape(name)}` into `{escape(str(shard))[:200]}`, "
                "which is not a plain file name",
                code="FC503",
                where=path,
                key=name,
                hint="an index names files in its own folder and nothing else",
            )
    return weight_map, metadata if isinstance(metadata, dict) else {}


def shards_of(index: str) -> list[str]:
    """The plain names of the files that an index puts its tensors into, sorted.

    Raises:
        FormatError: FC101, FC111 where it is no index.
        UnsafeError: FC503 for a file elsewhere.
    """
    return sorted(set(_read_index(FileSource(index))[0].values()))


def shards_in(folder: Folder, index: str) -> list[str]:
    """The same for an index in any folder."""
    source = folder.open(index) if folder.is_remote else FileSource(folder.join(index))
    return sorted(set(_read_index(source)[0].values()))


def _is_plain_name(name: str) -> bool:
    return (
        bool(name)
        and name == os.path.basename(name)
        and name not in (".", "..")
        and not any(char in name for char in "\\:%")
        and not has_control(name)
    )


def _find_unindexed(folder: Folder, names: list[str]) -> list[str]:
    """Files to take from a folder without index: one file, or one complete numbered set."""
    files = [
        name
        for name in names
        if name.endswith(_WEIGHT_SUFFIXES)
        and not _NOT_WEIGHTS.fullmatch(name)
        and folder.is_file(name)
    ]
    if any(name.endswith(".distcp") for name in names):
        raise CkptError(
            "it is a distributed checkpoint (torch.distributed.checkpoint), which is not read yet",
            code="FC112",
            where=folder.name,
            hint="python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt",
        )
    safetensors = [name for name in files if name.endswith(".safetensors")]
    files = safetensors or files
    if not files:
        raise CkptError(
            "the folder holds no checkpoint"
            + (f"; it holds {name_some([escape(name) for name in names])}" if names else ""),
            code="FC001",
            where=folder.name,
            hint="name the file itself if it has an unusual name",
        )
    if len(files) == 1 and not _NUMBERED.fullmatch(files[0]):
        return files
    numbered = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    sets = {(match["stem"], match["count"], match["suffix"]) for match in numbered}
    if len(numbered) == len(files) and len(sets) == 1:
        _require_complete(folder.name, numbered)
        return files
    if safetensors and not numbered:
        return files  # shards by any other name: that no key is in two of them is checked below
    raise CkptError(
        f"the folder holds several checkpoints: {name_some([escape(name) for name in files])}",
        code="FC207",
        where=folder.name,
        hint="name the one you mean",
    )


def _require_complete(folder: str, numbered: list[re.Match[str]]) -> None:
    count = int(numbered[0]["count"])
    there = {int(match["number"]) for match in numbered}
    absent = sorted(set(range(1, min(count, 99_999) + 1)) - there)
    if absent or len(there) != count:
        raise FormatError(
            f"{len(there)} of {count} shards are there; missing: "
            + ", ".join(map(str, absent[:10])),
            code="FC107",
            where=folder,
            hint="download or copy the missing shards",
        )


def _gather(folder: Folder, shards: list[str], options: Mapping[str, Any]) -> Manifest:
    def read(shard: str) -> tuple[str, Manifest]:
        return shard, read_source(folder.open(shard), **options)

    if folder.is_remote and len(shards) > 1:
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            parts = list(threads.map(read, shards))
    else:
        parts = [read(shard) for shard in shards]
    manifest = _merge(folder.name, parts)
    return replace(manifest, folder=folder.path, open_beside=beside(folder), remote=cost_of(folder))


def _merge(folder: str, parts: list[tuple[str, Manifest]]) -> Manifest:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    findings: list[Finding] = []
    beside: list[Beside] = []
    pickle_globals: dict[str, str] = {}
    for shard, part in parts:
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise FormatError(
                    f"two shards hold `{escape(tensor.name)}`: `{tensors[tensor.name].file}` and "
                    f"`{escape(shard)}`",
                    code="FC202",
                    where=folder,
                    key=tensor.name,
                    hint="remove the stale one, or name the file you mean",
                )
            tensors[tensor.name] = replace(tensor, file=shard)
        for key, value in part.metadata.items():
            if key == ALIASES_KEY:
                continue  # of this shard alone, and read already
            if metadata.setdefault(key, value) != value:
                findings.append(_conflict(folder, key))
        findings += part.findings
        beside += part.beside
        pickle_globals.update(part.pickle_globals)

    def check() -> None:
        for _, part in parts:
            part.check()

    wrappers = list(dict.fromkeys(part.wrapper for _, part in parts if part.wrapper))
    formats = list(dict.fromkeys(part.format for _, part in parts))
    if len(formats) > 1:
        raise FormatError(
            f"the shards are of different formats: {', '.join(formats)}",
            code="FC107",
            where=folder,
        )
    return Manifest(
        uri=folder,
        format=formats[0],
        tensors=tuple(tensors.values()),
        files=tuple((shard, part.files[0][1]) for shard, part in parts),
        wrapper=", ".join(wrappers) or None,
        metadata=metadata,
        pickle_globals=pickle_globals,
        beside=tuple(beside),
        findings=tuple(findings),
        details=parts[0][1].details if len(parts) == 1 else {"shards": len(parts)},
        sources=tuple(source for _, part in parts for source in part.sources),
        check=check,
    )


def _conflict(folder: str, key: str) -> Finding:
    return Finding(
        code="FC209",
        severity="warning",
        key=key,
        detail=f"the shards of `{folder}` disagree on the metadata `{escape(key)}`; "
        "the first is kept",
    )


def _cross_check(weight_map: Mapping[str, str], manifest: Manifest, path: str) -> None:
    held = {tensor.name: tensor.file for tensor in manifest.tensors}
    absent = [name for name, shard in weight_map.items() if held.get(name) != shard]
    if absent:
        raise FormatError(
            f"the index lists {len(absent)} tensors that their shards lack: "
            f"{name_some([escape(name) for name in absent])}",
            code="FC107",
            where=path,
            key=absent[0],
            hint="the shards are of another release than the index; download both again",
        )
    stored = {tensor.name for tensor in distinct(manifest.tensors)}
    unlisted = [name for name in held if name not in weight_map and name in stored]
    if unlisted:
        raise FormatError(
            f"the shards hold {len(unlisted)} tensors that the index does not list: "
            f"{name_some([escape(name) for name in unlisted])}",
            code="FC107",
            where=path,
            key=unlisted[0],
            hint="the shards are of another release than the index; download both again",
        )


def _check_total(metadata: Mapping[str, Any], manifest: Manifest) -> list[Finding]:
    total = metadata.get("total_size")
    held = sum(tensor.num_bytes for tensor in distinct(manifest.tensors))
    every = sum(tensor.num_bytes for tensor in manifest.tensors)
    if total is None or total in (held, every):
        return []
    return [
        Finding(
            code="FC107",
            severity="warning",
            detail=f"the index says {escape(str(total))[:40]} bytes, the shards hold {held}",
            hint="`convert` writes a right index",
        )
    ]
