"""Rows of the embedding and of the output embedding: whose they are, and how many.

The checkpoint's embedding keeps its rows. A head of its own that a base supplies follows it: rows
that no release has are zero and named, never random; rows beyond are cut. `--vocab-rows` sets both,
and what they were is written down for the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.axes import Strided
from flamingo_ckpt.layouts.mapping import Assembled, Piece
from flamingo_ckpt.tensors import TensorInfo, contiguous_strides, escape

EMBED = "lm.embed_tokens.weight"
HEAD = ("lm.head.weight", "lm.head.bias")
#: Metadata of a converted file: the rows that its source had.
ROWS_KEY = "flamingo_ckpt.vocab_rows"
#: Metadata: rows of the output embedding that no source had, and that are zero for that reason.
ZERO_ROWS_KEY = "flamingo_ckpt.zero_rows"


_PADDING = 64
# What metadata may add to a vocabulary: it is only a number in a file.
_MAX_NEW_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How many rows the vocabulary has in the destination.

    Attributes:
        wanted: rows; None keeps the embedding's.
        must_be_zero: whether rows that are cut have to be zero.
        is_remembered: whether the source's own metadata asks for them.
        pads: whether to pad as transformers does where `wanted` is None.
        why: who asked, for messages.
    """

    wanted: int | None = None
    must_be_zero: bool = False
    is_remembered: bool = False
    pads: bool = False
    why: str = "as the embedding has"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """What became of the vocabulary.

    Attributes:
        tensors: all tensors of the destination.
        zeros: rows of the source that were cut and must be zero.
        metadata: for the way back.
    """

    tensors: tuple[Assembled, ...]
    zeros: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    findings: tuple[Finding, ...]


def fit_rows(
    tensors: tuple[Assembled, ...], rows: Rows, supplied: frozenset[str], where: str
) -> Resized:
    """Give the embedding and the head the same, wanted number of rows.

    Args:
        tensors: of the destination.
        rows: what is wanted.
        supplied: canonical names that a base supplies.
        where: the source, for messages.

    Raises:
        CkptError: FC418 there is no vocabulary, or its two sides in one file disagree.
    """
    found = {one.canonical[0]: one for one in tensors if one.canonical[0] in (EMBED, *HEAD)}
    if not found:
        if rows.wanted is not None and not rows.is_remembered and not rows.must_be_zero:
            raise CkptError(
                "--vocab-rows: there is no embedding among the tensors", code="FC418", where=where
            )
        return Resized(tensors=tensors, zeros=(), metadata={}, findings=())
    own = [name for name in (EMBED, *HEAD) if name in found and name not in supplied]
    lead = found[own[0]] if own else next(iter(found.values()))
    wanted = lead.shape[0] if rows.wanted is None else rows.wanted
    if rows.wanted is None and rows.pads:
        wanted = padded_rows(lead.shape[0])
    if rows.is_remembered and not 0 < wanted <= 2 * lead.shape[0] + _MAX_NEW_ROWS:
        raise CkptError(
            f"the metadata says that the vocabulary had {wanted} rows, and it has {lead.shape[0]}",
            code="FC418",
            where=where,
            hint="say how many it should have: --vocab-rows N",
        )
    _check_agreement(found, supplied, where)
    zeros: list[TensorInfo] = []
    findings: list[Finding] = []
    metadata: dict[str, str] = {}
    zero_rows: list[str] = []
    if wanted != lead.shape[0]:
        metadata[ROWS_KEY] = str(lead.shape[0])
    changed: dict[str, Assembled] = {}
    for canonical, tensor in found.items():
        have = tensor.shape[0]
        if have == wanted:
            continue
        if wanted < have and rows.must_be_zero and canonical not in supplied:
            zeros.append(_rows(tensor, wanted, have - wanted))
        changed[tensor.name] = with_rows(tensor, wanted)
        findings.append(_finding(tensor, wanted, rows, canonical in supplied))
        if wanted > have and canonical in supplied:
            zero_rows.append(f"{tensor.name}:{have}-{wanted - 1}")
    if zero_rows:
        metadata[ZERO_ROWS_KEY] = ",".join(zero_rows)
    return Resized(
        tensors=tuple(changed.get(one.name, one) for one in tensors),
        zeros=tuple(zeros),
        metadata=metadata,
        findings=tuple(findings),
    )


def _check_agreement(found: Mapping[str, Assembled], supplied: frozenset[str], where: str) -> None:
    own = {name: one for name, one in found.items() if name not in supplied}
    sizes = {one.shape[0] for one in own.values()}
    if len(sizes) > 1:
        told = ", ".join(f"`{escape(one.name)}` has {one.shape[0]} rows" for one in own.values())
        raise CkptError(
            f"the vocabulary's two sides disagree: {told}",
            code="FC418",
            where=where,
            hint="a checkpoint whose embedding grew and whose head did not cannot be used as it is",
        )


def _rows(tensor: Assembled, start: int, length: int) -> TensorInfo:
    (piece,) = tensor.pieces
    return replace(piece, view=piece.view.narrow(start, length)).as_tensor(tensor.name)


def padded_rows(rows: int) -> int:
    """Rows of a vocabulary as transformers' conversion of PaliGemma pads it.

    It makes room for two tokens and fills up to a multiple.
    """
    return -(-(rows + 2) // _PADDING) * _PADDING


def with_rows(tensor: Assembled, rows: int) -> Assembled:
    """The first rows of a tensor, or all of them and then zeros."""
    (piece,) = tensor.pieces
    have, rest = tensor.shape[0], tensor.shape[1:]
    if rows <= have:
        pieces: tuple[Piece, ...] = (replace(piece, view=piece.view.narrow(0, rows)),)
    else:
        shape = (rows - have, *rest)
        pieces = (piece, Piece(None, piece.dtype, Strided.over(shape, contiguous_strides(shape))))
    kind = "cut" if rows < have else "pad"
    return replace(tensor, shape=(rows, *rest), pieces=pieces, kind=kind)


def _finding(tensor: Assembled, rows: int, why: Rows, is_supplied: bool) -> Finding:
    have, name = tensor.shape[0], escape(tensor.name)
    if rows < have:
        detail = f"`{name}`: the last {have - rows} of {have} rows are cut off"
        severity = "info" if why.must_be_zero or is_supplied else "warning"
    else:
        detail = f"`{name}`: {rows - have} rows of zeros follow its {have}"
        severity = "warning" if is_supplied or why.is_remembered else "info"
        if why.is_remembered and not is_supplied:
            detail += "; the values that were there are lost"
        if is_supplied:
            detail += "; no release holds them, so the logits of these tokens mean nothing"
    return Finding(
        code="FC418",
        severity=severity,
        key=tensor.name,
        detail=f"{detail} ({why.why})" if not is_supplied else detail,
        data={"rows": rows, "source_rows": have, "zero_rows": max(rows - have, 0)},
    )
