"""Names that one side lacks for a tensor that it has under another: alias trees with a gap."""

from __future__ import annotations

from collections.abc import Iterator

from flamingo_ckpt.layouts.rules import Table, split_numbers
from flamingo_ckpt.sides import Side


def lost_names(a: Side, b: Side) -> Iterator[tuple[str, str, bool]]:
    """(name, key that holds the same tensor, whether A lacks it; else B does).

    A whole state dict has every decoder layer twice. A loader that wants all names misses the one
    that is gone, whatever the other one holds. Names of a tree that a file has nothing of are not
    wanted; across layouts, names are not compared.
    """
    if a.detection is None or b.detection is None:
        return
    if a.is_model and b.is_model or not _share_names(a, b):
        return
    yield from ((name, key, True) for name, key in _lost(a, b))
    yield from ((name, key, False) for name, key in _lost(b, a))


def _share_names(a: Side, b: Side) -> bool:
    assert a.detection is not None
    assert b.detection is not None
    one, other = a.detection.layout, b.detection.layout
    return one is other or (one.rules_of is other.rules_of and one.rules_of is not None)


def _lost(side: Side, other: Side) -> Iterator[tuple[str, str]]:
    """(name, key as stored) of the names that the other side has and this one lacks."""
    table = side.table
    if side.is_model or side.reading is None or other.reading is None or table is None:
        return
    trees = {_tree(name) for name in side.tensors}
    held: dict[str, list[str]] = {}
    for name, canonical in side.reading.names.items():
        for one in canonical:
            held.setdefault(one, []).append(name)
    told: set[str] = set()
    for canonical, names in held.items():
        if canonical not in other.reading.atoms:
            continue
        for name in _wanted(canonical, names, table):
            is_there = _tree(name) in trees if other.is_model else name in other.tensors
            if is_there and name not in side.tensors and name not in told:
                told.add(name)
                yield name, side.stored(names[0])


def _wanted(canonical: str, names: list[str], table: Table) -> list[str]:
    """The first name, unless the tensor is there under a first name of its own, and its aliases."""
    aliases = table.aliases(canonical)
    place = table.place(canonical)
    has_first = place is None or any(name not in aliases for name in names)
    return aliases if has_first or place is None else [place.name, *aliases]


def _tree(name: str) -> str:
    """`a.layers.#` for `a.layers.3.norm.weight`: the list of modules that a name belongs to."""
    template, numbers = split_numbers(name)
    return template.partition("#")[0] if numbers else name
