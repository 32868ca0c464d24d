"""Run the steps of a plan over bytes: a few threads, bounded blocks, checks on the way.

The same derivation of a tensor's bytes serves `convert` (which writes them) and `verify` (which
compares them). Source checksums are checked in the same pass where a tensor is its whole storage.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.formats.cast import CastCounts, cast_block
from flamingo_ckpt.formats.checksum import crc32, new_digest
from flamingo_ckpt.formats.extract import BLOCK_BYTES, check_crc, read_blocks, read_whole_crc
from flamingo_ckpt.plan import Plan, Step
from flamingo_ckpt.tensors import Manifest, Storage, TensorInfo, escape

#: Called with the number of bytes just done; from several threads.
OnBytes = Callable[[int], None]
# A tensor that begins this far into its storage still covers it, but for a header (npz).
_MAX_STORAGE_HEAD = 16 << 10
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(slots=True)
class Derived:
    """What was learned while a step's bytes went by.

    Attributes:
        crc32: of the destination bytes; None when nobody asked.
        xxh3_128: of the destination bytes, hexadecimal.
        counts: of the cast, if there was one.
        noncanonical_bools: BOOL bytes that are neither 0 nor 1; kept as they are.
    """

    crc32: int | None = None
    xxh3_128: str = ""
    counts: CastCounts = field(default_factory=CastCounts)
    noncanonical_bools: int = 0


def default_threads() -> int:
    """One for each processor, four at most: more only make the disk seek."""
    return max(1, min(4, len(os.sched_getaffinity(0))))


class _StoppedError(Exception):
    """Another task of the same run failed; this one gave up. Never leaves this module."""


def run_tasks(
    tasks: Iterable[_Task],
    work: Callable[[_Task, bytearray, threading.Event], _Result],
    num_threads: int | None = None,
) -> list[_Result]:
    """Run `work` over every task; the first error stops the rest and is raised.

    Each thread has one buffer of `BLOCK_BYTES`, so memory does not grow with the tasks.
    """
    ordered = list(tasks)
    stop = threading.Event()
    local = threading.local()

    def call(task: _Task) -> _Result:
        if stop.is_set():
            raise _StoppedError
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(BLOCK_BYTES)
        try:
            return work(task, local.buffer, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(num_threads or default_threads()) as pool:
        futures = [pool.submit(call, task) for task in ordered]
        try:
            for future in futures:
                error = future.exception()
                if error is not None and not isinstance(error, _StoppedError):
                    raise error
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def derive(
    step: Step,
    buffer: bytearray,
    derived: Derived,
    *,
    want_crc: bool = False,
    want_digest: bool = False,
    into: memoryview | None = None,
) -> Iterator[memoryview]:
    """Yield the destination bytes of a step in order, and fill in `derived` at the end.

    Args:
        step: what is derived.
        buffer: at least `BLOCK_BYTES` long.
        derived: gets what was learned.
        want_crc: whether it gets the CRC-32 of the destination bytes.
        want_digest: whether it gets their digest.
        into: for a step that `is_copy`: where its bytes are read to; blocks are parts of it.

    Raises:
        FormatError: FC105 where the source's checksum does not fit, FC102 where it is short.
    """
    whole = step.runs[0] if len(step.runs) == 1 and covers(step.runs[0]) else None
    storage = whole.storage if whole is not None else None
    stored_crc = storage.crc32 if storage is not None else None
    on_the_way = whole is not None and stored_crc is not None
    source_crc = _head_crc(whole) if whole is not None and on_the_way else 0
    # For a plain copy of a whole storage one checksum serves both sides.
    shared = step.is_copy and whole is not None and on_the_way and whole.offset_bytes == 0
    crc, digest = 0, new_digest()
    for block in _blocks(step, buffer, into):
        if on_the_way:
            source_crc = crc32(block, source_crc)
        if step.dtype.name == "BOOL":
            derived.noncanonical_bools += len(block) - block.tobytes().translate(
                _ONE_TO_ZERO
            ).count(0)
        out = (
            cast_block(block, step.source.dtype, step.dtype, derived.counts)
            if step.is_cast
            else block
        )
        if want_crc and not shared:
            crc = crc32(out, crc)
        if want_digest:
            digest.update(out)
        yield out
    if storage is not None and stored_crc is not None:
        check_crc(stored_crc, source_crc, storage.where)
    derived.crc32 = source_crc if shared else crc
    derived.xxh3_128 = digest.hexdigest()


def _blocks(step: Step, buffer: bytearray, into: memoryview | None = None) -> Iterator[memoryview]:
    """The elements of a step before any cast, run after run."""
    for run in step.runs:
        if run.storage is not None:
            yield from read_blocks(run, buffer, into)
            continue
        left = run.num_bytes
        zeros = memoryview(bytes(min(left, BLOCK_BYTES)))
        while left:
            yield zeros[: min(left, BLOCK_BYTES)]
            left -= min(left, BLOCK_BYTES)


_ONE_TO_ZERO = bytes([0, 0, *range(2, 256)])


def covers(tensor: TensorInfo) -> bool:
    """Whether reading the tensor reads its whole storage in order, but for a small head."""
    if tensor.storage is None or tensor.num_bytes == 0:
        return False
    plain = tensor.is_plain
    end = tensor.offset_bytes + tensor.num_bytes
    return plain and end == tensor.storage.num_bytes and tensor.offset_bytes <= _MAX_STORAGE_HEAD


def _head_crc(tensor: TensorInfo) -> int:
    if tensor.storage is None or tensor.offset_bytes == 0:
        return 0
    source, base = tensor.storage.locate()
    return crc32(source.read(base, tensor.offset_bytes))


def unchecked_storages(steps: Iterable[Step]) -> list[Storage]:
    """Storages with a checksum that no step covers whole: they need a pass of their own."""
    wanted: dict[int, Storage] = {}
    covered: set[int] = set()
    for step in steps:
        for run in step.runs:
            storage = run.storage
            if storage is None or storage.crc32 is None:
                continue
            wanted[id(storage)] = storage
            if len(step.runs) == 1 and covers(run):
                covered.add(id(storage))
    return [storage for key, storage in wanted.items() if key not in covered]


def check_storages(storages: Sequence[Storage], on_bytes: OnBytes) -> None:
    """Check the CRC-32 of whole storages. Raises FC105 naming the first that is damaged."""

    def work(storage: Storage, buffer: bytearray, _stop: threading.Event) -> None:
        if storage.crc32 is not None:
            check_crc(storage.crc32, read_whole_crc(storage, buffer), storage.where)
        on_bytes(storage.num_bytes)

    run_tasks(storages, work)


def check_premises(plan: Plan) -> None:
    """Check what a plan took for granted about bytes: equal twins, and padding that is zero.

    Raises:
        CkptError: FC202 two names of one tensor hold different bits, FC419 padding is not zero.
    """

    def compare(
        pair: tuple[TensorInfo, TensorInfo], buffer: bytearray, _stop: threading.Event
    ) -> None:
        first, second = pair
        if first.dtype is not second.dtype or first.shape != second.shape:
            raise _twins_differ(plan, first, second)
        if _digest_of(first, buffer) != _digest_of(second, buffer):
            raise _twins_differ(plan, first, second)

    def expect_zeros(run: TensorInfo, buffer: bytearray, _stop: threading.Event) -> None:
        if any(block.tobytes().strip(b"\0") for block in read_blocks(run, buffer)):
            raise CkptError(
                f"`{escape(run.name)}`: what would be left out is not zero, so it is no padding",
                code="FC419",
                where=plan.source.uri,
                key=run.name,
                hint="rows of a vocabulary are cut all the same with --vocab-rows N",
            )

    run_tasks(plan.equal, compare)
    run_tasks(plan.zeros, expect_zeros)


def _digest_of(tensor: TensorInfo, buffer: bytearray) -> str:
    digest = new_digest()
    for block in read_blocks(tensor, buffer):
        digest.update(block)
    return digest.hexdigest()


def _twins_differ(plan: Plan, first: TensorInfo, second: TensorInfo) -> CkptError:
    return CkptError(
        f"`{escape(first.name)}` ({first.describe()}) and `{escape(second.name)}` "
        f"({second.describe()}) are two names of one tensor, and differ",
        code="FC202",
        where=plan.source.uri,
        key=second.name,
        hint=f"choose one with --exclude '{escape(second.name)}'",
    )


def check_unchanged(manifest: Manifest) -> None:
    """Raise FC007 where a file is no longer the one that was opened."""
    for source in manifest.sources:
        check: Callable[[], None] | None = getattr(source, "check_unchanged", None)
        if check is not None:
            check()


def largest_first(steps: Iterable[Step]) -> list[Step]:
    """So that no thread is left with the largest tensor at the end."""
    return sorted(steps, key=lambda step: -step.num_bytes)


def cast_findings(step: Step, derived: Derived) -> list[Finding]:
    """What a cast or a copy of one tensor has to say."""
    counts, name = derived.counts, escape(step.name)
    found: list[Finding] = []

    def add(code: str, severity: str, detail: str, hint: str | None = None) -> None:
        found.append(Finding(code=code, severity=severity, key=step.name, detail=detail, hint=hint))

    if counts.overflowed:
        add(
            "FC303",
            "error",
            f"`{name}`: {counts.overflowed} of {counts.elements} values became infinite "
            f"as {step.dtype}",
            "bfloat16 has the range of float32; or keep the dtype: `--dtype keep`",
        )
    if counts.nan_lost:
        add("FC304", "error", f"`{name}`: {counts.nan_lost} NaN values became numbers")
    if counts.inexact:
        add(
            "FC302",
            "info",
            f"`{name}`: {counts.inexact} of {counts.elements} values were rounded from "
            f"{step.source.dtype} to {step.dtype}, {counts.underflowed} of them to zero",
        )
    if derived.noncanonical_bools:
        add(
            "FC308",
            "warning",
            f"`{name}`: {derived.noncanonical_bools} BOOL bytes are neither 0 nor 1; they are kept",
        )
    return found
