"""`flamingo-ckpt convert SRC DST`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from flamingo_ckpt.cli.options import (
    ByteSize,
    describe_inputs,
    local_sources,
    mapping_options,
    open_source,
    plan_source,
    refuse_remote,
    verb,
)
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report

if TYPE_CHECKING:
    from flamingo_ckpt.convert import ConvertOptions, WritePlan
    from flamingo_ckpt.plan import Plan

EPILOG = """\b
Examples:
  flamingo-ckpt convert checkpoint.pt out/
  flamingo-ckpt convert checkpoint.pt model.safetensors --exclude 'perceiver.*'
  flamingo-ckpt convert bin-release/ st-release/ --max-shard-size 2GB
  flamingo-ckpt convert model.safetensors back.pt
  flamingo-ckpt convert checkpoint.pt half/ --dtype bfloat16 --dry-run
  flamingo-ckpt convert checkpoint.pt hf/ --to hf-flamingo
  flamingo-ckpt convert ck.pt hf/ --to hf-flamingo --config model.json --base-vision clip.pt
  flamingo-ckpt convert hf://openflamingo/OpenFlamingo-3B-vitl-mpt1b/checkpoint.pt out/
"""


@click.command(epilog=EPILOG, short_help="Write a checkpoint in another format.")
@click.argument("src")
@click.argument("dst")
@click.option(
    "--format",
    type=click.Choice(["safetensors", "torch", "npz"]),
    help="Of the destination. Default: by the suffix of DST, safetensors for a folder.",
)
@mapping_options
@click.option(
    "--max-shard-size",
    type=ByteSize(),
    metavar="SIZE",
    help="Split a folder's weights into files of at most SIZE. Default: 5GB.",
)
@click.option(
    "--untie", is_flag=True, help="Write a copy for every tied name instead of storing it once."
)
@click.option("--copy-code", is_flag=True, help="Take .py files and pickles of a folder along.")
@click.option(
    "--record-source",
    is_flag=True,
    help="Write a digest of the content and the tool's version into the metadata.",
)
@click.option(
    "--record",
    is_flag=True,
    help="Write source, map and verdict into the conversion record of DST's card.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an existing DST, atomically.")
@click.option(
    "--verify/--no-verify",
    "wants_verify",
    default=True,
    help="Read the result back and compare it with SRC before it is put in place. Default: on.",
)
@verb
def convert(*, out: Output, argv: tuple[str, ...], started: float, **chosen: Any) -> Report:
    """Write SRC to DST in another format, streaming, with every key accounted for.

    DST ending in .safetensors, .pt, .pth, .bin or .npz is one file; anything else is a folder.
    Wrapper prefixes (`module.` and its like) are removed. Nothing is put in place before it has
    been read back and compared with SRC bit for bit.
    """
    from flamingo_ckpt.convert import ConvertOptions, plan_write, summary_of
    from flamingo_ckpt.write_plan import choose_format, omissions, planned_files

    refuse_remote(chosen["dst"])
    chosen = local_sources(chosen, out, "src", "base_vision", "base_language")
    _, is_folder = choose_format(chosen["dst"], chosen["format"])
    prepared = plan_source(open_source(chosen), chosen, is_folder=is_folder)
    plan = prepared.plan
    manifest = plan.source
    options = ConvertOptions(
        format=chosen["format"],
        max_shard_bytes=chosen["max_shard_size"],
        overwrite=chosen["overwrite"],
        copy_code=chosen["copy_code"],
        npy_bfloat16=chosen["npy_bfloat16"],
        record_source=chosen["record_source"],
    )
    write = plan_write(plan, chosen["dst"], options, prepared.generated)
    if chosen["record"]:
        _check_record(write, chosen)
    extra: dict[str, Any] = {
        "dst": chosen["dst"],
        "format": write.format,
        "is_folder": write.is_folder,
        "prefix": plan.prefix if plan.renamed else None,
        "layout": _layouts(plan),
        "partial": plan.partial,
        "dtype": chosen["dtype"],
        "dry_run": chosen["dry_run"],
        "verified": chosen["wants_verify"] and not chosen["dry_run"],
        "record": None,
    }
    findings = [*manifest.findings, *plan.findings]
    if chosen["dry_run"]:
        findings += omissions(plan, write, options)
        extra["plan"] = _plan_rows(plan)
        summary = summary_of(plan, planned_files(plan, write), 0)
    else:
        summary = _run(plan, write, options, chosen["wants_verify"], out, findings, extra)
        if chosen["record"]:
            extra["record"] = _write_record(plan, write, extra, summary)
    lossy = any(finding.severity == "error" for finding in findings)
    return Report(
        command="convert",
        argv=argv,
        verdict="fail" if lossy else "pass",
        exit_code=1 if lossy else 0,
        inputs=describe_inputs(plan),
        summary=summary,
        findings=tuple(findings),
        duration_seconds=time.monotonic() - started,
        extra=extra,
    )


def _check_record(write: WritePlan, chosen: Mapping[str, Any]) -> None:
    if not write.is_folder:
        raise CkptError(
            "--record: a single file has no card", code="FC006", hint="name a folder as DST"
        )
    if not chosen["wants_verify"]:
        raise CkptError(
            "--record with --no-verify: there is nothing proven to write",
            code="FC006",
            hint="leave one out",
        )


def _write_record(
    plan: Plan, write: WritePlan, extra: Mapping[str, Any], summary: Mapping[str, Any]
) -> str:
    """What was just proven, into the card that came along, or into a new one; its path."""
    from flamingo_ckpt.release.record import make_record, source_of, write_record

    layout = extra["layout"]
    verified, cast = summary["verified"], summary["cast"]
    record = make_record(
        source=source_of(plan.source),
        content=extra["source_digest"],
        layouts=(layout["from"], layout["to"]) if layout else None,
        verify={"verdict": "pass", "bit_exact": verified - cast, "cast": cast},
        parity={"verdict": "not run"},
    )
    path = os.path.join(write.dst, "README.md")
    write_record(path, record)
    return path


def _run(
    plan: Plan,
    write: WritePlan,
    options: ConvertOptions,
    wants_verify: bool,
    out: Output,
    findings: list[Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Write, read back, put in place; fills `findings` and returns the summary."""
    from flamingo_ckpt.convert import run_convert, source_digest, summary_of
    from flamingo_ckpt.errors import NotFaithfulError, name_some
    from flamingo_ckpt.formats import open_checkpoint
    from flamingo_ckpt.verify import verify

    verified = 0
    phases = [("writing", plan.num_bytes)]
    if wants_verify:
        phases.append(("verifying", plan.num_bytes))
    with out.progress_bar(phases) as progress:

        def read_back(staging: str) -> None:
            nonlocal verified
            written = open_checkpoint(staging, npy_bfloat16=True)
            result = verify(plan, written, progress.phase("verifying"))
            if not result.is_faithful:
                wrong = [*result.different, *result.missing, *result.unexpected]
                raise NotFaithfulError(
                    f"{len(wrong)} tensors read back differ from the source: {name_some(wrong)}",
                    code="FC301",
                    where=write.dst,
                    key=wrong[0],
                    hint="nothing was put in place; run it again, and if it stays so, report it",
                )
            verified = len(result.bit_exact) + len(result.cast)

        result = run_convert(
            plan,
            write,
            options,
            on_bytes=progress.phase("writing"),
            read_back=read_back if wants_verify else None,
        )
    findings += result.findings
    extra["source_digest"] = source_digest(plan, result.derived)
    return summary_of(plan, result.files, verified)


def _layouts(plan: Plan) -> dict[str, Any] | None:
    if plan.layout is None or plan.target is None:
        return None
    return {
        "from": plan.layout.layout.name,
        "to": plan.target.name,
        "language_model": list(plan.layout.families),
        "evidence": plan.layout.evidence,
    }


def _plan_rows(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "source": step.source.name,
            "transformed": bool(step.parts),
            "dtype": step.dtype.name,
            "shape": list(step.shape),
            "num_bytes": step.num_bytes,
            "cast": step.is_cast,
        }
        for step in plan.steps
        for name in (step.name, *step.aliases)
    ]
