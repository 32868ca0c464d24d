"""A release from the hub into a folder: pinned, chosen by an allow-list, checked, put in place.

The bytes come through the cache of `huggingface_hub`, so a pull that was killed goes on where it
was; what is put in place is copied out of it and compared, on the way, with the size and the digest
that the hub lists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from flamingo_ckpt import __version__, hub
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.folder import WEIGHT_FILES, is_carried, is_code, is_pickle
from flamingo_ckpt.formats.opening import is_index
from flamingo_ckpt.formats.sharded import require_there, shards_in
from flamingo_ckpt.formats.staging import (
    check_replaceable,
    check_space,
    staged_folder,
    sync_folder,
    write_synced,
)
from flamingo_ckpt.hub.fetching import fetch_file
from flamingo_ckpt.hub.listing import HubFile
from flamingo_ckpt.hub.remote import list_all
from flamingo_ckpt.tensors import escape
from flamingo_ckpt.transfer.digests import copy_checked

#: What a pulled folder says of its origin.
RECORD_NAME: Final = ".flamingo-pull.json"
_MAX_RECORD_BYTES = 64 << 20
_MORE_WEIGHTS = (".safetensors", ".npz", ".npy")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullFile:
    """One file that is to be there.

    Attributes:
        path: in the folder.
        source: as the hub lists it.
    """

    path: str
    source: HubFile


@dataclass(frozen=True, slots=True, kw_only=True)
class PullPlan:
    """What a pull takes and what it leaves.

    Attributes:
        uri: as the user wrote it.
        place: the folder in the repository, at its commit.
        files: that are taken, by path.
        left: (path in the repository, number of bytes, why) of those that are not.
        cost: what it took to find out, the `remote` field of a report's input.
    """

    uri: str
    place: hub.HubUri
    files: tuple[PullFile, ...]
    left: tuple[tuple[str, int, str], ...]
    cost: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of the files that are taken."""
        return sum(one.source.num_bytes for one in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What was put in place.

    Attributes:
        digests: path -> SHA-256 of what was written.
        num_bytes_moved: over the network; what the cache had is not moved again.
    """

    digests: dict[str, str]
    num_bytes_moved: int


def plan_pull(uri: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> PullPlan:
    """Choose among the files of a place on the hub.

    Args:
        uri: of a repository, a folder, an index or a file in it.
        include: globs over paths; these files are taken, and no others. Without any, the allow-list
            decides: weights, configs, tokenizers, processors and cards, no code, and no pickles
            where there are safetensors.
        exclude: globs over paths that are not taken in any case.

    Raises:
        CkptError: FC001 nothing to take, FC470 to FC477.
    """
    if hub.is_offline():
        raise CkptError(
            "a pull asks the hub what a repository holds, and no network may be used",
            code="FC473",
            where=escape(uri),
            hint="unset HF_HUB_OFFLINE; other verbs take what is in the cache",
        )
    folder, listing, name = list_all(hub.parse_uri(uri), uri)
    start = f"{listing.uri.path}/" if listing.uri.path else ""
    files = {one.path.removeprefix(start): one for one in listing.files}
    if name is not None:
        wanted = {name}
        if name.endswith(".json") and is_index(folder.open(name)):
            shards = shards_in(folder, name)
            require_there(folder, shards, folder.join(name))
            wanted |= set(shards)
        files = {path: one for path, one in files.items() if path in wanted}
    has_safetensors = any(path.endswith(".safetensors") for path in files)
    taken: list[PullFile] = []
    left: list[tuple[str, int, str]] = []
    for path, one in sorted(files.items()):
        why = _why_left(path, include, exclude, has_safetensors, is_named=name is not None)
        if why:
            left.append((one.path, one.num_bytes, why))
        else:
            taken.append(PullFile(path=path, source=one))
    if not taken:
        raise CkptError(
            f"none of the {len(files)} files there is to be taken",
            code="FC001",
            where=escape(uri),
            hint="--include names others; --dry-run lists them" if files else "name another folder",
        )
    return PullPlan(
        uri=uri, place=listing.uri, files=tuple(taken), left=tuple(left), cost=folder.cost()
    )


def _why_left(
    path: str, include: Sequence[str], exclude: Sequence[str], has_safetensors: bool, is_named: bool
) -> str:
    """Why a file is left on the hub; "" where it is taken."""
    if path == RECORD_NAME:
        return "the record of another pull"
    if any(_fits(path, glob) for glob in exclude):
        return "--exclude"
    if include:
        return "" if any(_fits(path, glob) for glob in include) else "not in --include"
    if is_named:
        return ""
    name = path.rpartition("/")[2]
    suffix = os.path.splitext(name)[1].lower()
    if any(part.startswith(".") for part in path.split("/")) and name != ".gitattributes":
        return "hidden"
    if is_code(name):
        return "code"
    if is_pickle(name):
        return "a pickle, and there are safetensors" if has_safetensors else ""
    if name.endswith(".bin.index.json") and has_safetensors:
        return "the index of pickles, and there are safetensors"
    known = suffix in _MORE_WEIGHTS or bool(WEIGHT_FILES.fullmatch(name)) or is_carried(name)
    return "" if known else "not weights, a config, a tokenizer, a processor or a card"


def _fits(path: str, glob: str) -> bool:
    """Over the whole path; a pattern without a slash over the last part too."""
    return fnmatchcase(path, glob) or (
        "/" not in glob and fnmatchcase(path.rpartition("/")[2], glob)
    )


def check_dst(dst: str, *, overwrite: bool) -> None:
    """Raise FC003 or FC004 before anything is downloaded, where DST cannot become the folder."""
    check_replaceable(os.path.abspath(dst) if dst else dst, overwrite=overwrite, folder=True)


def run_pull(
    plan: PullPlan, dst: str, *, overwrite: bool, on_bytes: Callable[[int], None]
) -> Pulled:
    """Download, copy into a staged folder, compare, put in place.

    Args:
        plan: from `plan_pull`.
        dst: the folder to make.
        overwrite: replace one that exists. What an earlier pull put there goes, and so do weights;
            other files stay.
        on_bytes: told of bytes as they arrive.

    Raises:
        WriteError: FC003, FC004.
        CkptError: FC470 to FC474, FC479 for a file that is not what the hub lists.
    """
    check_dst(dst, overwrite=overwrite)
    moved = [0]

    def count(num_bytes: int) -> None:
        moved[0] += num_bytes
        on_bytes(num_bytes)

    # All are downloaded before anything is staged: what breaks off here is kept by the cache.
    paths = {one.path: fetch_file(plan.place, one.source, count) for one in plan.files}
    digests: dict[str, str] = {}
    with staged_folder(dst, overwrite=overwrite, keep=_keeps(dst)) as staging:
        check_space(staging, plan.num_bytes, dst)
        for one in plan.files:
            target = os.path.join(staging, *one.path.split("/"))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            digest, is_right = copy_checked(paths[one.path], target, one.source)
            if not is_right:  # perhaps the cache is damaged: once more, from the hub
                path = fetch_file(plan.place, one.source, count, force=True)
                digest, is_right = copy_checked(path, target, one.source)
            if not is_right:
                raise _differs(plan, one, digest, os.path.getsize(target))
            digests[one.path] = digest
        for folder in {os.path.dirname(one.path) for one in plan.files} - {""}:
            sync_folder(os.path.join(staging, folder))
        write_synced(os.path.join(staging, RECORD_NAME), _record(plan, digests))
    return Pulled(digests=digests, num_bytes_moved=moved[0])


def _keeps(dst: str) -> Callable[[str], bool]:
    """Whether an entry of the folder that is replaced stays: nobody but its user put it there."""
    pulled = {RECORD_NAME}
    try:
        with open(os.path.join(dst, RECORD_NAME), "rb") as file:
            record = json.loads(file.read(_MAX_RECORD_BYTES))
        pulled |= {str(one["path"]).partition("/")[0] for one in record["files"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass  # no record, or none of ours
    return lambda name: name not in pulled and not WEIGHT_FILES.fullmatch(name)


def _differs(plan: PullPlan, one: PullFile, digest: str, num_bytes: int) -> CkptError:
    listed = one.source
    if num_bytes != listed.num_bytes:
        what = f"has {num_bytes} bytes, and the hub lists {listed.num_bytes}"
    elif listed.sha256 is not None:
        what = f"has the SHA-256 `{digest[:16]}...`, and the hub lists `{listed.sha256[:16]}...`"
    else:
        what = f"is not the blob `{str(listed.blob_id)[:16]}...` that the hub lists"
    return CkptError(
        f"`{escape(listed.path)}` {what}",
        code="FC479",
        where=str(plan.place),
        hint="nothing was put in place; pull again, and if it stays so, ask the owner of the "
        "repository, or of the mirror that HF_ENDPOINT names",
    )


def _record(plan: PullPlan, digests: dict[str, str]) -> bytes:
    """What the folder remembers; the same bytes for the same commit and the same choice."""
    content = {
        "schema_version": "1.0",
        "tool": {"name": "flamingo-ckpt", "version": __version__},
        "uri": str(plan.place),
        "repo_id": plan.place.repo_id,
        "revision": hub.parse_uri(plan.uri).revision,
        "commit": plan.place.revision,
        "files": [
            {
                "path": one.path,
                "num_bytes": one.source.num_bytes,
                "sha256": digests[one.path],
            }
            for one in plan.files
        ],
    }
    return (json.dumps(content, indent=2) + "\n").encode("utf-8")
