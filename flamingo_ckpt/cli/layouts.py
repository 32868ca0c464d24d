"""`flamingo-ckpt layouts [NAME]`."""

from __future__ import annotations

import time

import click

from flamingo_ckpt.cli.options import verb
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.report.document import Report

EPILOG = """\b
Examples:
  flamingo-ckpt layouts
  flamingo-ckpt layouts openflamingo
  flamingo-ckpt layouts hf-flamingo --json
"""


@click.command(epilog=EPILOG, short_help="The layouts, and the rules between them.")
@click.argument("name", required=False)
@verb
def layouts(*, name: str | None, out: Output, argv: tuple[str, ...], started: float) -> Report:  # noqa: ARG001
    """List the layouts that --to and --from name, or print the rules of one.

    Every rule ties a layout's own key to canonical names, and any layout is converted to any other
    of its kind through them.
    """
    from flamingo_ckpt.layouts.describe import layout_row, rule_rows
    from flamingo_ckpt.layouts.registry import LAYOUTS, layout_named

    chosen = [layout_named(name)] if name else list(LAYOUTS.values())
    rows = rule_rows(chosen[0]) if name else []
    return Report(
        command="layouts",
        argv=argv,
        verdict="pass",
        exit_code=0,
        summary={"num_layouts": len(chosen), "num_rules": len(rows)},
        duration_seconds=time.monotonic() - started,
        extra={"layouts": [layout_row(one) for one in chosen], "rules": rows},
    )
