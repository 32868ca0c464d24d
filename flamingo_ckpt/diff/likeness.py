"""Pair keys that only one side has: a misspelling, or the same content under another name."""

from __future__ import annotations

import difflib
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flamingo_ckpt.diff.views import Entry
from flamingo_ckpt.formats.checksum import new_digest
from flamingo_ckpt.formats.extract import BLOCK_BYTES, read_blocks
from flamingo_ckpt.tensors import TensorInfo, contiguous_strides

#: How alike two names must be, from 0 to 1.
MIN_RATIO = 0.6
# Pairs of names that are compared, by the product of their lengths, in all: a second's worth. More
# means that the sides have nothing to do with each other.
_MAX_WORK = 20_000_000
# Content of keys that only one side has, read at most. The rest is paired by name.
_MAX_READ_BYTES = 64 << 20
# Names that are longer are hostile; comparing two takes the product of their lengths.
_MAX_NAME = 300
_NUMBER = re.compile(r"\d+")
_LOCAL = threading.local()


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
    """(A's name, B's name, evidence) where one tensor of each side has the content, and no more."""
    sizes = {_size(entry) for entry in left.values()} & {_size(one) for one in right.values()}
    mine, others = (
        {name: entry for name, entry in side.items() if _size(entry) in sizes}
        for side in (left, right)
    )
    total = sum(entry.step.num_bytes for side in (mine, others) for entry in side.values())
    if not sizes or total > _MAX_READ_BYTES:
        return []
    known: dict[tuple[str, object], list[str]] = {}
    for name, entry in others.items():
        known.setdefault((digest_of_step(entry), entry.shape), []).append(name)
    # tensors of one content, such as zeros, say nothing about which is which
    fitting = [
        (name, known[key][0], why)
        for name, entry in mine.items()
        for key, why in _contents(entry)
        if len(known.get(key, ())) == 1
    ]
    ours = Counter(name for name, _, _ in fitting)
    theirs = Counter(name for _, name, _ in fitting)
    return [one for one in fitting if ours[one[0]] == theirs[one[1]] == 1]


def _size(entry: Entry) -> tuple[str, int]:
    return entry.dtype.name, entry.step.num_bytes


def _contents(entry: Entry) -> Iterator[tuple[tuple[str, object], str]]:
    """((digest, shape), evidence) that a tensor of the same content would have."""
    yield (digest_of_step(entry), entry.shape), "same content"
    turned = turned_run(entry)
    if turned is not None:
        yield (digest_of_runs([turned]), turned.shape), "equal after transpose"


def turned_run(entry: Entry) -> TensorInfo | None:
    """The transpose of a matrix that lies in one contiguous run; None for anything else."""
    runs = entry.step.runs
    if len(entry.shape) != 2 or len(runs) != 1:
        return None
    if runs[0].strides is not None or runs[0].storage is None:
        return None
    strides = contiguous_strides(entry.shape)
    return replace(runs[0], shape=entry.shape[::-1], strides=strides[::-1])


def digest_of_step(entry: Entry) -> str:
    """XXH3-128 of an entry's bytes."""
    return digest_of_runs(entry.step.runs)


def digest_of_runs(runs: Iterable[TensorInfo]) -> str:
    """XXH3-128 of the logical bytes of tensors, one after the other."""
    digest, buffer = new_digest(), _buffer()
    for run in runs:
        for block in read_blocks(run, buffer):
            digest.update(block)
    return digest.hexdigest()


def _buffer() -> bytearray:
    """A thread's own: clearing a new one takes longer than reading a small tensor."""
    found = getattr(_LOCAL, "buffer", None)
    if found is None:
        found = _LOCAL.buffer = bytearray(BLOCK_BYTES)
    return found


def _by_name(left: Mapping[str, Entry], right: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """The nearest names of equal shape and dtype, best first; where two are as near, none."""
    found: list[tuple[str, str]] = []
    taken: set[tuple[int, str]] = set()
    by_ratio: dict[float, list[tuple[str, str]]] = {}
    for ratio, mine, other in _scored(left, right):
        by_ratio.setdefault(ratio, []).append((mine, other))
    for ratio in sorted(by_ratio, reverse=True):
        free = [
            (mine, other)
            for mine, other in by_ratio[ratio]
            if (0, mine) not in taken and (1, other) not in taken
        ]
        counts = Counter(name for mine, other in free for name in ((0, mine), (1, other)))
        found += [(a, b) for a, b in free if counts[0, a] == counts[1, b] == 1]
        taken |= counts.keys()
    return found


def _scored(
    left: Mapping[str, Entry], right: Mapping[str, Entry]
) -> Iterator[tuple[float, str, str]]:
    """(ratio, A's name, B's name) of names with the same numbers: others are other tensors."""
    buckets: dict[object, tuple[list[str], list[str]]] = {}
    for side, entries in enumerate((left, right)):
        for name, entry in entries.items():
            if len(name) <= _MAX_NAME:
                key = (entry.shape, entry.dtype.name, _numbers(name))
                buckets.setdefault(key, ([], []))[side].append(name)
    budget = _MAX_WORK
    for ours, theirs in sorted(buckets.values(), key=lambda pair: len(pair[0]) * len(pair[1])):
        budget -= sum(map(len, ours)) * sum(map(len, theirs))
        if budget < 0:
            return
        for other in theirs:
            # it keeps what it finds out about its second sequence
            matcher = difflib.SequenceMatcher(None, b=other, autojunk=False)
            for mine in ours:
                matcher.set_seq1(mine)
                if matcher.real_quick_ratio() >= MIN_RATIO and matcher.quick_ratio() >= MIN_RATIO:
                    ratio = matcher.ratio()
                    if ratio >= MIN_RATIO:
                        yield ratio, mine, other


def _numbers(name: str) -> tuple[str, ...]:
    """The numbered components of a name, in order."""
    return tuple(part for part in name.split(".") if _NUMBER.fullmatch(part))
