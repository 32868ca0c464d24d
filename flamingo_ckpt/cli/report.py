"""`flamingo-ckpt report render FILE` and `flamingo-ckpt report schema`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from flamingo_ckpt.cli.options import with_output
from flamingo_ckpt.cli.output import Output, error_report
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.renderings import FORMATS, format_of, render_as

EPILOG = """\b
Examples:
  flamingo-ckpt report render report.json
  flamingo-ckpt report render report.json --format github
  flamingo-ckpt report render report.json --output report.html
  flamingo-ckpt report render report.json --format step-summary >> "$GITHUB_STEP_SUMMARY"
"""
SCHEMA_EPILOG = """\b
Examples:
  flamingo-ckpt report schema
  flamingo-ckpt report schema > report-v1.json
  flamingo-ckpt report schema --output report-v1.json
"""


@click.group(short_help="Stored reports: render one again, or print their schema.")
def report() -> None:
    """Stored JSON reports: render one in another form, or print the schema of them all."""


@report.command(epilog=EPILOG, short_help="A stored JSON report in another form.")
@click.argument("file")
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="Of what is printed; what --output writes goes by its suffix.",
)
@with_output
def render(*, file: str, format: str, out: Output) -> int:
    """Print a report that --json or --output wrote before, in another form.

    FILE may be of any verb, and of another 1.x version of the tool. Exit 0 when it was rendered,
    whatever the report says, and 2 when it could not be.
    """

    def body() -> None:
        from flamingo_ckpt.report.stored import read_report

        stored = read_report(file)
        suffix = format_of(out.output or "")
        if out.output and suffix is not None:
            out.write(out.output, render_as(stored, suffix))
        if format == "text" and not out.json:
            out.print_text(stored)
        elif not out.quiet:
            click.echo(render_as(stored, "json" if out.json else format), nl=False)

    return _run(body, out)


@report.command(epilog=SCHEMA_EPILOG, short_help="The JSON Schema of every report.")
@with_output
def schema(*, out: Output) -> int:
    """Print the JSON Schema (draft 2020-12) that every JSON report of this version fits.

    With --output it is written to a .json file as well.
    """

    def body() -> None:
        from flamingo_ckpt.report.schema import schema_text

        if out.output and format_of(out.output) != "json":
            raise CkptError(
                f"`{out.output}`: the schema is JSON", code="FC006", hint="name a .json file"
            )
        if out.output:
            out.write(out.output, schema_text())
        if not out.quiet:
            click.echo(schema_text(), nl=False)

    return _run(body, out)


def _run(body: Callable[[], Any], out: Output) -> int:
    """Run a body that prints by itself; a refusal is reported as every verb's is."""
    try:
        out.check()
        body()
    except CkptError as error:
        if out.debug:
            raise
        argv = click.get_current_context().find_root().meta.get("argv", ())
        refused = error_report(error, "report", argv, 0.0)
        out.without_file().emit(refused)
        return refused.exit_code
    return 0
