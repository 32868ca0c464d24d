"""Put a checkpoint into a module: match, judge, fill. The loaders that users know stand on this."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding, LoadError, name_some
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.formats.remote import fetch_if_remote
from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.loading.activation import activation_findings
from flamingo_ckpt.loading.buffers import (
    computable_buffers,
    hopeless_buffers,
    rebuild_buffers,
)
from flamingo_ckpt.loading.devices import check_device
from flamingo_ckpt.loading.file_grid import file_grid
from flamingo_ckpt.loading.fill import becomes_new, fill
from flamingo_ckpt.loading.match import Matching, match
from flamingo_ckpt.loading.memory import check_memory
from flamingo_ckpt.loading.options import LoadOptions
from flamingo_ckpt.loading.policy import judge
from flamingo_ckpt.loading.report import LoadReport
from flamingo_ckpt.loading.resize import position_tables
from flamingo_ckpt.loading.targets import (
    Target,
    describe_module,
    extra_state_of,
    own_ways_of_loading,
    targets_of,
)
from flamingo_ckpt.models.head_counts import head_counts
from flamingo_ckpt.plan import Plan
from flamingo_ckpt.selection import PlanOptions, choose_tensors
from flamingo_ckpt.stream import check_premises, check_unchanged
from flamingo_ckpt.tensors import Manifest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LoadOptions", "LoadReport", "load_into"]


def load_into(
    module: nn.Module,
    source: str | os.PathLike[str] | Manifest,
    options: LoadOptions = LoadOptions(),  # noqa: B008
) -> LoadReport:
    """Fill a module from a checkpoint of any format and of any layout that its own names fit.

    Where the names are equal, this is `load_state_dict`. Else both sides' layouts are told by
    their names, and tensors are renamed, split, joined and transposed on the way. Tied tensors
    stay tied; parameters that are filled in place stay the objects that optimizers know.

    Nothing of the module changes where the checkpoint is refused. A file that turns out to be
    damaged while it is read (a checksum, a truncation) leaves tensors that were to be replaced
    as they were, and tensors that were to be filled in place partly filled.

    Args:
        module: any module: plain, wrapped (DDP, `torch.compile`, FSDP2), on meta or not.
        source: a file, a folder, an index, one of these on the hub (`hf://...`, which is
            downloaded), or the manifest of one.
        options: what is accepted.

    Returns:
        What was done, with every key accounted for.

    Raises:
        LoadError: the checkpoint does not fit; its report has every key.
        CkptError: the checkpoint cannot be read.
    """
    manifest = (
        source
        if isinstance(source, Manifest)
        else open_checkpoint(fetch_if_remote(os.fspath(source)), wrapper_key=options.wrapper_key)
    )
    check_device(options.device)
    targets, places = targets_of(module), places_of(module)
    check_memory(module, targets, lambda target: becomes_new(target, options))
    keeps = any(strip_wrappers(name)[1] for target in targets for name in target.names)
    chosen = choose_tensors(
        manifest,
        PlanOptions(
            keep_prefix=keeps,
            include=options.include,
            exclude=options.exclude,
            max_expansion=float("inf"),
        ),
    )
    tensors = {tensor.name: tensor for tensor in chosen.names.values()}
    dims = head_counts(options.config)
    matching = match(chosen, targets, manifest.uri, layout=options.layout, dims=dims)
    tables = position_tables(module)
    if options.image_grid is None:
        grid = file_grid(manifest, options.config, matching.loads, tables)
        options = replace(options, image_grid=grid)
    report = LoadReport(
        uri=manifest.uri,
        model=describe_module(module),
        format=manifest.format,
        findings=(
            *manifest.findings,
            *chosen.findings,
            *_hook_findings(module),
            *activation_findings(module, manifest),
        ),
    )
    verdict = judge(
        matching,
        targets,
        tensors,
        options,
        report,
        tables=tables,
        extra_state=extra_state_of(module),
        computable=computable_buffers(module),
        hopeless=(*hopeless_buffers(module), *_unreachable(targets, places, options)),
    )
    _check_bytes(matching, manifest, report)
    filled = fill(verdict.loads, verdict.resized, verdict.zeros, options)
    check_unchanged(manifest)
    for old, tensor in filled.new.items():
        for slots, name in places[old]:
            slots[name] = tensor
    rebuild_buffers(module, options.device)
    return replace(verdict.report, num_mapped=filled.num_mapped)


def _hook_findings(module: nn.Module) -> list[Finding]:
    """What a module does of its own in `load_state_dict`, which is not called."""
    ways = own_ways_of_loading(module)
    if not ways:
        return []
    return [
        Finding(
            code="FC438",
            severity="warning",
            detail=f"{len(ways)} submodules do something of their own when they load a state "
            "dict, which is not done here: " + name_some(ways, 3, where=""),
            hint="save the model's own state dict, whose names and values need no change",
        )
    ]


def places_of(module: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Id of a tensor -> the slots that hold it."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for part in module.modules():
        for slots in (part._parameters, part._buffers):
            for name, tensor in slots.items():
                found.setdefault(id(tensor), []).append((slots, name))
    return found


def _unreachable(
    targets: Sequence[Target], places: Mapping[int, object], options: LoadOptions
) -> list[str]:
    """What `state_dict()` made up, so that there is no place for a new tensor."""
    return [
        target.key
        for target in targets
        if becomes_new(target, options) and any(id(one) not in places for one in target.tensors)
    ]


def _check_bytes(matching: Matching, manifest: Manifest, report: LoadReport) -> None:
    """Two names of one tensor hold the same bits; what may only be left out as zeros is zero."""
    plan = Plan(
        source=manifest,
        steps=(),
        dropped=(),
        renamed=0,
        prefix=None,
        findings=(),
        equal=matching.equal,
        zeros=matching.zeros,
    )
    try:
        check_premises(plan)
    except CkptError as error:
        if error.code not in ("FC202", "FC419"):
            raise
        raise LoadError(
            error.message,
            report=report,
            code=error.code,
            where=error.where,
            hint="choose one with exclude=" if error.code == "FC202" else None,
            key=error.key,
        ) from error
