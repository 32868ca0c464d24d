"""How both sides compute: no reduced precision behind the back, nothing left to chance.

And how much of a difference is rounding: the same model with every sum taken in another order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: cuBLAS is deterministic only with a workspace of a fixed size, which it reads when it starts.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def exact_numerics() -> Iterator[None]:
    """No TF32, deterministic algorithms, no gradients; what was set before is set again after.

    To be entered before CUDA is used for the first time in the process: cuBLAS reads the size of
    its workspace when it starts.
    """
    import torch

    os.environ.setdefault(*_CUBLAS)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    mha: Any = torch.backends.mha
    fast_path = mha.get_fastpath_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        cudnn.allow_tf32,
        cudnn.deterministic,
        cudnn.benchmark,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    try:
        # Where a kernel has no deterministic form it warns and runs: the second run of each side
        # then shows whether it matters.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, True, False
        matmul.allow_bf16_reduced_precision_reduction = False
        matmul.allow_fp16_reduced_precision_reduction = False
        # One operator for a whole attention, taken only where all weights are in memory: a model
        # whose weights are streamed would round otherwise than one whose weights are there.
        mha.set_fastpath_enabled(False)
        # Memory that nobody has written to is nobody's result; the second run would show it.
        deterministic.fill_uninitialized_memory = False
        with torch.no_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.set_float32_matmul_precision(before[2])
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before[3:6]
        matmul.allow_bf16_reduced_precision_reduction = before[6]
        matmul.allow_fp16_reduced_precision_reduction = before[7]
        mha.set_fastpath_enabled(fast_path)
        deterministic.fill_uninitialized_memory = fills


def unit_roundoff(dtype: str) -> float:
    """The largest relative error of rounding one number to a dtype of torch.

    >>> unit_roundoff("float32") == 2**-24
    True
    """
    import torch

    return float(torch.finfo(getattr(torch, dtype)).eps) / 2


@contextmanager
def reordered_sums() -> Iterator[None]:
    """Products, norms and averages add up in another order, with the same result but for rounding.

    Matrix products are cut in two along the axis that they sum over, attention meets its keys last
    to first, and norms and averages their elements. It works below the modules, on the operators
    of torch, so that any class computes so.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    rules = _rules()

    class Reordered(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            rule = rules.get(func)
            return (rule or func)(*args, **(kwargs or {}))

    with Reordered():  # type: ignore[no-untyped-call]
        yield


def _rules() -> dict[Any, Callable[..., Any]]:
    import torch

    aten: Any = torch.ops.aten
    rules: dict[Any, Callable[..., Any]] = {
        aten.mm.default: _mm,
        aten.addmm.default: _addmm,
        aten.bmm.default: _bmm,
        aten.baddbmm.default: _baddbmm,
        aten.native_layer_norm.default: _layer_norm,
        aten.convolution.default: _convolution,
        aten._softmax.default: _softmax,
        aten.mean.dim: _mean,
        aten.sum.dim_IntList: _sum,
    }
    for name, rule in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention_cpu),
        ("_scaled_dot_product_efficient_attention", _attention_cuda),
    ):
        if hasattr(aten, name):
            rules[getattr(aten, name).default] = rule
    return rules


def _cut(size: int) -> int:
    """Where a sum over `size` terms is cut; 0 where there is nothing to cut."""
    return size // 3 if size > 3 else 0


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    at = _cut(a.shape[1])
    return torch.addmm(a[:, at:] @ b[at:], a[:, :at], b[:at]) if at else a @ b


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    at = _cut(a.shape[2])
    return torch.baddbmm(a[:, :, at:] @ b[:, at:], a[:, :, :at], b[:, :at]) if at else a @ b


def _addmm(
    first: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    product = _mm(a, b)
    return (product if alpha == 1 else product * alpha) + (first if beta == 1 else first * beta)


def _baddbmm(
    first: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    product = _bmm(a, b)
    scaled = product if alpha == 1 else product * alpha
    # with beta 0 the first one is memory that nobody has filled
    return scaled if beta == 0 else scaled + (first if beta == 1 else first * beta)


def _layer_norm(x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    import torch

    aten: Any = torch.ops.aten
    if len(shape) != 1:
        return aten.native_layer_norm.default(x, shape, weight, bias, eps)
    weight, bias = (None if one is None else one.flip(0) for one in (weight, bias))
    out, *rest = aten.native_layer_norm.default(x.flip(-1), shape, weight, bias, eps)
    return (out.flip(-1), *rest)


def _convolution(x: Any, weight: Any, bias: Any, *options: Any) -> Any:
    import torch

    convolve: Any = torch.ops.aten.convolution.default
    transposed, groups = options[3], options[5]
    if transposed or groups != 1 or weight.shape[1] < 2:
        return convolve(x, weight, bias, *options)
    rest = convolve(x[:, 1:].contiguous(), weight[:, 1:].contiguous(), None, *options)
    return rest + convolve(x[:, :1].contiguous(), weight[:, :1].contiguous(), bias, *options)


def _softmax(x: Any, dim: int, half_to_float: bool) -> Any:
    import torch

    softmax: Any = torch.ops.aten._softmax.default
    return softmax(x.flip(dim), dim, half_to_float).flip(dim)


def _mean(x: Any, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
    import torch

    mean: Any = torch.ops.aten.mean.dim
    return mean(x.flip(dim) if dim else x, dim, keepdim, dtype=dtype)


def _sum(x: Any, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
    import torch

    total: Any = torch.ops.aten.sum.dim_IntList
    return total(x.flip(dim) if dim else x, dim, keepdim, dtype=dtype)


def _causal(q: Any, k: Any) -> Any:
    """The mask that `is_causal` stands for, as numbers to add: `[queries, keys]`."""
    import torch

    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, float("-inf"))


def _attention_cpu(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    import torch

    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    mask = _causal(q, k) if is_causal and attn_mask is None else attn_mask
    turned = None if mask is None else mask.flip(-1)
    return attend(q, k.flip(-2), v.flip(-2), dropout_p, False, attn_mask=turned, scale=scale)


def _attention_cuda(
    q: Any,
    k: Any,
    v: Any,
    attn_bias: Any,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    import torch

    attend: Any = torch.ops.aten._scaled_dot_product_efficient_attention.default
    options = (compute_log_sumexp, dropout_p)
    if is_causal:
        # its bias has to be aligned in memory, which a mask of any width is not
        return attend(q, k, v, attn_bias, *options, True, scale=scale)
    if attn_bias is not None:
        return attend(q, k, v, attn_bias, *options, False, scale=scale)
    return attend(q, k.flip(-2), v.flip(-2), None, *options, False, scale=scale)
