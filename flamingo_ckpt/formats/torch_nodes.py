"""What a node of a torch pickle is: a dict, a list, a tensor, an object of an unknown class.

Only looked at, never compared, hashed or printed beyond its first level: how large a node is when
it is unfolded is the file's choice.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from flamingo_ckpt.errors import FormatError
from flamingo_ckpt.formats.pickle_globals import (
    DICT_TYPES,
    REBUILDERS,
    UNSUPPORTED_TENSORS,
    in_table,
)
from flamingo_ckpt.formats.pickle_nodes import Global, Inert, Mapping, walk
from flamingo_ckpt.tensors import escape

# Four times the nodes that a pickle can have: only values that overlap again and again exceed it.
_MAX_VISITS = 16_000_000


def is_natural(value: Any) -> bool:
    """Whether it is an int that a size or an offset can be: 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


def entries(node: Any) -> list[tuple[Any, Any]] | None:
    """(key, value) of a dict-like or list-like node of a known class; None for anything else."""
    if isinstance(node, Mapping):
        return node.pairs
    if type(node) in (list, tuple):
        return [(str(index), value) for index, value in enumerate(node)]
    if not calls(node, DICT_TYPES):
        return None
    initial = _pairs_of_args(node)
    return None if initial is None else initial + node.pairs


def _pairs_of_args(node: Inert) -> list[tuple[Any, Any]] | None:
    """`OrderedDict([[k, v], ...])` and `OrderedDict({...})`; None for what is neither."""
    found: list[tuple[Any, Any]] = []
    for position, arg in enumerate(node.args):
        if isinstance(arg, Mapping):
            found += arg.pairs
        elif type(arg) in (list, tuple):
            if any(type(item) not in (list, tuple) or len(item) != 2 for item in arg):
                return None
            found += [tuple(item) for item in arg]
        elif position or not (arg is None or isinstance(arg, Global)):
            return None  # a defaultdict's factory comes first; anything else is no dict
    return found


def state_entries(node: Any) -> list[tuple[Any, Any]]:
    """What BUILD set on a dict: `_metadata` of a module's state dict, mostly."""
    found: list[tuple[Any, Any]] = []
    for state in node.states if isinstance(node, Inert) else ():
        if isinstance(state, Mapping):
            found += state.pairs
    return found


def is_tensor(node: Any) -> bool:
    """Whether the node is a call that makes a tensor, of whatever kind."""
    return calls(node, REBUILDERS) or calls(node, UNSUPPORTED_TENSORS)


def calls(node: Any, names: Container[tuple[str, str]]) -> bool:
    """Whether the node is a call of, or an instance made by, one of these globals."""
    return (
        isinstance(node, Inert)
        and isinstance(node.function, Global)
        and (node.function.module, node.function.name) in names
    )


class Census:
    """Counts the tensors under values, each value once, with a bound on the work for one file.

    Args:
        where: the file, for the error.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._counts: dict[int, int] = {}
        self._visited = 0

    def count(self, root: Any) -> int:
        """Tensors at or under a value, each once, however the graph loops.

        Raises:
            FormatError: FC111 where the values of a file refer to each other too often.
        """
        if id(root) not in self._counts:
            found = 0
            for node in walk(root, enter=lambda node: not is_tensor(node)):
                self._visited += 1
                found += is_tensor(node)
                if self._visited > _MAX_VISITS:
                    raise FormatError(
                        "the values in the file refer to each other too often to be listed",
                        code="FC111",
                        where=self.where,
                    )
            self._counts[id(root)] = found
        return self._counts[id(root)]


def unknown_class(node: Any) -> str | None:
    """The class of an inert object that no table knows, or None."""
    if isinstance(node, Inert):
        if not isinstance(node.function, Global):
            return describe(node.function)
        if not in_table(node.function.module, node.function.name):
            return str(node.function)
    return None


def describe(node: Any) -> str:
    """A short, printable description of a value: what `inspect` lists beside the weights.

    It never goes below the first level: how large a value prints is the file's choice.
    """
    return escape(_describe(node))


def _describe(node: Any) -> str:
    if node is None or isinstance(node, bool):
        return str(node)
    if isinstance(node, int):
        return f"int {node}" if abs(node) < 1 << 63 else "int of many digits"
    if isinstance(node, float):
        return f"float {node!r}"
    if isinstance(node, str):
        return f"str {node[:60]!r}" + ("..." if len(node) > 60 else "")
    if isinstance(node, bytes):
        return f"{len(node)} bytes"
    if isinstance(node, Global):
        return str(node)
    if is_tensor(node):
        return "tensor"
    if type(node) in (list, tuple):
        return f"list of {len(node)}"
    if isinstance(node, Mapping):
        return f"mapping of {len(node.pairs)}"
    if calls(node, DICT_TYPES):
        initial = sum(len(arg) for arg in node.args if type(arg) in (list, tuple))
        return f"mapping of {initial + len(node.pairs)}"
    if isinstance(node, Inert):
        return f"object {node.function}" if isinstance(node.function, Global) else "object"
    return type(node).__name__.lower()
