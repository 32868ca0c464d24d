"""The release that is checked: its files, checkpoint and model, each as far as it can be read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.diff.sides import Side, checkpoint_side
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.hub import LocalCopy, parse_uri
from flamingo_ckpt.models.head_counts import head_counts
from flamingo_ckpt.release.folder import ReleaseFile, list_files, not_here
from flamingo_ckpt.tensors import Manifest

if TYPE_CHECKING:
    from flamingo_ckpt.models.config import ModelConfig

#: Where a model's config can lie; the first that is there counts.
CONFIG_NAMES = ("config.json", "open_clip_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is checked.

    Attributes:
        uri: as the user named it.
        root: the folder, or the one file.
        files: all that an upload would take.
        manifest: of its checkpoint; None where it cannot be read.
        unreadable: why not.
        side: the checkpoint taken apart by its layout; None where it cannot be.
        config: the model, by the config that was named or the release's own.
        config_path: the release's own config file; None where it has none.
        config_error: what is wrong with it.
        named_config: `--config`.
        reading: how the checkpoint is read: `wrapper_key`, `npy_bfloat16`.
        by_path: the files by their path.
    """

    uri: str
    root: str
    files: tuple[ReleaseFile, ...]
    manifest: Manifest | None = None
    unreadable: CkptError | None = None
    side: Side | None = None
    config: ModelConfig | None = None
    config_path: str | None = None
    config_error: CkptError | None = None
    named_config: str | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    by_path: Mapping[str, ReleaseFile] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether it is more than one file."""
        return os.path.isdir(self.root)

    @property
    def read_files(self) -> frozenset[str]:
        """Paths of the files that the checkpoint was read from, and of its index."""
        if self.manifest is None:
            return frozenset()
        if not self.is_folder:
            return frozenset(one.path for one in self.files)
        names = {os.path.basename(name) for name, _ in self.manifest.files}
        index = self.manifest.details.get("index")
        return frozenset(names | ({str(index)} if index else set()))

    def relative(self, path: str) -> str:
        """A path of this machine as a path in the release."""
        base = self.root if self.is_folder else os.path.dirname(self.root) or "."
        return os.path.relpath(path, base).replace(os.sep, "/")

    def path_of(self, where: str) -> str | None:
        """The file of the release that an error is about, by its `where`; None for any other."""
        named = where.partition(", ")[0]
        for path in (where, named, self.relative(where), self.relative(named)):
            if path in self.by_path:
                return path
        return None

    def json_of(self, name: str, max_bytes: int | None = None) -> Any:
        """A JSON file of the folder, or None where it is not there; larger than a config is asked.

        Raises:
            CkptError: FC401 where it is no JSON.
        """
        from flamingo_ckpt.models.config import read_json

        file = self.by_path.get(name)
        if file is None or not file.is_regular:
            return None
        return read_json(file.full) if max_bytes is None else read_json(file.full, max_bytes)


def open_subject(
    uri: str,
    *,
    config: str | None = None,
    wrapper_key: str | None = None,
    npy_bfloat16: bool = False,
    skip: Collection[str] = (),
) -> Subject:
    """Open a release as far as it can be opened; only what cannot be listed at all raises.

    Args:
        uri: a folder, a file, or the index of a folder, which stands for the folder.
        config: the model's config or preset, instead of the release's own.
        wrapper_key: the weights of torch files are under this key.
        npy_bfloat16: read 2-byte void elements of numpy files as bfloat16.
        skip: full paths that are no part of the release.

    Raises:
        CkptError: FC002 where there is nothing, FC404 for a named config that is not there.
    """
    root = os.path.dirname(uri) or "." if uri.endswith(".index.json") else uri
    if not os.path.exists(root):
        raise CkptError(f"there is no `{root}`", code="FC002", where=root)
    files = _files_of(uri, root, skip)
    facts: dict[str, Any] = {
        "uri": uri,
        "root": root,
        "files": files,
        "by_path": {one.path: one for one in files},
        "named_config": config,
        "reading": {"wrapper_key": wrapper_key, "npy_bfloat16": npy_bfloat16},
    }
    try:
        facts["manifest"] = open_checkpoint(uri, **facts["reading"])
    except CkptError as error:
        facts["unreadable"] = error
    facts |= _configs(root, config)
    manifest = facts.get("manifest")
    if manifest is not None:
        try:
            facts["side"] = checkpoint_side(manifest, head_counts(facts.get("config")))
        except CkptError as error:
            facts["unreadable"] = error
    return Subject(**facts)


def _files_of(uri: str, root: str, skip: Collection[str]) -> tuple[ReleaseFile, ...]:
    """What is there; of a copy from the hub what was downloaded, and by name what was not."""
    found = list_files(root, skip)
    if not isinstance(uri, LocalCopy) or not uri.files:
        return found
    place = parse_uri(uri.uri).path
    inside = place + "/" if place and os.path.isdir(root) else ""
    wanted = {one.removeprefix(inside) for one in uri.files}
    left = [not_here(path.removeprefix(inside), size) for path, size in uri.left]
    kept = [one for one in found if one.path in wanted] if os.path.isdir(root) else list(found)
    return tuple(sorted([*kept, *left], key=lambda one: one.path))


def _configs(root: str, named: str | None) -> dict[str, Any]:
    from flamingo_ckpt.models.config import read_config

    found: dict[str, Any] = {}
    own = next(
        (
            os.path.join(root, name)
            for name in CONFIG_NAMES
            if os.path.isfile(os.path.join(root, name))
        ),
        None,
    )
    if own is not None:
        found["config_path"] = own
        try:
            found["config"] = read_config(os.path.abspath(own))
        except CkptError as error:
            found["config_error"] = error
    if named is not None:
        found["config"] = read_config(named)
    return found
