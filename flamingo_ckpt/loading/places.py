"""Where a model's files are: a local path, or a repository of the hub brought to one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from flamingo_ckpt import hub
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.tensors import escape

#: Where weights of a Hugging Face repository are, in transformers' order; an index stands for its
#: shards.
HF_WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Where open_clip's repositories and folders have theirs, in its order.
OPEN_CLIP_WEIGHTS: Final = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
#: What open_clip writes before a place.
HUB_PREFIX: Final = "hf-hub:"
LOCAL_PREFIX: Final = "local-dir:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How files are looked for.

    Attributes:
        revision: branch, tag or commit of a repository.
        cache_dir: of the hub's cache, instead of its usual place.
        local_files_only: never ask the network.
        token: for the hub.
    """

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | bool | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `hub.download`."""
        return {name: getattr(self, name) for name in self.__slots__}


def local_path(place: str, what: str) -> str | None:
    """The local path that a place is; None for a repository of the hub.

    Args:
        place: a path, the id of a repository, or either after open_clip's `local-dir:` or
            `hf-hub:`.
        what: for messages.

    Raises:
        CkptError: FC450 where it is neither.
    """
    if place.startswith(HUB_PREFIX):
        return None
    path = os.path.expanduser(place.removeprefix(LOCAL_PREFIX))
    if path and os.path.exists(path):
        return path
    if not place.startswith(LOCAL_PREFIX) and hub.is_repo_id(place):
        return None
    raise CkptError(
        f"there is no {what} at `{escape(place)}`",
        code="FC450",
        where=escape(place) or None,
        hint="name a local file or folder, or a repository of the hub as `owner/name`",
    )


def config_folder(place: str, access: Access, what: str) -> str:
    """The folder with the configs (and the tokenizer) of a place; no weights are fetched.

    Raises:
        CkptError: FC450 where it is no folder; what `hub.snapshot` raises.
    """
    path = local_path(place, what)
    if path is None:
        return hub.snapshot(_repo(place), **access.options())
    if not os.path.isdir(path):
        raise CkptError(
            f"`{escape(path)}` is a file: a {what} is a folder with its config",
            code="FC450",
            where=path,
            hint="name the folder",
        )
    return path


def fetch_weights(place: str, folder: str, access: Access, names: Sequence[str]) -> str:
    """The first of `names` that a place has, as a local path; of an index also all its shards.

    Args:
        place: as given by the user.
        folder: what `config_folder` gave for it.
        access: how to look; the commit is that of `folder`.
        names: file names in order of preference. A local folder without any of them is given
            itself: there may be shards, or one file of another name.

    Raises:
        CkptError: FC471 or FC473 where a repository has none; what `hub.download` raises.
    """
    if local_path(place, "model") is not None:
        paths = [os.path.join(folder, name) for name in names]
        return next((path for path in paths if os.path.isfile(path)), folder)
    # of the commit that the config is of, whatever is pushed in between
    pinned = replace(access, revision=os.path.basename(folder))
    for name in names:
        try:
            return fetch_file(place, name, pinned)
        except CkptError as error:
            if error.code not in ("FC471", "FC473"):
                raise
    is_offline = access.local_files_only or hub.is_offline()
    raise CkptError(
        f"the repository `{escape(_repo(place))}` has no weights"
        + (" in the cache" if is_offline else "")
        + ": looked for "
        + ", ".join(f"`{name}`" for name in names),
        code="FC473" if is_offline else "FC471",
        where=escape(_repo(place)),
        hint="download them once while online" if is_offline else "name another repository",
    )


def fetch_file(place: str, filename: str, access: Access) -> str:
    """One file of a repository, and the shards beside it where it is an index.

    Raises:
        CkptError: what `hub.download` raises, FC101 and FC503 for an index that is none.
    """
    path = hub.download(_repo(place), filename, **access.options())
    if filename.endswith(".index.json"):
        from flamingo_ckpt.formats.sharded import shards_of

        commit = os.path.basename(path.removesuffix(filename).rstrip("/"))
        beside = filename.rpartition("/")[0]
        options = access.options() | {"revision": commit}
        for shard in shards_of(path):
            hub.download(_repo(place), f"{beside}/{shard}".lstrip("/"), **options)
    return path


def _repo(place: str) -> str:
    return place.removeprefix(HUB_PREFIX)
