"""Pair keys that only one side has: a misspelling, or the same content under another name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from flamingo_ckpt.formats.checksum import new_digest
from flamingo_ckpt.formats.extract import BLOCK_BYTES, read_blocks
from flamingo_ckpt.sides import Entry
from flamingo_ckpt.tensors import TensorInfo, contiguous_strides

#: How alike two names must be, from 0 to 1.
_MIN_RATIO = 0.6
# Pairs whose names are compared: more means that the sides have nothing to do with each other.
_MAX_PAIRS = 4000
# Content of keys that only one side has, read at most. The rest is paired by name.
_MAX_READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two names that are probably one tensor.

    Attributes:
        ours, theirs: names by which the sides are compared.
        our_key, their_key: as stored.
        why: the evidence.
    """

    ours: str
    theirs: str
    our_key: str
    their_key: str
    why: str


def find_renamed(
    ours: Mapping[str, Entry], theirs: Mapping[str, Entry], *, reads: bool
) -> list[Pair]:
    """Pair what only A has with what only B has; every name is in one pair at most.

    Args:
        ours: only A has them.
        theirs: only B has them.
        reads: whether both sides have bytes; equal content is better evidence than a name.
    """
    left, right = dict(ours), dict(theirs)
    pairs: list[Pair] = []
    if reads:
        for mine, other, why in _by_content(left, right):
            pairs.append(_pair(mine, other, left, right, why))
    for mine, other in _by_name(left, right):
        pairs.append(_pair(mine, other, left, right, "same shape, nearest name"))
    return pairs


def _pair(mine: str, other: str, left: dict[str, Entry], right: dict[str, Entry], why: str) -> Pair:
    ours, theirs = left.pop(mine), right.pop(other)
    return Pair(ours=mine, theirs=other, our_key=ours.key, their_key=theirs.key, why=why)


def _by_content(
    left: Mapping[str, Entry], right: Mapping[str, Entry]
) -> list[tuple[str, str, str]]:
    total = sum(entry.step.num_bytes for side in (left, right) for entry in side.values())
    if not left or not right or total > _MAX_READ_BYTES:
        return []
    known: dict[str, list[str]] = {}
    for name, entry in right.items():
        known.setdefault(digest_of_step(entry), []).append(name)
    found: list[tuple[str, str, str]] = []
    taken: set[str] = set()
    for name, entry in left.items():
        for digest, why in _digests(entry):
            fitting = [one for one in known.get(digest, ()) if one not in taken]
            if len(fitting) == 1:
                taken.add(fitting[0])
                found.append((name, fitting[0], why))
                break
    return found


def _digests(entry: Entry) -> Iterator[tuple[str, str]]:
    yield digest_of_step(entry), "same content"
    if len(entry.shape) == 2 and len(entry.step.runs) == 1:
        run = entry.step.runs[0]
        rows, columns = entry.shape
        if run.strides is None and run.storage is not None:
            strides = contiguous_strides(entry.shape)
            turned = replace(run, shape=(columns, rows), strides=strides[::-1])
            yield _digest([turned]), "equal after transpose"


def digest_of_step(entry: Entry) -> str:
    """XXH3-128 of an entry's bytes."""
    return _digest(entry.step.runs)


def _digest(runs: tuple[TensorInfo, ...] | list[TensorInfo]) -> str:
    digest, buffer = new_digest(), bytearray(BLOCK_BYTES)
    for run in runs:
        for block in read_blocks(run, buffer):
            digest.update(block)
    return digest.hexdigest()


def _by_name(left: Mapping[str, Entry], right: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """The nearest names of equal shape and dtype, best first; a tie decides nothing."""
    buckets: dict[object, tuple[list[str], list[str]]] = {}
    for side, entries in enumerate((left, right)):
        for name, entry in entries.items():
            key = (entry.shape, entry.dtype.name)
            buckets.setdefault(key, ([], []))[side].append(name)
    scored: list[tuple[float, str, str]] = []
    for ours, theirs in buckets.values():
        if len(ours) * len(theirs) <= _MAX_PAIRS:
            scored += [
                (ratio, mine, other)
                for mine in ours
                for other in theirs
                if (ratio := _ratio(mine, other)) >= _MIN_RATIO
            ]
    found: list[tuple[str, str]] = []
    taken: set[tuple[int, str]] = set()
    for _, mine, other in sorted(scored, key=lambda one: (-one[0], one[1], one[2])):
        if (0, mine) not in taken and (1, other) not in taken:
            taken |= {(0, mine), (1, other)}
            found.append((mine, other))
    return found


def _ratio(mine: str, other: str) -> float:
    """How alike two names are. Other numbers are other tensors, not misspellings."""
    ours, theirs = mine.split("."), other.split(".")
    if [one for one in ours if one.isdigit()] != [one for one in theirs if one.isdigit()]:
        return 0.0
    return difflib.SequenceMatcher(None, mine, other, autojunk=False).ratio()
