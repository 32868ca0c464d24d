"""`flamingo-ckpt verify SRC DST`."""

from __future__ import annotations

import time
from typing import Any

import click

from flamingo_ckpt.cli.options import (
    describe_inputs,
    local_sources,
    mapping_options,
    open_source,
    plan_source,
    verb,
)
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.report.document import Report, describe_input

EPILOG = """\b
Examples:
  flamingo-ckpt verify checkpoint.pt out/
  flamingo-ckpt verify checkpoint.pt half/ --dtype bfloat16
  flamingo-ckpt verify checkpoint.pt out/ --json --output verify.md
"""


@click.command(epilog=EPILOG, short_help="Is DST the faithful image of SRC.")
@click.argument("src")
@click.argument("dst")
@mapping_options
@verb
def verify(*, out: Output, argv: tuple[str, ...], started: float, **chosen: Any) -> Report:
    """Derive every tensor again from SRC and compare it with DST: dtype, shape and bits.

    Give the options that the conversion had; without --to, DST's own layout is taken. Exit 0 when
    DST is faithful, 1 when it is not, 2 when either side cannot be read, 3 when DST holds tensors
    that only a base can prove and none is given.
    """
    from flamingo_ckpt.formats import open_checkpoint
    from flamingo_ckpt.inspection import find_layout, other_layout
    from flamingo_ckpt.layouts.prefixes import describe_prefixes, strip_wrappers
    from flamingo_ckpt.verify import judge, summary_of
    from flamingo_ckpt.verify import verify as compare

    chosen = local_sources(chosen, out, "src", "dst", "base_vision", "base_language")
    source = open_source(chosen)
    written = open_checkpoint(chosen["dst"], npy_bfloat16=chosen["npy_bfloat16"])
    found = find_layout(written)
    plan = plan_source(source, chosen, writes=False, to=other_layout(source, found)).plan
    with out.progress_bar([("verifying", plan.num_bytes)]) as progress:
        result = compare(plan, written, progress.phase("verifying"))
    prefix = describe_prefixes({strip_wrappers(t.name)[1] for t in written.tensors})
    verdict, exit_code = judge(result)
    return Report(
        command="verify",
        argv=argv,
        verdict=verdict,
        exit_code=exit_code,
        inputs=(
            *describe_inputs(plan),
            describe_input(written, prefix, found.layout.name if found else None),
        ),
        summary=summary_of(result),
        findings=(*plan.source.findings, *result.findings),
        duration_seconds=time.monotonic() - started,
        extra={"unverified": list(result.unverified)},
    )
