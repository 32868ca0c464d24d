"""Put canonical tensors together under the very key that a module has.

`assemble` writes the spelling that a layout's files have; a module may have another of those that
the layout reads: transformers' CLIP tower without its level, GPT-NeoX's renamed head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flamingo_ckpt.layouts.axes import AxesError
from flamingo_ckpt.layouts.mapping import Assembled, Piece, form_of
from flamingo_ckpt.layouts.rules import Table
from flamingo_ckpt.tensors import TensorInfo


def assemble_one(
    key: str,
    names: Sequence[str],
    atoms: Mapping[str, Piece],
    table: Table,
    dims: Mapping[str, int],
    shape: tuple[int, ...],
) -> Assembled:
    """Put canonical tensors together under a given key, in whichever spelling a table knows it.

    `assemble` writes the spelling that a layout's files have; a module may have another.

    Args:
        key: that `table` knows.
        names: the canonical names in it, in order, all of them among `atoms`.
        atoms: canonical name -> piece.
        table: of the layout that the key is of.
        dims: sizes that no shape tells, by axis name.
        shape: that is wanted; it tells how many tensors are stacked.

    Raises:
        AxesError: the pieces do not go together.
    """
    match = table.match(key)
    assert match is not None
    pieces = [atoms[name] for name in names]
    first = pieces[0]
    if any(piece.dtype is not first.dtype for piece in pieces):
        raise AxesError("its parts have several dtypes")
    known = {**dims, **({"part": len(match.parts)} if match.parts else {})}
    wanted = TensorInfo(name=key, dtype=first.dtype, shape=shape)
    form = form_of(wanted, match, known)
    if form is None:
        made: tuple[tuple[int, ...], tuple[Piece, ...]] = (first.shape, (first,))
    else:
        sizes = form.solve(shape, known, native=True)
        counts = {name: sizes[name] for name in form.index}
        inner = {name: size for name, size in known.items() if name not in form.index}
        solved = [{**form.solve(one.shape, inner, native=False), **counts} for one in pieces]
        shapes = {form.shape(one, native=True) for one in solved}
        if len(shapes) > 1:
            raise AxesError("its parts have several shapes")
        made = (
            shapes.pop(),
            tuple(
                replace(piece, view=form.stored(piece.view, one))
                for piece, one in zip(pieces, solved, strict=True)
            ),
        )
    return Assembled(
        name=key,
        dtype=first.dtype,
        shape=made[0],
        canonical=tuple(names),
        pieces=made[1],
        kind=match.rule.kind,
    )
