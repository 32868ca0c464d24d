"""What is in a checkpoint: headers only, no tensor data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.layouts.detect import Detection, detect
from flamingo_ckpt.layouts.prefixes import describe_prefixes, strip_wrappers
from flamingo_ckpt.tensors import Manifest, distinct, escape, has_control


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A manifest with what follows from it.

    Attributes:
        manifest: as opened.
        prefix: wrapper prefixes on its names, or None.
        summary: counts, as in the JSON report.
        layout: which layout its keys are in; None where they show none, or more than one.
        findings: those of the reader, and of the names.
    """

    manifest: Manifest
    prefix: str | None
    layout: Detection | None
    summary: Mapping[str, Any]
    findings: tuple[Finding, ...]


def inspect(manifest: Manifest) -> Inspection:
    """Check the structure around the tensors and count what is there.

    Raises:
        FormatError: where a record's own header contradicts the directory.
    """
    manifest.check()
    stored = distinct(manifest.tensors)
    dtypes: dict[str, int] = {}
    for tensor in manifest.tensors:
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + 1
    summary = {
        "num_tensors": len(manifest.tensors),
        "num_parameters": sum(tensor.num_elements for tensor in stored),
        "num_bytes": sum(tensor.num_bytes for tensor in stored),
        "dtypes": dtypes,
        "tied_groups": len(manifest.tied_groups()),
    }
    return Inspection(
        manifest=manifest,
        prefix=describe_prefixes({strip_wrappers(t.name)[1] for t in manifest.tensors}),
        layout=find_layout(manifest),
        summary=summary,
        findings=(*manifest.findings, *_name_findings(manifest), *_view_findings(manifest)),
    )


def find_layout(manifest: Manifest) -> Detection | None:
    """The layout by evidence, or None: a file that is none of ours is no fault."""
    try:
        return detect([strip_wrappers(tensor.name)[0] for tensor in manifest.tensors], manifest.uri)
    except CkptError:
        return None


def other_layout(source: Manifest, after: Detection | None) -> str | None:
    """The layout that a conversion must have gone to; None where both sides are in one layout."""
    before = find_layout(source)
    if after is None or (before is not None and before.layout is after.layout):
        return None
    return after.layout.name


def _name_findings(manifest: Manifest) -> list[Finding]:
    return [
        Finding(
            code="FC505",
            severity="warning",
            key=tensor.name,
            detail=f"`{escape(tensor.name)}` holds control characters; `convert` refuses it",
        )
        for tensor in manifest.tensors
        if has_control(tensor.name)
    ]


def _view_findings(manifest: Manifest) -> list[Finding]:
    """Tensors that are larger than the bytes they lie on."""
    return [
        Finding(
            code="FC307",
            severity="warning",
            key=tensor.name,
            detail=f"`{escape(tensor.name)}` ({tensor.describe()}) is an expanded view of "
            f"{tensor.storage.num_bytes} bytes; `convert` refuses it without --max-expansion",
        )
        for tensor in manifest.tensors
        if tensor.storage is not None and tensor.num_bytes > tensor.storage.num_bytes
    ]


def tensor_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """One mapping per name: `name`, `dtype`, `shape`, `num_bytes`, `shard`."""
    return [
        {
            "name": tensor.name,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "num_bytes": tensor.num_bytes,
            "shard": tensor.file or None,
        }
        for tensor in manifest.tensors
    ]
