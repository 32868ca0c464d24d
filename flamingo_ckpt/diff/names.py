"""Names that one side lacks for a tensor that it has under another: alias trees with a gap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flamingo_ckpt.diff.sides import Side
from flamingo_ckpt.layouts.rules import Table, split_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class LostName:
    """A name without its tensor.

    Attributes:
        name: without wrapper prefixes.
        key: as the side that has it stores it.
        other_key: the key under which the other side has the tensor.
        by_a: whether it is A that lacks it.
    """

    name: str
    key: str
    other_key: str
    by_a: bool


def lost_names(a: Side, b: Side) -> Iterator[LostName]:
    """Names that one side has and the other lacks, of tensors that both have.

    A whole state dict has every decoder layer twice. A loader that wants all names misses the one
    that is gone, whatever the other one holds. A file without a whole tree has chosen to leave it
    out, which is no gap; across layouts, names are not compared.
    """
    if a.detection is None or b.detection is None or not _share_names(a, b):
        return
    for side, other in ((a, b), (b, a)):
        for name, key in _lost(side, other):
            yield LostName(name=name, key=other.stored(name), other_key=key, by_a=side is a)


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
    for key, atoms in side.reading.names.items():
        for atom in atoms:
            held.setdefault(atom, []).append(key)
    told: set[str] = set()
    for canonical, names in held.items():
        if canonical not in other.reading.atoms:
            continue
        for name in _wanted(canonical, names, table):
            is_there = other.is_model or name in other.tensors
            has_tree = _tree(name) in trees
            if is_there and has_tree and name not in side.tensors and name not in told:
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
