"""Take up a training run: weights, optimizer and schedule of a training checkpoint.

The file is read by our own pickle machine, so nothing in it is run; a value that is not plain is
refused by its name. Everything is read and compared with the run at hand before any of it is
changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.errors import CkptError, Finding
from flamingo_ckpt.loading.optimizer_state import fitted_groups, fitted_state
from flamingo_ckpt.loading.trained import choose, unwrapped
from flamingo_ckpt.loading.training_values import (
    EPOCH_KEY,
    NAMES_KEY,
    OPTIMIZER_KEY,
    SCHEDULER_KEY,
)
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flamingo_ckpt.loading.report import LoadReport

_KEYS = (EPOCH_KEY, OPTIMIZER_KEY, SCHEDULER_KEY, NAMES_KEY)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where a run stands.

    Attributes:
        epoch: the last that was finished, counted from 0; None where the file does not say.
        report: what became of the weights.
        has_optimizer: whether the optimizer was taken up.
        has_lr_scheduler: whether the schedule was.
        findings: what the file holds that was not used.
    """

    epoch: int | None
    report: LoadReport
    has_optimizer: bool
    has_lr_scheduler: bool
    findings: tuple[Finding, ...] = ()

    @property
    def next_epoch(self) -> int:
        """The one to go on with, as upstream counts."""
        return 0 if self.epoch is None else self.epoch + 1


def load_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
) -> TrainingState:
    """Take up a run where a training checkpoint was saved: ours, or OpenFlamingo's own.

    Trained on, it gives the same bits as a run that was never interrupted, as far as the batches
    and the random numbers are the same: their states are not in such files.

    Args:
        path: what `save_checkpoint` or upstream's training wrote; without an optimizer and a
            scheduler, any checkpoint of the model.
        model: with the same parameters trained as then; may be split over processes, each of which
            reads the file.
        optimizer: over the same parameters, in the same groups and order.
        lr_scheduler: of the same kind, made for this optimizer.

    Raises:
        LoadError: where the weights do not fit.
        CkptError: FC112 where the file is no training checkpoint, FC460 for a value that is not
            plain, FC463 where the state of the optimizer or of the scheduler is missing or fits no
            optimizer like this.
    """
    from flamingo_ckpt.loading.engine import load_into

    uri = os.fspath(path)
    values = _values(uri, wanted=optimizer is not None or lr_scheduler is not None)
    epoch = _epoch(values, uri)
    findings: list[Finding] = []
    groups = state = schedule = None
    if optimizer is not None:
        saved = _part(values, OPTIMIZER_KEY, uri)
        groups = fitted_groups(saved, values.get(NAMES_KEY), model, optimizer, uri)
        state = fitted_state(saved, groups, optimizer, uri)
    if lr_scheduler is not None:
        saved = _part(values, SCHEDULER_KEY, uri)
        schedule = _fitted(saved, lr_scheduler.state_dict(), SCHEDULER_KEY, findings)
    for key, given in ((OPTIMIZER_KEY, optimizer), (SCHEDULER_KEY, lr_scheduler)):
        if key in values and given is None:
            findings.append(_unused(key))
    report = load_into(unwrapped(model), uri, _options(model))
    if optimizer is not None:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    if schedule is not None:
        lr_scheduler.load_state_dict(schedule)
    return TrainingState(
        epoch=epoch,
        report=report,
        has_optimizer=optimizer is not None,
        has_lr_scheduler=lr_scheduler is not None,
        findings=tuple(findings),
    )


def _values(uri: str, *, wanted: bool) -> Mapping[str, Any]:
    from flamingo_ckpt.formats.torch_values import read_torch_values

    try:
        return {} if os.path.isdir(uri) and not wanted else read_torch_values(uri, _KEYS)
    except CkptError as error:
        if error.code == "FC112" and not wanted:
            return {}  # weights alone, in another format
        raise


def _options(model: nn.Module) -> Any:
    """A Flamingo may lack what its bases have; another model, what it does not train."""
    from torch import nn

    from flamingo_ckpt.loading.options import LoadOptions

    if isinstance(getattr(unwrapped(model), "lang_encoder", None), nn.Module):
        return LoadOptions(policy="partial")
    frozen = {item.name for item in choose(model, trainable_only=True).dropped}
    return LoadOptions(may_miss=frozenset(frozen))


def _epoch(values: Mapping[str, Any], uri: str) -> int | None:
    epoch = values.get(EPOCH_KEY)
    if epoch is None or (type(epoch) is int and epoch >= 0):
        return epoch
    raise CkptError(
        f"the epoch in the file is {escape(repr(epoch)[:40])}, not a number from 0",
        code="FC463",
        where=uri,
        key=EPOCH_KEY,
    )


def _part(values: Mapping[str, Any], key: str, uri: str) -> Mapping[str, Any]:
    part = values.get(key)
    if isinstance(part, dict):
        return part
    raise CkptError(
        f"the file has no `{key}`",
        code="FC463",
        where=uri,
        key=key,
        hint="leave the optimizer and the scheduler out to take up the weights alone",
    )


def _fitted(value: Any, own: Any, path: str, findings: list[Finding]) -> Any:
    """Only keys that a scheduler has itself: each becomes an attribute of it."""
    if isinstance(value, dict) and isinstance(own, dict) and all(type(key) is str for key in own):
        lost = own.keys() & {"last_epoch"} - value.keys()
        if lost:
            raise CkptError(f"`{path}` has no `last_epoch`", code="FC463", key=path)
        findings += [_foreign(f"{path}.{escape(str(key))}") for key in value if key not in own]
        return {
            key: _fitted(part, own[key], f"{path}.{key}", findings)
            for key, part in value.items()
            if key in own
        }
    if isinstance(value, list) and isinstance(own, list) and len(value) == len(own):
        pairs = zip(value, own, strict=True)
        return [_fitted(a, b, f"{path}.{i}", findings) for i, (a, b) in enumerate(pairs)]
    if _kind(value) is not _kind(own) and own is not None and value is not None:
        raise CkptError(
            f"`{path}` is of the type `{type(value).__name__}` in the file, and "
            f"`{type(own).__name__}` in the scheduler",
            code="FC463",
            key=path,
            hint="make the scheduler as it was made for the run that is taken up",
        )
    return value


def _kind(value: Any) -> type:
    """Numbers are of one kind; so are all dicts."""
    for kind in (bool, dict):
        if isinstance(value, kind):
            return kind
    return float if isinstance(value, int | float) else type(value)


def _foreign(path: str) -> Finding:
    return Finding(
        code="FC209",
        severity="info",
        key=path,
        detail=f"`{path}` is left out: the scheduler at hand has no such entry",
    )


def _unused(key: str) -> Finding:
    return Finding(
        code="FC209",
        severity="info",
        key=key,
        detail=f"`{key}` is left out: nothing was given to take it up",
    )
