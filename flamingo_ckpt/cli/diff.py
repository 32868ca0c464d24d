"""`flamingo-ckpt diff A B`."""

from __future__ import annotations

import time
from typing import Any

import click

from flamingo_ckpt.cli.options import (
    local_sources,
    npy_bfloat16,
    source_layout,
    verb,
    wrapper_key,
)
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.report.document import Report, describe_input

EPILOG = """\b
Examples:
  flamingo-ckpt diff checkpoint.pt model:openflamingo-3b-vitl-mpt1b
  flamingo-ckpt diff release/ model:release/config.json
  flamingo-ckpt diff before.pt after/ --level bits
  flamingo-ckpt diff out/ hf://openflamingo/OpenFlamingo-3B-vitl-mpt1b/checkpoint.pt
"""


@click.command(epilog=EPILOG, short_help="What differs, key by key.")
@click.argument("a")
@click.argument("b")
@click.option(
    "--level",
    type=click.Choice(["keys", "headers", "bits"]),
    default="headers",
    show_default=True,
    help="Compare names; also dtypes and shapes; also every bit.",
)
@source_layout
@click.option(
    "--config", metavar="FILE", help="The model's config, for sizes that no shape tells (heads)."
)
@wrapper_key
@npy_bfloat16
@verb
def diff(*, out: Output, argv: tuple[str, ...], started: float, **chosen: Any) -> Report:
    """Compare A with what B expects of it: missing, unexpected, changed, renamed, absent by design.

    Either side is a checkpoint (file, folder, index) or a model (model:CONFIG or model:PRESET).
    Where their layouts differ they are compared through the map. Exit 0 when nothing differs but
    what is absent by design, 1 when something does, 2 when there is no answer.

    Of a checkpoint on the hub (hf://...) only headers are read, unless --level bits asks for all.
    """
    from flamingo_ckpt.diff.compare import diff as compare
    from flamingo_ckpt.diff.compare import summary_of
    from flamingo_ckpt.prepare import open_sides

    if chosen["level"] == "bits":
        chosen = local_sources(chosen, out, "a", "b")
    a, b, dims = open_sides(
        chosen["a"],
        chosen["b"],
        source_layout=chosen["source_layout"],
        config=chosen["config"],
        wrapper_key=chosen["wrapper_key"],
        npy_bfloat16=chosen["npy_bfloat16"],
    )
    result = compare(a, b, level=chosen["level"], dims=dims)
    return Report(
        command="diff",
        argv=argv,
        verdict="pass" if result.is_same else "fail",
        exit_code=0 if result.is_same else 1,
        inputs=tuple(
            describe_input(
                side.manifest, side.prefix, side.detection.layout.name if side.detection else None
            )
            for side in (a, b)
        ),
        summary=summary_of(result),
        findings=_findings(a, b, result),
        duration_seconds=time.monotonic() - started,
        extra={
            "level": result.level,
            "evidence": [side.detection.evidence if side.detection else None for side in (a, b)],
            "missing": list(result.missing),
            "unexpected": list(result.unexpected),
            "changed": list(result.changed),
            "renamed": [list(pair) for pair in result.renamed],
            "expected_absent": dict(result.expected_absent),
        },
    )


def _findings(a: Any, b: Any, result: Any) -> tuple[Any, ...]:
    """Of the files themselves, each once, then of the comparison."""
    files = [finding for side in (a, b) for finding in (*side.manifest.findings, *side.findings)]
    seen = list(dict.fromkeys((one.code, one.severity, one.detail) for one in files))
    first = {(one.code, one.severity, one.detail): one for one in reversed(files)}
    return (*(first[key] for key in seen), *result.findings)
