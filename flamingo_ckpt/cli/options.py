"""Options that verbs share, and the wrapper that turns a verb's body into an exit code."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from flamingo_ckpt.cli.output import Output, error_report
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report, describe_input
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    from flamingo_ckpt.bases import Base
    from flamingo_ckpt.plan import Plan
    from flamingo_ckpt.prepare import Prepared
    from flamingo_ckpt.tensors import Manifest

Verb = Callable[..., Report]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


class ByteSize(click.ParamType[int]):
    """`5GB` (decimal), `500MiB` (binary) or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, at least one."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        unit = _UNITS.get(match[2].upper()) if match else None
        size = float(match[1]) * unit if match and unit else 0.0
        if not 1 <= size < 1 << 63:
            self.fail(f"{value!r} is not a size like 5GB or 500MiB", param, ctx)
        return int(size)


class Ratio(click.FloatRange):
    """A number within a range; NaN is in none, though every comparison with it is false."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, finite."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


_SHARED = (
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option(
        "--output",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Write the report to FILE too: .json, .md, .html, .sarif or .xml (JUnit).",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Answer by the exit code alone."),
    click.option("-v", "--verbose", is_flag=True, help="List everything, fold nothing away."),
    click.option(
        "--color",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        help="Colour; auto means on a terminal, unless NO_COLOR is set.",
    ),
    click.option("--no-progress", is_flag=True, help="No progress bars."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)


def with_output(function: Callable[..., int]) -> Callable[..., int]:
    """Add the options that every verb shares; the body gets them as `out`, an `Output`."""

    @functools.wraps(function)
    def command(
        *,
        as_json: bool,
        output: str | None,
        quiet: bool,
        verbose: bool,
        color: str,
        no_progress: bool,
        debug: bool,
        **options: Any,
    ) -> int:
        out = Output(
            json=as_json,
            output=output,
            quiet=quiet,
            verbose=verbose,
            color=color,
            progress=not no_progress,
            debug=debug,
        )
        return function(out=out, **options)

    return functools.reduce(lambda inner, option: option(inner), reversed(_SHARED), command)


def verb(function: Verb) -> Callable[..., int]:
    """Add the shared options; the body returns a report, the command an exit code."""

    @functools.wraps(function)
    def command(*, out: Output, **options: Any) -> int:
        context = click.get_current_context()
        argv = context.find_root().meta.get("argv", ())
        started = time.monotonic()
        try:
            out.check()
            report = function(out=out, argv=argv, started=started, **options)
        except CkptError as error:
            if out.debug:
                raise
            seconds = time.monotonic() - started
            report = error_report(error, context.info_name or "", argv, seconds)
        # Kept where `main` finds it should the reader of stdout have gone away.
        context.find_root().meta["exit_code"] = report.exit_code
        out.emit(report)
        return report.exit_code

    return with_output(command)


wrapper_key = click.option(
    "--wrapper-key", metavar="KEY", help="Take the weights under this key of a torch file."
)
npy_bfloat16 = click.option(
    "--npy-bfloat16",
    is_flag=True,
    help="2-byte elements without a type in numpy files are bfloat16.",
)

source_layout = click.option(
    "--from", "source_layout", metavar="LAYOUT", help="SRC is in this layout. Default: by evidence."
)
bases = (
    click.option(
        "--base-vision", metavar="SRC", help="The CLIP release that supplies a frozen vision tower."
    ),
    click.option(
        "--base-language", metavar="SRC", help="The release that supplies a frozen language model."
    ),
)


def mapping_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What decides the names and dtypes of the destination; the same for `convert` and `verify`."""
    options = (
        wrapper_key,
        npy_bfloat16,
        click.option("--keep-prefix", is_flag=True, help="Keep `module.` and its like."),
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Take only these names. Repeatable."
        ),
        click.option(
            "--exclude", multiple=True, metavar="GLOB", help="Leave these names out. Repeatable."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
            default="keep",
            show_default=True,
            help="Cast real floating-point tensors.",
        ),
        click.option(
            "--max-expansion",
            type=Ratio(min=1, max=1e9),
            default=1.0,
            metavar="RATIO",
            help="Write out views up to this many times their stored bytes. Default: 1.",
        ),
        click.option("--to", metavar="LAYOUT", help="Rename and rearrange for this layout."),
        source_layout,
        click.option(
            "--vocab-rows",
            type=click.IntRange(1, 1 << 30),
            metavar="N",
            help="Pad or cut the vocabulary to N rows.",
        ),
        click.option(
            "--config",
            metavar="FILE",
            help="The model's config.json, a folder with one, or a preset.",
        ),
        *bases,
    )
    return functools.reduce(lambda inner, option: option(inner), reversed(options), function)


def local_source(src: str, out: Output) -> str:
    """The local path of any SRC: `hf://...` is downloaded (or found in the cache), others stay.

    What comes back for the former is a `hub.LocalCopy`: `open_checkpoint` gives its manifest the
    address as `uri`, and the report the commit.
    """
    from flamingo_ckpt import hub

    if not hub.is_uri(src):
        return src
    from flamingo_ckpt.formats.remote import fetch, plan_fetch

    plan = plan_fetch(src)
    if plan is None:
        return fetch(src)
    with out.progress_bar([("downloading", plan.num_bytes)]) as progress:
        return fetch(src, plan, progress.phase("downloading"))


def local_sources(chosen: Mapping[str, Any], out: Output, *names: str) -> dict[str, Any]:
    """The options, with a local path for those that name a SRC on the hub."""
    local = {name: local_source(chosen[name], out) for name in names if chosen[name]}
    return {**chosen, **local}


def refuse_remote(dst: str) -> None:
    """Raise FC006 for a destination on the hub: only `push` writes there."""
    from flamingo_ckpt import hub

    if hub.is_uri(dst):
        raise CkptError(
            f"DST is `{escape(dst)}`, and this verb writes to this machine",
            code="FC006",
            hint="write a folder, check it, and upload it with `flamingo-ckpt push`",
        )


def open_bases(chosen: Mapping[str, Any]) -> tuple[Base, ...]:
    """Open what `--base-vision` and `--base-language` name."""
    from flamingo_ckpt.bases import Base
    from flamingo_ckpt.formats import open_checkpoint

    return tuple(
        Base(kind=kind, manifest=open_checkpoint(chosen[f"base_{kind}"]))
        for kind in ("vision", "language")
        if chosen[f"base_{kind}"]
    )


def open_source(chosen: Mapping[str, Any]) -> Manifest:
    """Open SRC, by the options of `mapping_options`."""
    from flamingo_ckpt.formats import open_checkpoint

    return open_checkpoint(
        chosen["src"], wrapper_key=chosen["wrapper_key"], npy_bfloat16=chosen["npy_bfloat16"]
    )


def plan_source(
    manifest: Manifest,
    chosen: Mapping[str, Any],
    *,
    is_folder: bool = False,
    writes: bool = True,
    to: str | None = None,
) -> Prepared:
    """Plan what becomes of SRC's names, by the options of `mapping_options`.

    Args:
        manifest: of SRC.
        chosen: the options.
        is_folder: whether the destination is a folder.
        writes: whether it is to be written, or only compared.
        to: layout of the destination, where no option names one.
    """
    from flamingo_ckpt.prepare import Request, prepare
    from flamingo_ckpt.selection import PlanOptions

    options = PlanOptions(
        keep_prefix=chosen["keep_prefix"],
        include=chosen["include"],
        exclude=chosen["exclude"],
        dtype=chosen["dtype"],
        max_expansion=chosen["max_expansion"],
        untie=chosen.get("untie", False),
    )
    request = Request(
        to=chosen["to"] or to,
        source_layout=chosen["source_layout"],
        vocab_rows=chosen["vocab_rows"],
        config=chosen["config"],
        bases=open_bases(chosen),
        is_folder=is_folder,
        checks_config=writes,
    )
    return prepare(manifest, options, request)


def describe_inputs(plan: Plan) -> tuple[dict[str, Any], ...]:
    """The `inputs[]` of a plan: its source, then its bases."""
    first = describe_input(
        plan.source,
        plan.prefix,
        plan.layout.layout.name if plan.layout else layout_name(plan.source),
    )
    return (
        first,
        *(describe_input(other, None, layout_name(other)) for other in plan.others.values()),
    )


def describe_release(manifest: Manifest) -> dict[str, Any]:
    """The `inputs[]` entry of a checkpoint of which nothing is planned."""
    from flamingo_ckpt.layouts.prefixes import describe_prefixes, strip_wrappers

    prefixes = {strip_wrappers(tensor.name)[1] for tensor in manifest.tensors}
    return describe_input(manifest, describe_prefixes(prefixes), layout_name(manifest))


def layout_name(manifest: Manifest) -> str | None:
    """The layout of a manifest by evidence; None where there is none, or more than one."""
    from flamingo_ckpt.inspection import find_layout

    detection = find_layout(manifest)
    return detection.layout.name if detection is not None else None
