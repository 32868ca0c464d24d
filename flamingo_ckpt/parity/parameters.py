"""Both sides' weights under canonical names: equal bit by bit, or different, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flamingo_ckpt.parity.elements import first_difference, shape_of
from flamingo_ckpt.parity.explaining import explain, has_tensor
from flamingo_ckpt.parity.result import Parameters
from flamingo_ckpt.parity.shell import Shell
from flamingo_ckpt.parity.stages import part_of
from flamingo_ckpt.vocabulary import EMBED

if TYPE_CHECKING:
    pass

# Tensors of which more is told than how many elements differ.
_MAX_EXPLAINED = 32


def compare_parameters(a: Shell, b: Shell) -> Parameters:
    """Compare every canonical tensor; a difference is told by what it looks like.

    Values in two dtypes are compared as numbers, which both dtypes have to hold exactly.
    """
    # in the first side's order, so that a tensor that holds several is read once
    both = sorted(
        (
            name
            for name in a.atoms
            if name in b.atoms and has_tensor(a, name) and has_tensor(b, name)
        ),
        key=_order(a),
    )
    different: dict[str, str] = {}
    cast: list[str] = []
    for name in both:
        ours, theirs = a.atom(name), b.atom(name)
        if ours.shape != theirs.shape:
            different[name] = f"{shape_of(ours)} in A, {shape_of(theirs)} in B"
        elif (found := first_difference(ours, theirs)) is not None:
            different[name] = found
        elif ours.dtype != theirs.dtype:
            cast.append(name)
        for shell in (a, b):
            shell.release(name)
    for name, one in explain(a, b, list(different)[:_MAX_EXPLAINED]).items():
        if one.kind != "values":
            different[name] = f"{one.words} ({different[name]})"
    return Parameters(
        num_compared=len(both),
        different=different,
        cast=tuple(cast),
        only_a=_only(a, b),
        only_b=_only(b, a),
    )


def _order(shell: Shell) -> Callable[[str], tuple[int, str]]:
    place = {target.key: at for at, target in enumerate(shell.targets)}
    return lambda name: (place[shell.target_of(name).key], name)


def _only(one: Shell, other: Shell) -> tuple[str, ...]:
    names = (
        name
        for name in one.atoms
        if has_tensor(one, name) and not (name in other.atoms and has_tensor(other, name))
    )
    # a tied head is the embedding under a second name
    return tuple(
        name for name in names if name not in one.unused and not _is_second_name(one, other, name)
    )


def _is_second_name(one: Shell, other: Shell, name: str) -> bool:
    target = one.target_of(name)
    return any(
        name != again and again in other.atoms and one.target_of(again) is target
        for again in one.atoms
        if part_of(again).startswith("lm.")
    )


def rows_of(shell: Shell) -> int | None:
    """Rows of a side's vocabulary; None where it has none."""
    piece = shell.atoms.get(EMBED)
    return piece.shape[0] if piece is not None else None
