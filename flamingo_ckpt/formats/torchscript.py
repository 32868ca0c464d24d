"""TorchScript modules (OpenAI's CLIP files): their parameters, as attributes of inert objects.

No code of the archive is run, compiled or read: `code/` is never opened.
"""

from __future__ import annotations

from typing import Any

from flamingo_ckpt.errors import CkptError, FormatError
from flamingo_ckpt.formats.pickle_nodes import Global, Inert, Mapping
from flamingo_ckpt.formats.torch_nodes import Census, describe
from flamingo_ckpt.formats.torch_objects import TorchObjects
from flamingo_ckpt.formats.wrapper import Selection
from flamingo_ckpt.tensors import Beside, TensorInfo, escape

_MAX_DEPTH = 200
# Shared modules appear under every path that leads to them; a few hundred bytes can make a million.
_MAX_MODULES = 100_000
_MAX_NAME_CHARACTERS = 32 << 20
# Attributes that every scripted module carries and no state dict has.
_BOOKKEEPING = frozenset({"training", "_is_full_backward_hook"})


def read_module(root: Any, objects: TorchObjects, where: str) -> Selection:
    """The tensors of a scripted module, named by the path of attributes as in its `state_dict()`.

    Raises:
        CkptError: FC201 where the root is no module.
        FormatError: FC104 or FC110.
    """
    if not _is_module(root):
        raise CkptError(
            f"the TorchScript archive holds no module: it is a {describe(root)}",
            code="FC201",
            where=where,
        )
    tensors: list[TensorInfo] = []
    beside: list[Beside] = []
    names: set[str] = set()
    pending: list[tuple[str, Inert, int]] = [("", root, 0)]
    visited = characters = 0
    census = Census(where)
    while pending:
        prefix, module, depth = pending.pop()
        visited += 1
        submodules = []
        for key, value in _attributes(module):
            if type(key) is not str:
                raise FormatError("a module attribute has no name", code="FC110", where=where)
            characters += len(prefix) + len(key)
            if (
                depth > _MAX_DEPTH
                or max(visited, len(names)) > _MAX_MODULES
                or characters > _MAX_NAME_CHARACTERS
            ):
                raise FormatError("the module tree is too deep or loops", code="FC111", where=where)
            name = f"{prefix}{key}"
            if name in names:
                raise FormatError(
                    f"two attributes are named `{escape(name)}`", code="FC104", where=where
                )
            names.add(name)
            if _is_module(value):
                submodules.append((f"{name}.", value, depth + 1))
                continue
            tensor = objects.tensor(value, name)
            if tensor is not None:
                tensors.append(tensor)
            elif key not in _BOOKKEEPING:
                beside.append(
                    Beside(path=name, kind=describe(value), num_tensors=census.count(value))
                )
        pending += reversed(submodules)
    return Selection(key=None, tensors=tuple(tensors), beside=tuple(beside), unknown_classes=())


def _is_module(node: Any) -> bool:
    return (
        isinstance(node, Inert)
        and isinstance(node.function, Global)
        and node.function.module.split(".")[0] == "__torch__"
    )


def _attributes(module: Inert) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for state in module.states:
        if isinstance(state, Mapping):
            found += state.pairs
    return found
