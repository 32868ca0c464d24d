"""The entry point: parse, run, and map every way of ending to its exit code."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from flamingo_ckpt import __version__
from flamingo_ckpt.cli.output import Output, error_report
from flamingo_ckpt.errors import CkptError

#: verb -> module under `flamingo_ckpt.cli`; imported only when it is asked for.
VERBS = (
    *("inspect", "convert", "verify", "diff", "parity", "check"),
    *("pull", "push"),
    *("layouts", "explain", "manifest", "sign", "verify-signature", "report"),
)
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143
#: The option whose value no report repeats.
_SIGN_IN = "--identity-token"


class _Terminated(BaseException):
    """SIGTERM arrived; raised so that staging is cleaned up on the way out."""


class _Verbs(click.Group):
    """Verbs, imported lazily: `--help` must not wait for what it does not need."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"flamingo_ckpt.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 good answer, 1 bad answer, 2 no answer, 3 incomplete, "
    "130/143 interrupted.",
)
@click.version_option(__version__, prog_name="flamingo-ckpt")
def cli() -> None:
    """Convert and verify checkpoints of Flamingo-family models.

    Every key accounted for, bits compared as bits, no pickle ever executed.
    """


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code. Prints, never raises."""
    arguments = tuple(argv)
    ended: dict[str, Any] = {}
    try:
        code = _invoke(arguments, ended)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away; nothing more can be said, but the answer is still the answer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ended.get("exit_code", 0))
    except click.exceptions.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _failed(arguments, _interrupted("interrupted"), EXIT_INTERRUPTED)
    except _Terminated:
        return _failed(arguments, _interrupted("terminated"), EXIT_TERMINATED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_ERROR
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _failed(arguments, _explain(error), EXIT_ERROR)


def _invoke(arguments: tuple[str, ...], ended: dict[str, Any]) -> int:
    with cli.make_context("flamingo-ckpt", list(arguments)) as context:
        context.meta["argv"] = _tellable(arguments)
        try:
            code = cli.invoke(context)
        finally:
            ended.update(context.meta)
    return code if isinstance(code, int) else 0


def _tellable(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The command line as reports have it: without what signs in its user."""
    told: list[str] = []
    for word in arguments:
        if told and told[-1] == _SIGN_IN:
            word = "***"
        elif word.startswith(f"{_SIGN_IN}="):
            word = f"{_SIGN_IN}=***"
        told.append(word)
    return tuple(told)


def _explain(error: Exception) -> CkptError:
    if isinstance(error, CkptError):
        return error
    if isinstance(error, click.UsageError):
        return _usage(error)
    if isinstance(error, click.ClickException):
        return CkptError(error.format_message(), code="FC006")
    if isinstance(error, MemoryError):
        return CkptError("out of memory", code="FC008")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return CkptError("cannot write the answer: the disk is full", code="FC004")
    return _internal(error)


def _usage(error: click.UsageError) -> CkptError:
    name = error.ctx.command_path if error.ctx else "flamingo-ckpt"
    return CkptError(
        error.format_message().rstrip("."), code="FC006", hint=f"`{name} --help` shows the usage"
    )


def _interrupted(word: str) -> CkptError:
    return CkptError(
        f"{word}; nothing was replaced",
        code="FC010",
        hint="run the same command again to start over",
    )


def _internal(error: Exception) -> CkptError:
    return CkptError(
        f"internal error: {type(error).__name__}: {error}",
        code="FC008",
        hint="run again with --debug and report the traceback",
    )


def _failed(arguments: tuple[str, ...], error: CkptError, exit_code: int) -> int:
    """Say it as the command line asked, as far as that can be told from it."""
    command = next((word for word in arguments if word in VERBS), "")
    out = Output(json="--json" in arguments)
    try:
        out.emit(error_report(error, command, _tellable(arguments), 0.0, exit_code))
    except OSError:
        pass  # there is nobody to tell
    return exit_code


def _terminate(_signal: int, _frame: FrameType | None) -> Any:
    raise _Terminated


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _terminate)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # the reader went away, or the disk is full; said above, where it can be
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
