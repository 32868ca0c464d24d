"""`flamingo-ckpt parity A B`."""

from __future__ import annotations

import time
from typing import Any

import click

from flamingo_ckpt.cli.options import (
    ByteSize,
    bases,
    layout_name,
    local_sources,
    npy_bfloat16,
    open_bases,
    source_layout,
    verb,
    wrapper_key,
)
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report, describe_input

EPILOG = """\b
Examples:
  flamingo-ckpt parity checkpoint.pt release/ --base-vision clip.pt --base-language mpt/
  flamingo-ckpt parity clip.safetensors hf-clip/ --dtype float64
  flamingo-ckpt parity checkpoint.pt release/ --output parity.html --device cuda --dtype bfloat16
  flamingo-ckpt parity a/ b/ --image cat.png --prompt "<image>a photo of" --tokenizer b/
"""
_DTYPES = ("float32", "float64", "bfloat16", "float16")


@click.command(epilog=EPILOG, short_help="Do A and B compute the same; who is to blame.")
@click.argument("a")
@click.argument("b")
@click.option(
    "--device",
    metavar="DEVICE",
    help="`cpu`, `cuda` or `cuda:1`. Default: cuda where there is one.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(_DTYPES),
    multiple=True,
    help="Compute in it; repeatable. float32 (the default) and float64 decide, the others are "
    "reported beside float32.",
)
@click.option(
    "--gates",
    metavar="LIST",
    help="`as-is`, `forced` or both with a comma. Default: both, where there are gates.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 1 << 31),
    default=0,
    show_default=True,
    help="Of the generated inputs.",
)
@click.option("--inputs", metavar="FILE", help="Your own inputs: a safetensors file.")
@click.option("--image", "images", multiple=True, metavar="FILE", help="A picture. Repeatable.")
@click.option("--prompt", metavar="TEXT", help="A text; `<image>` stands for each picture.")
@click.option(
    "--tokenizer", metavar="FOLDER", help="For --prompt, where neither side's folder has one."
)
@click.option(
    "--reference",
    type=click.Choice(["open-flamingo"]),
    help="Let the upstream package compute A.",
)
@click.option(
    "--config",
    metavar="FILE",
    help="The model's config, for a side that has none: a file or preset.",
)
@bases[0]
@bases[1]
@click.option(
    "--greedy",
    "num_greedy",
    type=click.IntRange(0, 1000),
    default=8,
    show_default=True,
    metavar="N",
    help="Tokens that both sides write, always the likeliest.",
)
@click.option(
    "--max-memory",
    type=ByteSize(),
    metavar="SIZE",
    help="Weights of a side in memory at a time; more are streamed. Default: what is free.",
)
@source_layout
@wrapper_key
@npy_bfloat16
@verb
def parity(*, out: Output, argv: tuple[str, ...], started: float, **chosen: Any) -> Report:
    """Run A and B on the same inputs, and say whether, where and why they differ.

    A is the reference. Either side is a file, a folder or an index; --base-vision, --base-language
    and --config supply only what a side lacks. Both are run twice, with the gates of
    cross-attention as they are and forced open, and compared stage by stage and bit by bit. Exit 0
    when the two agree, 1 when they do not, 2 when there is no answer, 3 when a required part could
    not be run.
    """
    gates = _gates(chosen["gates"])
    _check_inputs(chosen)
    chosen = local_sources(chosen, out, "a", "b", "base_vision", "base_language")
    from flamingo_ckpt.parity import Options, check_parity, open_pair, resolve_device

    pair = open_pair(
        chosen["a"],
        chosen["b"],
        config=chosen["config"],
        bases=open_bases(chosen),
        source_layout=chosen["source_layout"],
        wrapper_key=chosen["wrapper_key"],
        npy_bfloat16=chosen["npy_bfloat16"],
        upstream=chosen["reference"] is not None,
    )
    try:
        device = resolve_device(chosen["device"])
    except CkptError as error:
        if error.code != "FC482":
            raise
        return _report(pair, _not_run(error), argv, started)
    make_inputs = None
    if chosen["images"] or chosen["prompt"] is not None:
        from flamingo_ckpt.parity.prompts import prompt_inputs

        make_inputs = prompt_inputs(
            pair, chosen["images"], chosen["prompt"] or "", chosen["tokenizer"]
        )
    options = Options(
        device=device,
        dtypes=chosen["dtypes"] or ("float32",),
        gates=gates,
        seed=chosen["seed"],
        inputs=chosen["inputs"],
        make_inputs=make_inputs,
        max_memory=chosen["max_memory"],
        num_greedy=chosen["num_greedy"],
    )
    with out.status() as say:
        result = check_parity(*pair, options, say)
    return _report(pair, result, argv, started)


def _not_run(error: CkptError) -> Any:
    from flamingo_ckpt.parity import ParityResult

    return ParityResult(verdict="incomplete", findings=(error.as_finding(),))


def _report(pair: Any, result: Any, argv: tuple[str, ...], started: float) -> Report:
    from flamingo_ckpt.layouts.prefixes import describe_prefixes, strip_wrappers
    from flamingo_ckpt.parity import extra_of, summary_of

    manifests = [side.manifest for side in pair]
    prefixes = [
        describe_prefixes({strip_wrappers(tensor.name)[1] for tensor in one.tensors})
        for one in manifests
    ]
    files = [finding for manifest in manifests for finding in manifest.findings]
    return Report(
        command="parity",
        argv=argv,
        verdict=result.verdict,
        exit_code={"pass": 0, "fail": 1, "incomplete": 3}[result.verdict],
        inputs=tuple(
            describe_input(one, prefix, layout_name(one))
            for one, prefix in zip(manifests, prefixes, strict=True)
        ),
        summary=summary_of(result),
        findings=(*result.findings, *files),
        duration_seconds=time.monotonic() - started,
        extra=extra_of(result),
    )


def _gates(value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    words = tuple(word.strip() for word in value.split(","))
    if not words or any(word not in ("as-is", "forced") for word in words):
        raise CkptError(
            f"--gates is `{value}`",
            code="FC006",
            hint="`as-is`, `forced` or `as-is,forced`",
        )
    return words


def _check_inputs(chosen: dict[str, Any]) -> None:
    given = {"--image": bool(chosen["images"]), "--prompt": chosen["prompt"] is not None}
    own = [name for name, is_given in given.items() if is_given]
    if chosen["inputs"] and own:
        raise CkptError(
            f"--inputs and {' and '.join(own)} both say what the models are fed",
            code="FC006",
            hint="leave one out",
        )
    if chosen["tokenizer"] and not own:
        raise CkptError(
            "--tokenizer without --prompt or --image", code="FC006", hint="give a --prompt"
        )
