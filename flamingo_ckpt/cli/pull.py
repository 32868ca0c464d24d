"""`flamingo-ckpt pull URI DST`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from flamingo_ckpt.cli.options import refuse_remote, verb
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.report.document import Report

if TYPE_CHECKING:
    from flamingo_ckpt.transfer.pull import Pulled, PullPlan

EPILOG = """\b
Examples:
  flamingo-ckpt pull hf://openflamingo/OpenFlamingo-3B-vitl-mpt1b of3b/
  flamingo-ckpt pull hf://someone/model@refs/pr/3 candidate/ --dry-run
  flamingo-ckpt pull hf://someone/model out/ --include '*.json' --include 'tokenizer*'
"""


@click.command(epilog=EPILOG, short_help="A release from the hub, pinned and checked.")
@click.argument("uri")
@click.argument("dst")
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Take only these files, whatever they are. Repeatable.",
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out. Repeatable.")
@click.option("--dry-run", is_flag=True, help="List what would be taken and what left.")
@click.option("--overwrite", is_flag=True, help="Replace an existing DST, atomically.")
@verb
def pull(*, out: Output, argv: tuple[str, ...], started: float, **chosen: Any) -> Report:
    """Download a release into the folder DST: at one commit, which is recorded in it.

    URI is hf://OWNER/NAME[@REVISION][/PATH]: a repository, a folder, an index or a file in it.
    Taken are weights, configs, tokenizers, processors and the card; no code, and no pickles where
    there are safetensors. Size and digest of every file are compared with what the hub lists, and
    nothing is put in place before all fit. A pull that breaks off goes on where it was.
    """
    from flamingo_ckpt.transfer.pull import check_dst, plan_pull, run_pull

    refuse_remote(chosen["dst"])
    if not chosen["dry_run"]:
        check_dst(chosen["dst"], overwrite=chosen["overwrite"])
    plan = plan_pull(chosen["uri"], chosen["include"], chosen["exclude"])
    done = None
    if not chosen["dry_run"]:
        with out.progress_bar([("downloading", plan.num_bytes)]) as progress:
            done = run_pull(
                plan,
                chosen["dst"],
                overwrite=chosen["overwrite"],
                on_bytes=progress.phase("downloading"),
            )
    return _report(plan, done, chosen["dst"], argv, started)


def _report(
    plan: PullPlan, done: Pulled | None, dst: str, argv: tuple[str, ...], started: float
) -> Report:
    moved = done.num_bytes_moved if done else 0
    listed = {
        "uri": plan.uri,
        "format": None,
        "layout": None,
        "prefix": None,
        "wrapper": None,
        "num_tensors": 0,
        "num_bytes": plan.num_bytes,
        "remote": {
            **plan.cost,
            "num_bytes_read": plan.cost["num_bytes_read"] + moved,
            "num_bytes_total": plan.num_bytes,
            "downloaded": done is not None,
        },
    }
    files = [
        {
            "path": one.path,
            "num_bytes": one.source.num_bytes,
            "sha256": done.digests[one.path] if done else one.source.sha256,
        }
        for one in plan.files
    ]
    return Report(
        command="pull",
        argv=argv,
        verdict="pass",
        exit_code=0,
        inputs=(listed,),
        summary={
            "num_files": len(files),
            "num_bytes": plan.num_bytes,
            "num_bytes_moved": moved,
            "num_left": len(plan.left),
        },
        duration_seconds=time.monotonic() - started,
        extra={
            "dst": dst,
            "commit": plan.place.revision,
            "dry_run": done is None,
            "files": files,
            "left": [
                {"path": path, "num_bytes": size, "reason": why} for path, size, why in plan.left
            ],
        },
    )
