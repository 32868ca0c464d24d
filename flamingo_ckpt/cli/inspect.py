"""`flamingo-ckpt inspect SRC`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from flamingo_ckpt.cli.options import npy_bfloat16, verb, wrapper_key
from flamingo_ckpt.cli.output import Output
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report, describe_input

if TYPE_CHECKING:
    from flamingo_ckpt.layouts.detect import Detection
    from flamingo_ckpt.tensors import Manifest

EPILOG = """\b
Examples:
  flamingo-ckpt inspect checkpoint.pt
  flamingo-ckpt inspect release/ --json --tensors
  flamingo-ckpt inspect checkpoint.pt --wrapper-key model_ema
  flamingo-ckpt inspect model:openflamingo-3b-vitl-mpt1b
  flamingo-ckpt inspect hf://openflamingo/OpenFlamingo-3B-vitl-mpt1b/checkpoint.pt
"""


@click.command(epilog=EPILOG, short_help="What is in a checkpoint.")
@click.argument("src")
@click.option("--tensors", is_flag=True, help="List every tensor in the JSON report.")
@wrapper_key
@npy_bfloat16
@verb
def inspect(
    *,
    src: str,
    tensors: bool,
    wrapper_key: str | None,
    npy_bfloat16: bool,
    out: Output,
    argv: tuple[str, ...],
    started: float,
) -> Report:
    """Say what SRC holds, from its headers alone; nothing is executed.

    That is: format, wrapper, prefix, tensors, dtypes, sizes, tied names, and what lies beside the
    weights.

    SRC is a file, a folder or an index (*.index.json), here or on the hub
    (hf://OWNER/NAME[@REVISION][/PATH], of which only headers are downloaded), or a model
    (model:CONFIG or model:PRESET), of which it says what a checkpoint should hold.
    """
    if src.startswith("model:"):
        if wrapper_key is not None or npy_bfloat16:
            raise CkptError("--wrapper-key and --npy-bfloat16 are about files", code="FC006")
        return _inspect_model(src, tensors=tensors or not out.json, argv=argv, started=started)
    from flamingo_ckpt import inspection
    from flamingo_ckpt.formats import open_checkpoint

    manifest = open_checkpoint(src, wrapper_key=wrapper_key, npy_bfloat16=npy_bfloat16)
    found = inspection.inspect(manifest)
    rows = inspection.tensor_rows(manifest)
    extra = {
        "tied": manifest.tied_groups(),
        "files": [{"path": name, "num_bytes": size} for name, size in manifest.files],
        "beside": [
            {"path": item.path, "kind": item.kind, "num_tensors": item.num_tensors}
            for item in manifest.beside
        ],
        "metadata": dict(manifest.metadata),
        "pickle_globals": dict(manifest.pickle_globals),
        "details": {**manifest.details, **_settings_beside(manifest)},
        "layout": _evidence(found.layout),
    }
    if tensors or not out.json:
        extra["tensors"] = rows
    return Report(
        command="inspect",
        argv=argv,
        verdict="pass",
        exit_code=0,
        inputs=(
            describe_input(
                manifest, found.prefix, found.layout.layout.name if found.layout else None
            ),
        ),
        summary=found.summary,
        findings=found.findings,
        duration_seconds=time.monotonic() - started,
        extra=extra,
    )


def _inspect_model(src: str, *, tensors: bool, argv: tuple[str, ...], started: float) -> Report:
    """What should be in a checkpoint of a model: every tensor once, its other names beside."""
    from flamingo_ckpt.inspection import tensor_rows
    from flamingo_ckpt.models.config import read_config
    from flamingo_ckpt.models.expectation import expect
    from flamingo_ckpt.models.settings import settings_of
    from flamingo_ckpt.tensors import Manifest

    config = read_config(src)
    expected = expect(config)
    infos = tuple(tensor.info() for tensor in expected.canonical())
    manifest = Manifest(uri=src, format="model", tensors=infos, files=())
    extra: dict[str, Any] = {
        "tied": expected.tied_groups(),
        "files": [],
        "beside": [],
        "metadata": {},
        "pickle_globals": {},
        "details": {"alias_trees": expected.alias_trees(), "settings": dict(settings_of(config))},
    }
    if tensors:
        extra["tensors"] = tensor_rows(manifest)
    return Report(
        command="inspect",
        argv=argv,
        verdict="pass",
        exit_code=0,
        inputs=(describe_input(manifest, None, expected.layout),),
        summary=expected.summary(),
        duration_seconds=time.monotonic() - started,
        extra=extra,
    )


def _settings_beside(manifest: Manifest) -> dict[str, Any]:
    """What the config in a checkpoint's own folder says and no tensor shows."""
    from flamingo_ckpt.prepare import own_config

    config = own_config(manifest)
    if config is None:
        return {}
    from flamingo_ckpt.models.settings import settings_of

    return {"settings": dict(settings_of(config))}


def _evidence(detection: Detection | None) -> dict[str, Any] | None:
    if detection is None:
        return None
    return {
        "name": detection.layout.name,
        "title": detection.layout.title,
        "language_model": list(detection.families),
        "evidence": detection.evidence,
        "unknown": list(detection.unknown),
    }
