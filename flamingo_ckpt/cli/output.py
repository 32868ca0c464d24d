"""The only place that prints: answers to stdout, talk and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import click

from flamingo_ckpt.errors import CkptError, NotFaithfulError
from flamingo_ckpt.report.document import Report, to_document
from flamingo_ckpt.report.renderings import SUFFIXES, format_of, render_as
from flamingo_ckpt.tensors import escape

_COLORS = {"error": "red", "warning": "yellow", "hint": "cyan", "note": "blue"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How this run wants to be talked to; the options that every verb shares."""

    json: bool = False
    output: str | None = None
    quiet: bool = False
    verbose: bool = False
    color: str = "auto"
    progress: bool = True
    debug: bool = False

    def check(self) -> None:
        """Raise FC006 for an `--output` that no rendering is written to, FC003 and FC004 too."""
        if not self.output:
            return
        if format_of(self.output) is None:
            raise CkptError(
                f"`{self.output}` has a suffix that no report format has",
                code="FC006",
                hint="reports are written to " + " or ".join(SUFFIXES),
            )
        from flamingo_ckpt.formats.staging import check_replaceable

        check_replaceable(self.output, overwrite=True, folder=False)

    def emit(self, report: Report) -> None:
        """Print the report, and write it to `--output`."""
        format = format_of(self.output) if self.output else None
        if self.output and format is not None:
            self.write(self.output, render_as(report, format))
        if self.json:
            click.echo(json.dumps(to_document(report), indent=2))
            return
        if report.summary:
            self.print_text(report)
            return
        from flamingo_ckpt.report.text import render

        self._talk(render(report))

    def print_text(self, report: Report) -> None:
        """Print a report for people, unless they asked for silence."""
        from flamingo_ckpt.report.text import render

        if not self.quiet:
            for line in render(report, verbose=self.verbose):
                click.echo(_paint(line), color=self._wants_color(True))

    def without_file(self) -> Output:
        """The same, for a report that `--output` is not about."""
        return replace(self, output=None)

    def write(self, path: str, content: str) -> None:
        """Put a file in place, at once or not at all."""
        # Here, because --help and a failed parse need none of it.
        from flamingo_ckpt.formats.staging import staged_file, write_at_path

        with staged_file(path, overwrite=True) as staging:
            write_at_path(staging, content.encode("utf-8"))

    def _talk(self, lines: Sequence[str]) -> None:
        for line in lines:
            click.echo(_paint(line), err=True, color=self._wants_color(False))

    def _wants_color(self, stdout: bool) -> bool:
        if self.color != "auto":
            return self.color == "always"
        stream = sys.stdout if stdout else sys.stderr
        return stream.isatty() and not os.environ.get("NO_COLOR")

    @property
    def draws(self) -> bool:
        """Whether progress is drawn on stderr."""
        return not self.json and not self.quiet and self.progress and sys.stderr.isatty()

    @contextmanager
    def status(self) -> Iterator[Callable[[str], None]]:
        """A line on stderr that tells what is done, only on a terminal."""
        if not self.draws:
            yield lambda _: None
            return
        from rich.console import Console

        console = Console(stderr=True, no_color=not self._wants_color(False))
        with console.status("opening") as line:
            yield lambda what: line.update(escape(what))

    @contextmanager
    def progress_bar(self, phases: Sequence[tuple[str, int]]) -> Iterator[Progress]:
        """A bar per phase on stderr, only on a terminal."""
        if not self.draws:
            yield Progress(None)
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bars

        console = Console(stderr=True, no_color=not self._wants_color(False))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=console, refresh_per_second=5) as bars:
            tasks = {
                name: bars.add_task(f"{name:<10}", total=total, start=False)
                for name, total in phases
            }

            def advance(name: str, num_bytes: int) -> None:
                bars.start_task(tasks[name])
                bars.advance(tasks[name], num_bytes)

            yield Progress(advance)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where progress is told to; silent without a terminal."""

    advance: Callable[[str, int], None] | None

    def phase(self, name: str) -> Callable[[int], None]:
        """A callback for one phase."""
        advance = self.advance
        if advance is None:
            return lambda _: None
        return lambda num_bytes: advance(name, num_bytes)


def error_report(
    error: CkptError, command: str, argv: tuple[str, ...], seconds: float, exit_code: int = 2
) -> Report:
    """The report of a verb that could not answer, or that wrote something unfaithful."""
    is_answer = isinstance(error, NotFaithfulError)
    finding = error.as_finding()
    extra = {"where": error.where} if error.where else {}
    return Report(
        command=command,
        argv=argv,
        verdict="fail" if is_answer else "error",
        exit_code=1 if is_answer else exit_code,
        findings=(finding,),
        duration_seconds=seconds,
        extra=extra,
    )


def _paint(line: str) -> str:
    """Colour the word a line begins with; click takes it out again where none is wanted."""
    # A hostile path must not repaint the screen, or keep its own error from being printed.
    line = escape(line)
    word = line.lstrip().split(" ", 1)[0].rstrip(":")
    color = _COLORS.get(word)
    if color is None:
        return line
    at = line.index(word)
    return line[:at] + click.style(word, fg=color, bold=True) + line[at + len(word) :]
