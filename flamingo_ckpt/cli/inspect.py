"""`flamingo-ckpt inspect SRC`."""

from __future__ import annotations

import time

import click

from flamingo_ckpt.cli.options import npy_bfloat16, verb, wrapper_key
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.report.document import Report, describe_input

EPILOG = """\b
Examples:
  flamingo-ckpt inspect checkpoint.pt
  flamingo-ckpt inspect release/ --json --tensors
  flamingo-ckpt inspect checkpoint.pt --wrapper-key model_ema
"""


@click.command(epilog=EPILOG, short_help="What is in a checkpoint.")
@click.argument("src")
@click.option("--tensors", is_flag=True, help="List every tensor in the JSON report.")
@wrapper_key
@npy_bfloat16
@verb
def inspect(
    *,
    src: str,
    tensors: bool,
    wrapper_key: str | None,
    npy_bfloat16: bool,
    out: Output,
    argv: tuple[str, ...],
    started: float,
) -> Report:
    """Say what SRC holds, from its headers alone; nothing is executed.

    That is: format, wrapper, prefix, tensors, dtypes, sizes, tied names, and what lies beside the
    weights.

    SRC is a file, a folder, or an index (*.index.json).
    """
    from flamingo_ckpt import inspection
    from flamingo_ckpt.formats import open_checkpoint

    manifest = open_checkpoint(src, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    found = inspection.inspect(manifest)
    rows = inspection.tensor_rows(manifest)
    extra = {
        "tied": manifest.tied_groups(),
        "files": [{"path": name, "num_bytes": size} for name, size in manifest.files],
        "beside": [
            {"path": item.path, "kind": item.kind, "num_tensors": item.num_tensors}
            for item in manifest.beside
        ],
        "metadata": dict(manifest.metadata),
        "pickle_globals": dict(manifest.pickle_globals),
        "details": dict(manifest.details),
    }
    if tensors or not out.json:
        extra["tensors"] = rows
    return Report(
        command="inspect",
        argv=argv,
        verdict="pass",
        exit_code=0,
        inputs=(describe_input(manifest, found.prefix),),
        summary=found.summary,
        findings=found.findings,
        duration_seconds=time.monotonic() - started,
        extra=extra,
    )
