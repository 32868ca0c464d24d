"""Carry a checkpoint into another format: plan, stream, sync, read back, put in place."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.formats.checksum import new_digest
from flamingo_ckpt.formats.layout import FileLayout
from flamingo_ckpt.formats.linux import allocate, early_writeback
from flamingo_ckpt.formats.staging import (
    check_replaceable,
    check_space,
    recover,
    staged_file,
    staged_folder,
    sync_folder,
    write_all,
    write_synced,
)
from flamingo_ckpt.plan import Plan, Step
from flamingo_ckpt.stream import (
    Derived,
    OnBytes,
    cast_findings,
    check_premises,
    check_storages,
    check_unchanged,
    derive,
    largest_first,
    run_tasks,
    unchecked_storages,
)
from flamingo_ckpt.tensors import escape
from flamingo_ckpt.write_plan import (
    DIGEST_KEY,
    DIGEST_PLACEHOLDER,
    ConvertOptions,
    WritePlan,
    is_kept,
    omissions,
    plan_write,
    planned_files,
)

__all__ = [
    "ConvertOptions",
    "ConvertResult",
    "ReadBack",
    "WritePlan",
    "plan_write",
    "run_convert",
    "source_digest",
    "summary_of",
]

#: Called with the path of the staged file or folder; raises where it is not what it should be.
ReadBack = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What was written.

    Attributes:
        files: paths relative to the destination folder, or the one file, with sizes.
        derived: what was learned of each tensor, by name.
        findings: losses and omissions.
    """

    plan: Plan
    write: WritePlan
    files: tuple[tuple[str, int], ...]
    derived: Mapping[str, Derived]
    findings: tuple[Finding, ...]


def run_convert(
    plan: Plan,
    write: WritePlan,
    options: ConvertOptions,
    *,
    on_bytes: OnBytes = lambda _: None,
    read_back: ReadBack | None = None,
) -> ConvertResult:
    """Write the destination beside its place, read it back, and move it there.

    Args:
        plan: what becomes of every tensor.
        write: from `plan_write`.
        options: the same as for `plan_write`.
        on_bytes: told of progress, from several threads.
        read_back: compares the staged result with the source and raises where they differ; then
            nothing is put in place. It runs while the system writes the files to disk.

    Raises:
        CkptError: a damaged, short or changing source.
        WriteError: FC003, FC004.
    """
    parent = os.path.dirname(os.path.abspath(write.dst))
    check_replaceable(write.dst, overwrite=options.overwrite, folder=write.is_folder)
    recover(write.dst)  # what a killed run left may be the room that this one needs
    check_space(parent, sum(size for _, size in planned_files(plan, write)), write.dst)
    check_storages(unchecked_storages(plan.steps), lambda _: None)
    check_premises(plan)
    run = _run_folder if write.is_folder else _run_file
    derived = run(plan, write, options, on_bytes, read_back)
    files = planned_files(plan, write)
    findings = [*_losses(plan, derived), *omissions(plan, write, options)]
    return ConvertResult(
        plan=plan, write=write, files=tuple(files), derived=derived, findings=tuple(findings)
    )


def _run_file(
    plan: Plan,
    write: WritePlan,
    options: ConvertOptions,
    on_bytes: OnBytes,
    read_back: ReadBack | None,
) -> dict[str, Derived]:
    steps = {step.name: step for step in plan.steps}
    with staged_file(write.dst, overwrite=options.overwrite) as staging:
        derived = _write_file(staging, write.layouts[0], steps, on_bytes)
        if options.record_source and write.format == "safetensors":
            _record_digest(staging, write.layouts[0], source_digest(plan, derived))
        with _syncing([staging]):
            if read_back is not None:
                read_back(staging)
        for manifest in plan.manifests:
            check_unchanged(manifest)
    return derived


def _run_folder(
    plan: Plan,
    write: WritePlan,
    options: ConvertOptions,
    on_bytes: OnBytes,
    read_back: ReadBack | None,
) -> dict[str, Derived]:
    steps = {step.name: step for step in plan.steps}
    derived: dict[str, Derived] = {}
    with staged_folder(write.dst, overwrite=options.overwrite, keep=is_kept) as staging:
        paths = [os.path.join(staging, layout.file) for layout in write.layouts]
        for path, layout in zip(paths, write.layouts, strict=True):
            derived |= _write_file(path, layout, steps, on_bytes)
        if options.record_source and write.format == "safetensors":
            for path, layout in zip(paths, write.layouts, strict=True):
                _record_digest(path, layout, source_digest(plan, derived))
        with _syncing(paths):
            if read_back is not None:
                read_back(staging)
        _copy_files(plan.source.folder or "", staging, write.copied)
        for name, content in write.generated.items():
            write_synced(os.path.join(staging, name), content)
        if write.index is not None:
            write_synced(os.path.join(staging, write.index[0]), write.index[1])
            # Headers only: the index must fit the shards that were just written.
            open_checkpoint(staging, npy_bfloat16=True)
        for manifest in plan.manifests:
            check_unchanged(manifest)
    return derived


@contextmanager
def _syncing(paths: list[str]) -> Iterator[None]:
    """Let the system write the files to disk while the body runs; leave when it has."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(_sync_file, path) for path in paths]
        yield
        for done in pending:
            done.result()


def _write_file(
    path: str, layout: FileLayout, steps: Mapping[str, Step], on_bytes: OnBytes
) -> dict[str, Derived]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        allocate(fd, layout.num_bytes)
        with early_writeback(fd):
            return _fill_file(fd, layout, steps, on_bytes)
    finally:
        os.close(fd)


def _fill_file(
    fd: int, layout: FileLayout, steps: Mapping[str, Step], on_bytes: OnBytes
) -> dict[str, Derived]:
    def work(step: Step, buffer: bytearray, stop: threading.Event) -> tuple[str, Derived]:
        derived = Derived()
        places = (layout.offsets[step.name], *layout.copies.get(step.name, ()))
        at = 0
        for block in derive(step, buffer, derived, want_crc=layout.needs_crc, want_digest=True):
            for place in places:
                write_all(fd, block, place + at)
            at += len(block)
            on_bytes(len(block))
            if stop.is_set():
                break
        return step.name, derived

    mine = largest_first(steps[name] for name in layout.offsets)
    derived = dict(run_tasks(mine, work))
    checksums = {name: one.crc32 or 0 for name, one in derived.items()}
    for offset, data in layout.finish(checksums):
        write_all(fd, memoryview(data), offset)
    return derived


def source_digest(plan: Plan, derived: Mapping[str, Derived]) -> str:
    """XXH3-128 over name, dtype, shape and content digest of every destination tensor, by name."""
    digest = new_digest()
    for step in sorted(plan.steps, key=lambda step: step.name):
        line = [step.name, step.dtype.name, list(step.shape), derived[step.name].xxh3_128]
        digest.update(json.dumps(line).encode("ascii"))
    return f"xxh3-128:{digest.hexdigest()}"


def _record_digest(path: str, layout: FileLayout, digest: str) -> None:
    """Put the digest where its placeholder stands: it is as long, so nothing moves."""
    ((_, header),) = layout.finish({})
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # Quotes inside JSON strings are escaped, so this occurs once.
        marker = f'"{DIGEST_KEY}":"'.encode("ascii")
        at = header.index(marker + DIGEST_PLACEHOLDER.encode("ascii")) + len(marker)
        write_all(fd, memoryview(digest.encode("ascii")), at)
    finally:
        os.close(fd)


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_files(src: str, dst: str, names: tuple[str, ...]) -> None:
    for name in names:
        target = os.path.join(dst, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            shutil.copyfile(os.path.join(src, name), target)
        except PermissionError as error:
            raise CkptError(
                f"cannot read `{escape(name)}`: {error.strerror}", code="FC002", where=src
            ) from error
        _sync_file(target)
        sync_folder(os.path.dirname(target))


def _losses(plan: Plan, derived: Mapping[str, Derived]) -> list[Finding]:
    return [finding for step in plan.steps for finding in cast_findings(step, derived[step.name])]


def summary_of(plan: Plan, files: Sequence[tuple[str, int]], verified: int) -> dict[str, Any]:
    """The counts of the JSON report; the same for a dry run."""
    return {
        "num_tensors": plan.num_names,
        "num_bytes": plan.num_bytes,
        "renamed": plan.renamed,
        "transformed": plan.transformed,
        "cast": sum(step.is_cast for step in plan.steps),
        "dropped": len(plan.dropped),
        "expected_absent": len(plan.expected_absent),
        "verified": verified,
        "files": [{"path": name, "num_bytes": size} for name, size in files],
    }
