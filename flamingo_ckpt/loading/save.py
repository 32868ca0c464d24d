"""Save a model: what was trained, or all of it, or a training run that can be taken up again.

The tensors go through the same plan and the same writer as a file that is converted: staged beside
its place, synced, read back, renamed. At no moment is there a file that looks whole and is not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.convert import ConvertOptions, ConvertResult, WritePlan, plan_write, run_convert
from flamingo_ckpt.errors import CkptError, Finding, NotFaithfulError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.formats.folder import FolderFiles
from flamingo_ckpt.formats.layout import OutTensor
from flamingo_ckpt.loading.gather import Gathering
from flamingo_ckpt.loading.memory_source import manifest_of
from flamingo_ckpt.loading.trained import choose
from flamingo_ckpt.loading.training_values import MODEL_KEY, training_values
from flamingo_ckpt.plan import CAST_TARGETS, Plan, make_plan
from flamingo_ckpt.selection import Dropped, PlanOptions
from flamingo_ckpt.write_plan import PARTIAL_KEY, choose_format

if TYPE_CHECKING:
    import torch
    from torch import nn

# Of files: whoever names one does not want a folder of that name.
_OTHER_SUFFIXES = frozenset(".ckpt .tar .pkl .pickle .th .h5 .msgpack .safetensor".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """What was saved.

    Attributes:
        path: the file or folder.
        format: `safetensors`, `torch` or `npz`.
        files: (name, size in bytes) of every file.
        num_tensors: distinct tensors of the model.
        num_names: their names, second names of tied tensors included.
        num_bytes: of all tensors in the file, an optimizer's included.
        dropped: names of the model's state dict that were left out, with reasons.
        findings: what was lost, as in a cast.
    """

    path: str
    format: str
    files: tuple[tuple[str, int], ...]
    num_tensors: int
    num_names: int
    num_bytes: int
    dropped: tuple[Dropped, ...]
    findings: tuple[Finding, ...]


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    trainable_only: bool = True,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
    epoch: int | None = None,
    dtype: str | torch.dtype = "keep",
    overwrite: bool = False,
    metadata: Mapping[str, str] = MappingProxyType({}),
    max_shard_bytes: int | None = None,
) -> SaveReport:
    """Write a checkpoint of a model, the format by the suffix: `.safetensors`, or torch's `.pt`.

    A tensor with two names (a tied head) is stored once: safetensors remembers the second name in
    its metadata, a `.pt` has both. With an optimizer, a scheduler or an epoch the file is a
    training checkpoint, as OpenFlamingo's training writes it: a `.pt` with `epoch`,
    `model_state_dict`, `optimizer_state_dict` and `lr_scheduler_state_dict`, which
    `load_training_state` takes up again and `torch.load(weights_only=True)` reads.

    Of a model that is split over processes (`shard_model`) every process has to call this; rank 0
    writes, and gathers a tensor when it is written. With DistributedDataParallel, call it on one.

    Args:
        model: a Flamingo or any module; wrappers for parallel training and compilation are removed.
        path: the file; without a suffix, a folder that gets `model.safetensors`.
        trainable_only: leave out what is frozen, but for embeddings (see `trained`).
        optimizer: its state goes along.
        lr_scheduler: its state goes along.
        epoch: goes along; upstream counts from 0 and takes a run up at the next.
        dtype: `float32`, `bfloat16` or `float16` for the weights; by default they stay as they are.
        overwrite: whether the destination may exist.
        metadata: further text for the header of a safetensors file.
        max_shard_bytes: of one file of a folder.

    Raises:
        CkptError: FC006 for options that contradict each other, FC305 or FC306 for tensors that
            the format cannot hold, FC460 for a value in a state that no checkpoint holds, FC461
            for FSDP1, FC462 where nothing is trained.
        WriteError: FC003 or FC004.
    """
    dst = os.fspath(path)
    is_training = not (optimizer is None and lr_scheduler is None and epoch is None)
    wanted = _dtype_name(dtype)
    _check_options(dst, is_training, wanted, metadata)
    if epoch is not None and (type(epoch) is not int or epoch < 0):
        raise CkptError(
            f"the epoch is {epoch!r}, not a number from 0", code="FC460", where=dst, key="epoch"
        )
    trained = choose(model, trainable_only=trainable_only)
    where = f"the {type(model).__name__} in memory"
    values: dict[str, Any] = {}
    beside: list[tuple[str, torch.Tensor]] = []
    if is_training:
        values, beside = training_values(model, optimizer, lr_scheduler, epoch)
    named = [*trained.tensors, *beside]
    gathering = Gathering([tensor for _, tensor in named])
    manifest = manifest_of(named, where, gathering.fetch)
    plan = make_plan(manifest, PlanOptions(keep_prefix=True, dtype=wanted))
    plan = replace(plan, dropped=trained.dropped, metadata=_metadata(metadata, trained.dropped))
    options = ConvertOptions(max_shard_bytes=max_shard_bytes, overwrite=overwrite)

    def write() -> Mapping[str, Any]:
        result = _write(plan, dst, options, values)
        findings = [one for one in result.findings if one.code not in ("FC209", "FC210")]
        return {"files": result.files, "findings": [_finding_as_json(one) for one in findings]}

    answer = gathering.lead(write) if gathering.is_writer else gathering.follow()
    names = {name for name, _ in trained.tensors}
    return SaveReport(
        path=dst,
        format=choose_format(dst, None)[0],
        files=tuple((name, size) for name, size in answer["files"]),
        num_tensors=sum(step.name in names for step in plan.steps),
        num_names=len(names),
        num_bytes=plan.num_bytes,
        dropped=trained.dropped,
        findings=tuple(Finding(**one) for one in answer["findings"]),
    )


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name == "keep" or name in CAST_TARGETS:
        return name
    raise CkptError(
        f"`{name}` is no dtype to save weights in: keep, {', '.join(CAST_TARGETS)}", code="FC006"
    )


def _check_options(dst: str, is_training: bool, dtype: str, metadata: Mapping[str, str]) -> None:
    format, is_folder = choose_format(dst, None)
    suffix = os.path.splitext(dst)[1].lower()
    if is_folder and suffix in _OTHER_SUFFIXES:
        raise CkptError(
            f"`{dst}` ends in `{suffix}`, the name of a file of a format that is not written",
            code="FC006",
            where=dst,
            hint="end it in .pt or .safetensors; a name without a suffix is that of a folder",
        )
    if is_training and (format != "torch" or is_folder):
        raise CkptError(
            f"`{dst}` cannot hold the state of an optimizer, a scheduler or an epoch",
            code="FC006",
            where=dst,
            hint="give the file the suffix .pt, or save the model alone",
        )
    if is_training and dtype != "keep":
        raise CkptError(
            f"a training run is taken up with the weights that it had, not with {dtype} ones",
            code="FC006",
            where=dst,
            hint="save the model alone in that dtype, to another file",
        )
    if metadata and format != "safetensors":
        raise CkptError(
            f"{format} files hold no metadata", code="FC006", where=dst, hint="use .safetensors"
        )


def _metadata(given: Mapping[str, str], dropped: tuple[Dropped, ...]) -> dict[str, str]:
    is_partial = any(item.reason == "not trained" for item in dropped)
    return {**({PARTIAL_KEY: "true"} if is_partial else {}), **given}


def _write(
    plan: Plan, dst: str, options: ConvertOptions, values: Mapping[str, Any]
) -> ConvertResult:
    write = _plan_training(plan, dst, values) if values else plan_write(plan, dst, options)

    def read_back(staging: str) -> None:
        # Headers, pickle and index as our own reader sees them; the bytes were checked on the way.
        found = {one.name: (one.dtype, one.shape) for one in open_checkpoint(staging).tensors}
        wanted = {
            name: (step.dtype, step.shape)
            for step in plan.steps
            for name in (step.name, *step.aliases)
            if name not in beside
        }
        if found != wanted:
            raise NotFaithfulError(
                "what was written does not hold the names that it should",
                code="FC203",
                where=dst,
                hint="this is an error of the writer: please report it",
            )

    beside = _beside(values)
    return run_convert(plan, write, options, read_back=read_back)


def _beside(values: Mapping[str, Any]) -> frozenset[str]:
    from flamingo_ckpt.loading.training_values import referred

    return frozenset(referred({key: part for key, part in values.items() if key != MODEL_KEY}))


def _plan_training(plan: Plan, dst: str, values: Mapping[str, Any]) -> WritePlan:
    from flamingo_ckpt.formats.torch_writer import TensorRef, layout_torch_values

    beside = _beside(values)
    weights = {
        name: TensorRef(name)
        for step in plan.steps
        for name in (step.name, *step.aliases)
        if name not in beside
    }
    tensors = [
        OutTensor(
            name=step.name,
            dtype=step.dtype,
            shape=step.shape,
            num_bytes=step.num_bytes,
            aliases=step.aliases,
        )
        for step in plan.steps
    ]
    root = {**values, MODEL_KEY: weights}
    layout = layout_torch_values(os.path.basename(dst), root, tensors)
    return WritePlan(
        dst=dst,
        format="torch",
        is_folder=False,
        layouts=(layout,),
        index=None,
        files=FolderFiles(carried=(), code=(), left=()),
        copied=(),
    )


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    names = ("code", "severity", "detail", "key", "hint", "data")
    return {name: getattr(finding, name) for name in names}
