"""`flamingo-ckpt manifest SRC`."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from flamingo_ckpt.cli.options import describe_release, npy_bfloat16, verb, wrapper_key
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report

EPILOG = """\b
Examples:
  flamingo-ckpt manifest release/
  flamingo-ckpt manifest release/ --check
  (cd release && sha256sum -c SHA256SUMS)
"""


@click.command(epilog=EPILOG, short_help="SHA-256 of every file and tensor.")
@click.argument("src")
@click.option("--check", "only_check", is_flag=True, help="Compare SRC with the manifest it has.")
@click.option("--dry-run", is_flag=True, help="Compute, and write nothing.")
@wrapper_key
@npy_bfloat16
@verb
def manifest(
    *,
    src: str,
    only_check: bool,
    dry_run: bool,
    wrapper_key: str | None,
    npy_bfloat16: bool,
    out: Output,
    argv: tuple[str, ...],
    started: float,
) -> Report:
    """Write SHA256SUMS (which `sha256sum -c` reads) and manifest.json (every tensor) into SRC.

    For a single file they are FILE.sha256 and FILE.manifest.json beside it. With --check nothing is
    written: exit 0 when every file is as the manifest says, 1 when one is not, 2 when there is no
    manifest.
    """
    from flamingo_ckpt.formats import open_checkpoint
    from flamingo_ckpt.release import manifest as made
    from flamingo_ckpt.release.folder import digests, list_files

    if only_check and dry_run:
        raise CkptError("--dry-run with --check: it writes nothing anyway", code="FC006")
    if not os.path.exists(src):
        raise CkptError(f"there is no `{src}`", code="FC002", where=src)
    sums_path, tensors_path = made.paths_for(src)
    skip = (out.output,) if out.output else ()
    files = [one for one in list_files(src, skip) if made.is_covered(one.path)]
    if only_check:
        with out.progress_bar([("hashing", sum(one.num_bytes for one in files))]) as progress:
            facts = digests(files, progress.phase("hashing"))
        findings = tuple(made.compare(made.read_sums(sums_path), facts))
        return Report(
            command="manifest",
            argv=argv,
            verdict="fail" if findings else "pass",
            exit_code=1 if findings else 0,
            summary={**made.summary_of(facts, ()), "stale": len(findings)},
            findings=findings,
            duration_seconds=time.monotonic() - started,
            extra=_extra(facts, (), []),
        )
    checkpoint = open_checkpoint(src, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    num_bytes = sum(tensor.num_bytes for tensor in checkpoint.tensors)
    hashed = sum(one.num_bytes for one in files)
    with out.progress_bar([("tensors", num_bytes), ("files", hashed)]) as progress:
        tensors = made.tensor_digests(checkpoint, progress.phase("tensors"))
        others = [one for one in files if one.full != tensors_path]
        facts = digests(others, progress.phase("files"))
    written: list[str] = []
    if not dry_run:
        facts = made.write(sums_path, tensors_path, facts, tensors, is_folder=os.path.isdir(src))
        written = [sums_path, tensors_path]
    return Report(
        command="manifest",
        argv=argv,
        verdict="pass",
        exit_code=0,
        inputs=(describe_release(checkpoint),),
        summary={**made.summary_of(facts, tensors), "stale": 0},
        findings=checkpoint.findings,
        duration_seconds=time.monotonic() - started,
        extra=_extra(facts, tensors, written),
    )


def _extra(files: Any, tensors: Any, written: list[str]) -> dict[str, Any]:
    return {
        "files": [
            {"path": one.path, "num_bytes": one.num_bytes, "sha256": one.sha256} for one in files
        ],
        "tensor_digests": [
            {
                "name": one.name,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "sha256": one.sha256,
            }
            for one in tensors
        ],
        "written": written,
    }
