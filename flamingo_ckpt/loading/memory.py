"""Whether filling a module's tensors changes the module, and each of them alone.

What `state_dict()` gives may be a copy of what the module computes with, and two tensors that are
not one may share bytes: then a load would do nothing, or the last one written would win.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flamingo_ckpt.errors import CkptError, name_some
from flamingo_ckpt.loading.targets import Target, describe_module, identity, is_distributed

if TYPE_CHECKING:
    from torch import nn


class _Span(NamedTuple):
    """A tensor, and the addresses of its first byte and of the one after its last."""

    device: str
    start: int
    end: int
    target: Target


def check_memory(
    module: nn.Module, targets: Sequence[Target], is_replaced: Callable[[Target], bool]
) -> None:
    """Refuse what cannot be filled although its kind and shape would do.

    Args:
        module: whose tensors they are.
        targets: of `targets_of(module)`.
        is_replaced: whether a tensor gets another one in its place.

    Raises:
        CkptError: FC306 for a copy, for a tensor whose elements share memory, and for two tensors
            that share a part of theirs.
    """
    held = _held(module)
    spans: list[_Span] = []
    for target in targets:
        if is_distributed(target.tensor) or target.is_meta or not target.tensor.numel():
            continue
        start, end = _span(target.tensor)
        is_repeated = target.tensor.numel() * target.tensor.element_size() > end - start
        if not is_repeated:
            spans.append(_Span(str(target.tensor.device), start, end, target))
        if is_replaced(target):
            continue
        if identity(target.tensor) not in held:
            raise _refusal(
                module,
                target,
                "is a copy of what the model has: filling it would change nothing",
                "the model's class or a hook changes its state dict; load before that is "
                "registered, or with its own `load_state_dict`",
            )
        if is_repeated:
            raise _refusal(
                module,
                target,
                "has several elements in one place (`expand`): it cannot hold the file's",
                "make it contiguous (`.contiguous()`) before loading",
            )
    _check_overlaps(module, sorted(spans, key=lambda span: span[:3]))


def _held(module: nn.Module) -> set[tuple[object, ...]]:
    """Identities of all tensors that the parts of a module hold."""
    import torch

    return {
        identity(value)
        for part in module.modules()
        for slots in (part._parameters, part._buffers, vars(part))
        for _, value in slots.items()
        if isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value)
    }


def _span(tensor: Any) -> tuple[int, int]:
    """Addresses of its first byte and of the one after its last."""
    steps = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.element_size()


def _check_overlaps(module: nn.Module, spans: Sequence[_Span]) -> None:
    """Look at tensors whose spans overlap, in order of their addresses."""
    cluster: list[_Span] = []
    end = 0
    for span in spans:
        if cluster and (span.device != cluster[0].device or span.start >= end):
            _check_cluster(module, cluster)
            cluster = []
        end = max(end, span.end) if cluster else span.end
        cluster.append(span)
    _check_cluster(module, cluster)


def _check_cluster(module: nn.Module, cluster: Sequence[_Span]) -> None:
    """Refuse two tensors with one byte; spans alone may only interlock, as columns do."""
    import torch

    if len(cluster) < 2:
        return
    first = cluster[0].start
    used = torch.zeros(max(span.end for span in cluster) - first, dtype=torch.bool)
    for at, span in enumerate(cluster):
        tensor, size = span.target.tensor, span.target.tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        own = used.as_strided((*tensor.shape, size), (*strides, 1), span.start - first)
        if own.any():
            others = [one.target.key for one in cluster[:at] if one.end > span.start]
            raise _refusal(
                module,
                span.target,
                f"shares memory with {name_some(others, where='')} and is not the same tensor",
                "load before the two are tied, or tie them by one parameter",
            )
        own[...] = True


def _refusal(module: nn.Module, target: Target, what: str, hint: str) -> CkptError:
    return CkptError(
        f"{name_some([target.key])} of the model's state dict {what}",
        code="FC306",
        where=describe_module(module),
        key=target.key,
        hint=hint,
    )
