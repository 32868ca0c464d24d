"""Compare the content of what both sides have, and say where a differing tensor's content went."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from flamingo_ckpt.errors import Finding
from flamingo_ckpt.formats.checksum import new_digest
from flamingo_ckpt.formats.extract import BLOCK_BYTES, read_blocks
from flamingo_ckpt.layouts.mapping import Piece
from flamingo_ckpt.sides import Entry, Side
from flamingo_ckpt.stream import (
    Derived,
    check_storages,
    check_unchanged,
    run_tasks,
    unchecked_storages,
)
from flamingo_ckpt.tensors import TensorInfo, contiguous_strides, escape
from flamingo_ckpt.verify import bits_differ, first_difference

_Both = tuple[str, Entry, Entry]


def compare_bits(a: Side, b: Side, both: Sequence[_Both]) -> dict[str, list[Finding]]:
    """Name -> findings of everything whose bits differ.

    Raises:
        CkptError: where a side cannot be read, or fails its checksum.
    """
    check_storages(unchecked_storages([mine.step for _, mine, _ in both]), lambda _: None)
    check_storages(unchecked_storages([other.step for _, _, other in both]), lambda _: None)

    def work(pair: _Both, buffer: bytearray, stop: threading.Event) -> tuple[_Both, Finding | None]:
        name, mine, other = pair
        found = first_difference(mine.step, other.step, buffer, Derived(), lambda _: None, stop)
        if found is None:
            return pair, None
        stored = TensorInfo(name=mine.key, dtype=mine.dtype, shape=mine.shape)
        del name
        return pair, bits_differ(other.step, stored, found)

    ordered = sorted(both, key=lambda pair: -pair[1].step.num_bytes)
    different = [(pair, finding) for pair, finding in run_tasks(ordered, work) if finding]
    for side in (a, b):
        check_unchanged(side.manifest)
    moved = _moved([pair for pair, _ in different])
    return {pair[0]: [finding, *moved.get(pair[0], [])] for pair, finding in different}


def _moved(pairs: Sequence[_Both]) -> dict[str, list[Finding]]:
    """What of A's content stands elsewhere in B, part by part: a swap, or a transpose."""
    theirs: dict[str, list[str]] = {}
    for _, _, other in pairs:
        for label, piece in _parts(other):
            theirs.setdefault(_digest(piece), []).append(label)
    found: dict[str, list[Finding]] = {}
    for name, mine, other in pairs:
        own = dict(_parts(other))
        for label, piece in _parts(mine):
            there = own.get(label)
            if there is not None and _digest(there) == _digest(piece):
                continue
            told = [f"your {label} is their {one}" for one in theirs.get(_digest(piece), ())]
            turned = _turned(piece)
            if not told and turned is not None and there is not None:
                told = [f"{label}: equal after transpose"] * (_digest(turned) == _digest(there))
            found.setdefault(name, []).extend(
                Finding(
                    code="FC218",
                    severity="error",
                    key=mine.key,
                    detail=f"`{escape(mine.key)}`: {escape(one)}",
                )
                for one in told
            )
    return found


def _parts(entry: Entry) -> list[tuple[str, TensorInfo]]:
    """(name, elements) of each canonical tensor in an entry; of the entry where it has no layout."""
    if not entry.canonical:
        return [(entry.key, entry.step.source)]
    return [
        (name, _as_read(piece)) for name, piece in zip(entry.canonical, entry.pieces, strict=True)
    ]


def _as_read(piece: Piece) -> TensorInfo:
    tensor = piece.as_tensor("")
    if tensor.strides is None and len(piece.shape) > 1:
        return replace(tensor, shape=piece.shape)
    return tensor


def _turned(tensor: TensorInfo) -> TensorInfo | None:
    """The transpose of a contiguous matrix; None for anything else."""
    if len(tensor.shape) != 2 or tensor.strides is not None or tensor.storage is None:
        return None
    strides = contiguous_strides(tensor.shape)
    return replace(tensor, shape=tensor.shape[::-1], strides=strides[::-1])


def digest_of(tensor: TensorInfo) -> str:
    """XXH3-128 of a tensor's logical bytes."""
    return _digest(tensor)


def _digest(tensor: TensorInfo) -> str:
    digest = new_digest()
    for block in read_blocks(tensor, bytearray(BLOCK_BYTES)):
        digest.update(block)
    return digest.hexdigest()
