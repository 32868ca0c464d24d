"""The only place that prints: answers to stdout, talk and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click

from flamingo_ckpt.errors import CkptError, NotFaithfulError
from flamingo_ckpt.report.document import Report, to_document
from flamingo_ckpt.tensors import escape

#: `--output` suffixes that can be written.
OUTPUT_SUFFIXES = (".json", ".md")
#: Those of one verb's reports besides.
_OWN_SUFFIXES = {"parity": (".html",)}
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

    def check(self, command: str) -> None:
        """Raise FC006 for an `--output` that a verb's report has no rendering for."""
        suffixes = _suffixes(command)
        if self.output and os.path.splitext(self.output)[1].lower() not in suffixes:
            raise CkptError(
                f"`{self.output}` has a suffix that no report format of `{command}` has",
                code="FC006",
                hint="reports are written to " + " or ".join(suffixes),
            )
        if self.output:
            from flamingo_ckpt.formats.staging import check_replaceable

            check_replaceable(self.output, overwrite=True, folder=False)

    def emit(self, report: Report, where: str | None = None) -> None:
        """Print the report, and write it to `--output`."""
        if self.output and os.path.splitext(self.output)[1].lower() in _suffixes(report.command):
            self._write(report)
        if self.json:
            click.echo(json.dumps(to_document(report), indent=2))
            return
        from flamingo_ckpt.report import text

        if not report.summary:
            finding = report.findings[0]
            self._talk(text.render_error(finding, where))
        elif not self.quiet:
            for line in text.render(report, verbose=self.verbose):
                click.echo(_paint(line), color=self._wants_color(True))

    def _write(self, report: Report) -> None:
        path = self.output or ""
        if path.lower().endswith(".md"):
            from flamingo_ckpt.report.markdown import to_markdown

            content = to_markdown(report) + "\n"
        elif path.lower().endswith(".html"):
            from flamingo_ckpt.report.parity_html import to_html

            content = to_html(report)
        else:
            content = json.dumps(to_document(report), indent=2) + "\n"
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

    @contextmanager
    def status(self) -> Iterator[Callable[[str], None]]:
        """A line on stderr that tells what is done, only on a terminal."""
        if self.json or self.quiet or not self.progress or not sys.stderr.isatty():
            yield lambda _: None
            return
        from rich.console import Console

        console = Console(stderr=True, no_color=not self._wants_color(False))
        with console.status("opening") as line:
            yield lambda what: line.update(escape(what))

    @contextmanager
    def progress_bar(self, phases: Sequence[tuple[str, int]]) -> Iterator[Progress]:
        """A bar per phase on stderr, only on a terminal."""
        if self.json or self.quiet or not self.progress or not sys.stderr.isatty():
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


def _suffixes(command: str) -> tuple[str, ...]:
    return (*OUTPUT_SUFFIXES, *_OWN_SUFFIXES.get(command, ()))


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
