"""Sums in another order, and what is set while a check runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from flamingo_ckpt.parity.numerics import exact_numerics, reordered_sums, unit_roundoff
from flamingo_ckpt.parity.passes import MARGIN
from tests import zoo
from tests.parity.sides import FLAMINGO_STAGES, Answer, Sides, assert_clean, parity

DTYPES = {"float32": 2**-24, "float64": 2**-53}
Compute = Callable[[torch.dtype], torch.Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask(dtype: torch.dtype) -> torch.Tensor:
    """Added to scores: the last keys are not attended to, the others are weighted."""
    found = random(5, 9, seed=7, dtype=dtype)
    found[:, 7:] = float("-inf")
    return found


def attend(dtype: torch.dtype, **options: Any) -> torch.Tensor:
    q, k, v = (random(2, 4, size, 16, seed=at, dtype=dtype) for at, size in enumerate((5, 9, 9)))
    return F.scaled_dot_product_attention(q, k, v, **options)


def causal(dtype: torch.dtype) -> torch.Tensor:
    q, k, v = (random(2, 4, 9, 16, seed=at, dtype=dtype) for at in range(3))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_weights(make: Callable[[], nn.Module], *shape: int) -> Compute:
    def compute(dtype: torch.dtype) -> torch.Tensor:
        module = make().to(dtype)
        for at, one in enumerate(module.parameters()):
            one.data = random(*one.shape, seed=at + 1, dtype=dtype)
        found: torch.Tensor = module(random(*shape, dtype=dtype))
        return found

    return compute


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return random(3, 5, 64, dtype=dtype), random(3, 64, 7, seed=1, dtype=dtype)


#: What a model computes with -> a computation with it. Each adds up many terms.
OPERATORS: dict[str, Compute] = {
    "linear": with_weights(lambda: nn.Linear(96, 8), 3, 5, 96),
    "linear without bias": with_weights(lambda: nn.Linear(96, 8, bias=False), 3, 5, 96),
    "matrix product": lambda dtype: operands(dtype)[0][0] @ operands(dtype)[1][0],
    "batched product": lambda dtype: operands(dtype)[0] @ operands(dtype)[1],
    "bmm": lambda dtype: torch.bmm(*operands(dtype)),
    "baddbmm": lambda dtype: torch.baddbmm(
        random(3, 5, 7, seed=2, dtype=dtype), *operands(dtype), beta=0.5, alpha=2
    ),
    "addmm": lambda dtype: torch.addmm(
        random(7, seed=2, dtype=dtype), *(one[0] for one in operands(dtype)), beta=3, alpha=0.5
    ),
    "einsum": lambda dtype: torch.einsum("bij,bjk->bik", *operands(dtype)),
    "convolution": with_weights(lambda: nn.Conv2d(3, 8, 8, stride=8, bias=False), 2, 3, 32, 32),
    "convolution with bias": with_weights(lambda: nn.Conv2d(3, 8, 8, stride=8), 2, 3, 32, 32),
    "layer norm": with_weights(lambda: nn.LayerNorm(96), 3, 5, 96),
    "layer norm without weights": lambda dtype: F.layer_norm(random(4, 96, dtype=dtype), (96,)),
    "softmax": lambda dtype: random(4, 96, dtype=dtype).softmax(-1),
    "mean": lambda dtype: random(4, 96, dtype=dtype).pow(2).mean(-1),
    "mean with its axis kept": lambda dtype: random(4, 96, dtype=dtype).mean(1, keepdim=True),
    "mean over two axes": lambda dtype: random(4, 9, 96, dtype=dtype).mean((1, 2)),
    "sum": lambda dtype: random(4, 96, dtype=dtype).sum(-1),
    "attention": lambda dtype: attend(dtype),
    "attention with a mask": lambda dtype: attend(dtype, attn_mask=mask(dtype)),
    "attention with a boolean mask": lambda dtype: attend(dtype, attn_mask=mask(dtype).isfinite()),
    "attention with its own scale": lambda dtype: attend(dtype, scale=0.5),
    "causal attention": causal,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_another_order_changes_the_rounding_and_nothing_else(name: str, dtype: str) -> None:
    compute, kind = OPERATORS[name], getattr(torch, dtype)
    with torch.no_grad(), exact_numerics():
        plain = compute(kind)
        with reordered_sums():
            other = compute(kind)
        again = compute(kind)
    assert torch.equal(plain, again)  # the mode is left behind
    assert (other.dtype, other.shape) == (plain.dtype, plain.shape)
    assert other.isfinite().all()
    distance = float((other - plain).norm() / plain.norm())
    assert 0 < distance < 64 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_order_in_a_narrow_dtype(dtype: str) -> None:
    kind = getattr(torch, dtype)
    with exact_numerics():
        for name in ("linear", "layer norm", "attention with a mask"):
            plain = OPERATORS[name](kind).float()
            with reordered_sums():
                other = OPERATORS[name](kind).float()
            assert (other - plain).norm() / plain.norm() < 8 * unit_roundoff(dtype)


def test_what_adds_up_too_little_is_left_alone() -> None:
    """A sum of three or fewer terms, convolutions in groups, norms over two axes, whole tensors."""
    computations: list[Compute] = [
        lambda dtype: random(4, 3, dtype=dtype) @ random(3, 4, seed=1, dtype=dtype),
        with_weights(lambda: nn.Conv2d(4, 8, 3, groups=4), 1, 4, 8, 8),
        with_weights(lambda: nn.Conv2d(1, 8, 3), 1, 1, 8, 8),
        with_weights(lambda: nn.LayerNorm((4, 8)), 2, 4, 8),
        with_weights(lambda: nn.ConvTranspose2d(4, 8, 3), 1, 4, 8, 8),
        lambda dtype: random(3, 0, dtype=dtype) @ random(0, 4, dtype=dtype),
    ]
    with exact_numerics():
        for compute in computations:
            plain = compute(torch.float32)
            with reordered_sums():
                assert torch.equal(compute(torch.float32), plain)


def test_a_masked_key_is_not_met_in_another_order() -> None:
    """Whatever stands in keys and values that the mask leaves out."""
    q, k, v = (random(1, 2, size, 8, seed=at) for at, size in enumerate((3, 6, 6)))
    told = torch.zeros(3, 6)
    told[:, :2] = float("-inf")
    with exact_numerics():
        plain = F.scaled_dot_product_attention(q, k, v, attn_mask=told)
        k[:, :, :2], v[:, :, :2] = 100.0, 1e6
        with reordered_sums():
            other = F.scaled_dot_product_attention(q, k, v, attn_mask=told)
    assert torch.allclose(plain, other, rtol=1e-5)


def test_causal_attention_with_fewer_queries_than_keys() -> None:
    """torch counts both from the first."""
    q, k, v = (random(1, 2, size, 8, seed=at) for at, size in enumerate((3, 6, 6)))
    with exact_numerics():
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with reordered_sums():
            other = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(plain, other, rtol=1e-5)


def test_unit_roundoff() -> None:
    wanted = {"float64": 2**-53, "float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}
    assert {name: unit_roundoff(name) for name in wanted} == wanted


# --- what is set ----------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    mha: Any = torch.backends.mha
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "matmul_tf32": matmul.allow_tf32,
        "cudnn": (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark),
        "bf16": matmul.allow_bf16_reduced_precision_reduction,
        "fp16": matmul.allow_fp16_reduced_precision_reduction,
        "fast_path": mha.get_fastpath_enabled(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "default_dtype": torch.get_default_dtype(),
    }


def apply(deterministic: bool, precision: str, switch: bool, grad: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=switch)
    torch.set_float32_matmul_precision(precision)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    mha: Any = torch.backends.mha
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = switch, switch, switch
    matmul.allow_bf16_reduced_precision_reduction = switch
    matmul.allow_fp16_reduced_precision_reduction = switch
    mha.set_fastpath_enabled(switch)
    torch.set_grad_enabled(grad)


@pytest.fixture
def _restored() -> Iterator[None]:
    before = settings()
    yield
    apply(before["deterministic"], before["precision"], True, before["gradients"])
    torch.use_deterministic_algorithms(before["deterministic"], warn_only=before["warn_only"])
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before["cudnn"]
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = before["bf16"]
    matmul.allow_fp16_reduced_precision_reduction = before["fp16"]
    assert settings() == before


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "own",
    [
        (False, "highest", True, True),
        (True, "medium", False, False),
        (True, "high", True, True),
    ],
)
def test_all_that_was_set_is_set_again(own: tuple[bool, str, bool, bool], fails: bool) -> None:
    apply(*own)
    before = settings()

    def enter() -> None:
        with exact_numerics():
            inside = settings()
            assert inside["deterministic"] is True
            assert inside["warn_only"] is True
            assert inside["precision"] == "highest"
            assert inside["matmul_tf32"] is False
            assert inside["cudnn"] == (False, True, False)
            assert (inside["bf16"], inside["fp16"], inside["fast_path"]) == (False, False, False)
            assert inside["gradients"] is False
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
            if fails:
                raise KeyError("inside")

    if fails:
        with pytest.raises(KeyError, match="inside"):
            enter()
    else:
        enter()
    assert settings() == before


@pytest.mark.usefixtures("_restored")
def test_a_whole_check_leaves_everything_as_it_was(sides: Sides) -> None:
    apply(False, "high", True, True)
    state = torch.random.get_rng_state()
    before = settings()
    answer = sides.clip().answer(lambda tensors: tensors.update(logit_scale=torch.tensor(1.0)))
    assert answer.code == 1
    assert settings() == before
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the noise that is measured -------------------------------------------------------------------


def ratios(answer: Answer) -> dict[str, float]:
    """Stage -> the largest difference between the sides, as a share of the noise of A."""
    floor = 2**-24
    return {
        layer["stage"]: max(one["rel"] / max(one["noise"], floor) for one in layer["passes"])
        for layer in answer.layers
    }


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_noise_bounds_another_implementation_with_room(family: str, sides: Sides) -> None:
    """Upstream's own classes, whose kernels and whose order of summation are not ours."""
    pair = sides.flamingo(family)
    upstream = ("--reference", "open-flamingo", "--greedy", "2")
    answer = parity(pair.a, pair.b, *pair.options, *upstream)
    assert_clean(answer, FLAMINGO_STAGES)
    assert answer.document["sides"][0]["computed_by"] == "open_flamingo's Flamingo"
    assert answer.document["greedy"]["equal"] is True
    found = ratios(answer)
    assert max(found.values()) > 0  # they do not run the same kernels
    assert max(found.values()) < MARGIN / 2, found


def test_noise_is_that_of_the_dtype(sides: Sides) -> None:
    pair = sides.clip()
    dtypes = ("--dtype", "float64", "--dtype", "float32", "--dtype", "bfloat16")
    answer = parity(pair.a, pair.b, *pair.options, *dtypes)
    for layer in answer.layers:
        if layer["stage"] == "text.embeddings":
            continue  # nothing is summed there
        noise = [one["noise"] for one in layer["passes"]]
        assert noise[0] < 1e-14 < noise[1] < 1e-5 < noise[2] < 0.1, layer["stage"]
        assert layer["passes"][2]["tolerance"] is None
