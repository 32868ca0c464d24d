"""Compare the content of what both sides have, and say where a differing tensor's content went."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from flamingo_ckpt.diff.likeness import digest_of_runs, digest_of_step
from flamingo_ckpt.diff.sides import Side
from flamingo_ckpt.diff.views import Entry
from flamingo_ckpt.difference import Difference, describe, facts_of
from flamingo_ckpt.errors import Finding
from flamingo_ckpt.formats.cast import CastCounts, cast_block
from flamingo_ckpt.layouts.mapping import Piece
from flamingo_ckpt.stream import (
    Derived,
    check_storages,
    check_unchanged,
    run_tasks,
    unchecked_storages,
)
from flamingo_ckpt.tensors import DTYPES, DType, TensorInfo, contiguous_strides, escape
from flamingo_ckpt.verify import first_difference

_Both = tuple[str, Entry, Entry]
# Where more than this differs the two are of different trainings, and nothing was merely moved.
_MAX_MOVED_BYTES = 2 << 30
# A transpose is gathered element by element.
_MAX_TURNED_BYTES = 256 << 20

__all__ = ["compare_bits", "digest_of", "digest_of_step"]


def compare_bits(a: Side, b: Side, both: Sequence[_Both]) -> dict[str, list[Finding]]:
    """Name -> findings of everything whose bits differ.

    Raises:
        CkptError: where a side cannot be read, or fails its checksum.
    """
    # the same elements of the same bytes need no reading
    both = [pair for pair in both if pair[1].identity != pair[2].identity]
    for steps in ([mine.step for _, mine, _ in both], [other.step for _, _, other in both]):
        check_storages(unchecked_storages(steps), lambda _: None)

    def work(pair: _Both, buffer: bytearray, stop: threading.Event) -> tuple[_Both, Finding | None]:
        _, mine, other = pair
        found = first_difference(mine.step, other.step, buffer, Derived(), lambda _: None, stop)
        return pair, _bits_differ(mine, other, found) if found is not None else None

    ordered = sorted(both, key=lambda pair: -pair[1].step.num_bytes)
    found = {pair[0]: finding for pair, finding in run_tasks(ordered, work) if finding}
    for side in (a, b):
        check_unchanged(side.manifest)
    different = [pair for pair in both if pair[0] in found]
    moved = _moved(different)
    return {pair[0]: [*moved.get(pair[0], []), found[pair[0]]] for pair in different}


def _bits_differ(mine: Entry, other: Entry, found: Difference) -> Finding:
    place = ", ".join(map(str, found.index))
    here, there = (_readable(bits, mine.dtype) for bits in (found.expected, found.found))
    of = "" if other.key == mine.key else f" of `{escape(other.key)}`"
    return Finding(
        code="FC301",
        severity="error",
        key=mine.key,
        detail=f"`{escape(mine.key)}`: {found.num_different} of {mine.step.num_elements} elements "
        f"differ, first at [{place}]{of}: {here} in A, {there} in B" + describe(found, "A", "B"),
        data={
            "other_key": other.key,
            "first_index": list(found.index),
            "bits": [found.expected, found.found],
            **facts_of(found, "A", "B"),
        },
    )


def _readable(bits: str, dtype: DType) -> str:
    """`0.5 (0x3f000000)` where the dtype widens to a float, else the bits."""
    if not dtype.is_real_float:
        return f"0x{bits}"
    raw = memoryview(bytes.fromhex(bits)[::-1])
    wide = cast_block(raw, dtype, DTYPES["F64"], CastCounts())
    return f"{wide.cast('d')[0]!r} (0x{bits})"


def _moved(pairs: Sequence[_Both]) -> dict[str, list[Finding]]:
    """What of A's content stands elsewhere in B, part by part: a swap, or a transpose."""
    if sum(pair[1].step.num_bytes for pair in pairs) > _MAX_MOVED_BYTES:
        return {}
    theirs: dict[str, list[str]] = {}
    parts = {pair[0]: (list(_parts(pair[1])), list(_parts(pair[2]))) for pair in pairs}
    digests = {
        name: tuple([digest_of(tensor) for _, tensor, _ in side] for side in both)
        for name, both in parts.items()
    }
    for name, (_, others) in parts.items():
        for (_, _, label), digest in zip(others, digests[name][1], strict=True):
            theirs.setdefault(digest, []).append(label)
    found: dict[str, list[Finding]] = {}
    budget = _MAX_TURNED_BYTES
    for name, mine, _ in pairs:
        own = {
            canonical: digest
            for (canonical, _, _), digest in zip(parts[name][1], digests[name][1], strict=True)
        }
        for (canonical, tensor, label), digest in zip(
            parts[name][0], digests[name][0], strict=True
        ):
            if own.get(canonical) == digest:
                continue
            told = [f"your {label} is their {one}" for one in theirs.get(digest, ())]
            turned = _turned(tensor)
            if not told and turned is not None and canonical in own:
                budget -= tensor.num_bytes
                if budget >= 0 and digest_of(turned) == own[canonical]:
                    told = [f"your {label} is theirs: equal after transpose"]
            if len(told) == 1:  # several are of one content, and which is which nobody can tell
                found.setdefault(name, []).append(
                    Finding(
                        code="FC218",
                        severity="error",
                        key=mine.key,
                        detail=f"`{escape(mine.key)}`: {told[0]}",
                    )
                )
    return found


def _parts(entry: Entry) -> Iterator[tuple[str, TensorInfo, str]]:
    """(canonical name, elements, what to call it) of each tensor that is in an entry."""
    if not entry.canonical:
        yield entry.step.name, entry.step.source, f"`{escape(entry.key)}`"
        return
    for at, (name, piece) in enumerate(zip(entry.canonical, entry.pieces, strict=True)):
        key = entry.keys[at] if len(entry.keys) == len(entry.pieces) else entry.key
        whole = piece.source is not None and piece.source.num_elements == _size(piece)
        part = "" if whole else f" ({name.removesuffix('.weight').rpartition('.')[2]})"
        yield name, _as_read(piece), f"`{escape(key)}`{part}"


def _size(piece: Piece) -> int:
    size = 1
    for length in piece.shape:
        size *= length
    return size


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
    return digest_of_runs([tensor])
