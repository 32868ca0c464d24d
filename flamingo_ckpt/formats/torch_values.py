"""Plain values of a torch pickle: what a training checkpoint holds beside its weights.

Dicts, lists, tuples, text, numbers, truth values, None, and tensors, which stay descriptions of
where their bytes are. Whatever else a pickle holds is refused by its place and its class.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.formats.source import FileSource
from flamingo_ckpt.formats.torch_nodes import describe, entries, is_tensor
from flamingo_ckpt.formats.torch_objects import TorchObjects
from flamingo_ckpt.formats.zip_archive import LOCAL_MAGIC, ZipArchive
from flamingo_ckpt.tensors import escape

_MAX_DEPTH = 32
# Twenty times what the optimizer of a model with a thousand tensors has; shared parts count again.
_MAX_VALUES = 200_000
_KEYS = (str, int, float, bool, type(None))


def read_torch_values(path: str, keys: Collection[str]) -> dict[str, Any]:
    """The values under some keys of the dict that a torch file holds.

    Args:
        path: of a file that `torch.save` wrote.
        keys: those wanted; another key's value is not looked at, and a wanted one that is not there
            is not in the answer.

    Raises:
        CkptError: FC112 where the file is of another format or holds no dict, FC460 for a value
            that is not plain, named by its place; FC111 where values nest or repeat without end.
    """
    source = FileSource(path)
    root, objects = _read_root(source)
    pairs = entries(root) if type(root) not in (list, tuple) else None
    if pairs is None:
        raise CkptError(
            f"the file holds no dict but: {describe(root)}", code="FC112", where=source.name
        )
    reader = _Reader(objects, source.name)
    # The type first: a key may be a structure whose comparison never ends.
    wanted = [(key, value) for key, value in pairs if type(key) is str and key in keys]
    return reader.mapping(wanted, "", 0)


def _read_root(source: FileSource) -> tuple[Any, TorchObjects]:
    from flamingo_ckpt.formats.torch_legacy import MAGIC_PICKLE, read_legacy_pickle
    from flamingo_ckpt.formats.torch_zip import is_torch_zip, read_zip_pickle

    head = source.read(0, min(source.size, 32))
    if head.startswith(LOCAL_MAGIC):
        archive = ZipArchive(source)
        if is_torch_zip(archive):
            pickled, objects, _ = read_zip_pickle(source, archive)
            return pickled.value, objects
    if head.startswith(MAGIC_PICKLE):
        pickled, objects = read_legacy_pickle(source)
        return pickled.value, objects
    raise CkptError(
        "a training state lies in a file that `torch.save` wrote, and this is none",
        code="FC112",
        where=source.name,
        hint="name the .pt file of the training run",
    )


class _Reader:
    """Reads one file's values, with a bound on how many."""

    def __init__(self, objects: TorchObjects, where: str) -> None:
        self._objects = objects
        self._where = where
        self._left = _MAX_VALUES

    def value(self, node: Any, path: str, depth: int) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise FormatError(
                f"the values under `{escape(path[:80])}` nest or repeat without end",
                code="FC111",
                where=self._where,
            )
        if node is None or type(node) in (bool, int, float, str):
            return node
        if type(node) in (list, tuple):
            parts = [self.value(part, f"{path}.{i}", depth + 1) for i, part in enumerate(node)]
            return parts if type(node) is list else tuple(parts)
        if is_tensor(node):
            return self._objects.tensor(node, path)
        pairs = entries(node)
        if pairs is None:
            raise CkptError(
                f"`{escape(path)}` is no plain value but: {describe(node)}",
                code="FC460",
                where=self._where,
                key=path,
                hint="its class would have to be run to make it; leave it out where it is saved",
            )
        return self.mapping(pairs, path, depth)

    def mapping(self, pairs: list[tuple[Any, Any]], path: str, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in pairs:
            if type(key) not in _KEYS:
                raise CkptError(
                    f"`{escape(path)}` has a key that is no text and no number: {describe(key)}",
                    code="FC460",
                    where=self._where,
                    key=path,
                )
            below = f"{path}.{key}".lstrip(".")
            if key in found:
                raise FormatError(
                    f"two entries are named `{escape(below)}`", code="FC104", where=self._where
                )
            found[key] = self.value(value, below, depth + 1)
        return found
