"""The inert values that the pickle machine builds, and the walk over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something importable, which is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Mapping:
    """A dict, as the pairs in the order they were set: keys are neither hashed nor merged."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Inert:
    """What a call or an instance would have become.

    Attributes:
        function: mostly a `Global`; whatever the pickle put there.
        args: the arguments, a tuple where the file is well-formed.
        items: appended or added later.
        pairs: set by key later.
        states: each argument of BUILD, in order.
    """

    function: Any
    args: Any
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Persistent:
    """A persistent id: in torch's files, a reference to a storage."""

    id: Any


@dataclass(slots=True, eq=False)
class Collection:
    """A set or frozenset, unhashed."""

    items: list[Any]


def children(node: Any) -> Iterator[Any]:
    """Every node directly under this one."""
    if isinstance(node, Mapping):
        for key, value in node.pairs:
            yield key
            yield value
    elif isinstance(node, Inert):
        yield node.function
        yield node.args
        yield from node.items
        yield from node.states
        for key, value in node.pairs:
            yield key
            yield value
    elif isinstance(node, Collection):
        yield from node.items
    elif type(node) in (list, tuple):
        yield from node


def walk(root: Any, enter: Callable[[Any], bool] = lambda _: True) -> Iterator[Any]:
    """Every node at or under `root`, each once, however the graph loops.

    Args:
        root: where to begin.
        enter: whether to go below a node.
    """
    seen: set[int] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, str | bytes | int | float | None) or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if enter(node):
            pending.extend(children(node))
