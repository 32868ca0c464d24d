"""Folders that checkpoints lie in: on this machine, or on the hub.

What an index may name and how shards are checked is decided once, over either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats.source import FileSource, check_contained
from flamingo_ckpt.tensors import ByteSource, escape


class Folder(Protocol):
    """Names, and files that can be opened by name."""

    @property
    def name(self) -> str:
        """What to call it in messages, and the `uri` of its manifest."""

    @property
    def path(self) -> str | None:
        """Where it is on this machine; None for one of the hub."""

    @property
    def is_remote(self) -> bool:
        """Whether every read is a request."""

    def names(self) -> list[str]:
        """Everything in it, sorted."""

    def is_file(self, name: str) -> bool:
        """Whether it has a file of this name."""

    def exists(self, name: str) -> bool:
        """Whether it has anything of this name."""

    def join(self, name: str) -> str:
        """What to call an entry in messages."""

    def open(self, name: str) -> ByteSource:
        """A file in it; raises `UnsafeError` (FC503) for a link that leads out."""


class LocalFolder:
    """A folder of the file system.

    Args:
        path: as the user named it.
    """

    is_remote = False

    def __init__(self, path: str) -> None:
        self.path: str | None = path
        self._path = path

    @property
    def name(self) -> str:
        """The path."""
        return self._path

    def names(self) -> list[str]:
        """Everything in it, sorted.

        Raises:
            CkptError: FC002 where it cannot be listed.
        """
        try:
            return sorted(os.listdir(self._path))
        except OSError as error:
            raise CkptError(
                f"cannot list `{escape(self._path)}`: {error.strerror}",
                code="FC002",
                where=self._path,
            ) from error

    def is_file(self, name: str) -> bool:
        """Whether it has a file of this name, or a link to one."""
        return os.path.isfile(self.join(name))

    def exists(self, name: str) -> bool:
        """Whether it has anything of this name, also a link to nowhere."""
        return os.path.lexists(self.join(name))

    def join(self, name: str) -> str:
        """The path of an entry."""
        return os.path.join(self._path, name)

    def open(self, name: str) -> FileSource:
        """A file in it."""
        path = self.join(name)
        check_contained(self._path, path)
        return FileSource(path)


def beside(folder: Folder) -> Callable[[str], ByteSource | None]:
    """Opens small files of a folder, such as a config; None for one that is not there."""

    def open_file(name: str) -> ByteSource | None:
        if not folder.is_file(name):
            return None
        # a config may be a link to anywhere: it names no files
        return folder.open(name) if folder.path is None else FileSource(folder.join(name))

    return open_file


def cost_of(folder: Folder) -> Callable[[], Mapping[str, Any]] | None:
    """What reading a folder of the hub has cost so far; None for a local one."""
    return getattr(folder, "cost", None)
