"""`flamingo-ckpt explain [CODE]`."""

from __future__ import annotations

import re
import time

import click

from flamingo_ckpt.cli.options import verb
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.codes import TABLE, THEMES, Code
from flamingo_ckpt.codes.page import row
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report
from flamingo_ckpt.tensors import escape

EPILOG = """\b
Examples:
  flamingo-ckpt explain
  flamingo-ckpt explain FC203
  flamingo-ckpt explain 203 --json
"""


@click.command(epilog=EPILOG, short_help="What a finding means, and what to do about it.")
@click.argument("code", required=False)
@verb
def explain(*, code: str | None, out: Output, argv: tuple[str, ...], started: float) -> Report:  # noqa: ARG001
    """Say what a code means, why it matters, what to do, and how a policy waives it.

    CODE is written FC203, fc203 or 203. Without it all codes are listed.
    """
    every = [one for theme in THEMES for one in theme.codes]
    chosen = every if code is None else [_named(code)]
    one = chosen[0]
    return Report(
        command="explain",
        argv=argv,
        verdict="pass",
        exit_code=0,
        summary={"num_codes": len(chosen)}
        if code is None
        else {"code": one.code, "severity": one.severity, "title": one.title},
        duration_seconds=time.monotonic() - started,
        extra={"codes": [row(code) for code in chosen]},
    )


def _named(name: str) -> Code:
    number = re.fullmatch(r"(?:FC)?(\d{1,3})", name.strip(), re.IGNORECASE | re.ASCII)
    code = f"FC{number[1]:0>3}" if number else name.strip().upper()
    if code in TABLE:
        return TABLE[code]
    near = [f"{one.code} ({one.title})" for one in _near(code)]
    raise CkptError(
        f"there is no code `{escape(name)[:60]}`",
        code="FC006",
        hint=f"did you mean {' or '.join(near)}?" if near else "`flamingo-ckpt explain` lists them",
    )


def _near(code: str) -> list[Code]:
    """Codes whose title has the words; else those of the same digits, or of all but one."""
    words = code.casefold()
    titled = [one for one in TABLE.values() if len(words) > 2 and words in one.title.casefold()]
    turned = [one for one in TABLE.values() if sorted(one.code) == sorted(code)]
    spelt = [one for one in TABLE.values() if _num_different(one.code, code) == 1]
    return (titled or [*turned, *spelt])[:3]


def _num_different(one: str, other: str) -> int:
    if len(one) != len(other):
        return max(len(one), len(other))
    return sum(ours != theirs for ours, theirs in zip(one, other, strict=True))
