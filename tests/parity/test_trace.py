"""How far one tensor is from another, and what is kept of a forward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flamingo_ckpt.parity import trace as traces
from flamingo_ckpt.parity.result import Measure
from flamingo_ckpt.parity.trace import Trace, digest_of, measure, num_not_finite


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """The same numbers by numpy, all at once."""
    a, b = (one.double().numpy().reshape(-1) for one in (ours, theirs))
    return {
        "max_abs": float(np.abs(b - a).max()),
        "relative": float(np.linalg.norm(b - a) / np.linalg.norm(a)),
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
    }


def assert_like(found: Measure, wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=1e-15), name


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_against_numpy(dtype: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_BLOCK", block)
    a = random(3, 5, 8).to(getattr(torch, dtype))
    b = (a.double() + 0.01 * random(3, 5, 8, seed=1).double()).to(a.dtype)
    found = measure("vision.layers.0", a, b, None)
    assert_like(found, plain(a, b))
    assert (found.num_bad, found.kl, found.argmax_agreement) == (0, None, None)
    assert found.relative > 0


def test_the_same_is_the_same() -> None:
    a = random(2, 3, 4)
    assert measure("projector", a, a.clone(), None) == Measure(
        max_abs=0.0, relative=0.0, cosine=1.0
    )
    assert measure("projector", a, 2 * a, None).relative == pytest.approx(1)
    assert measure("projector", a, -a, None).cosine == pytest.approx(-1)


def test_zero_vectors() -> None:
    zero, one = torch.zeros(2, 3), random(2, 3)
    assert measure("projector", zero, zero, None) == Measure(max_abs=0.0, relative=0.0, cosine=1.0)
    from_zero = measure("projector", zero, one, None)
    assert (from_zero.relative, from_zero.cosine) == (math.inf, 0.0)
    assert not Measure(max_abs=1, relative=math.inf, cosine=0, tolerance=1.0).agrees
    to_zero = measure("projector", one, zero, None)
    assert (to_zero.relative, to_zero.cosine) == (1.0, 0.0)


def test_very_small_and_very_large_numbers() -> None:
    """Squares that underflow or overflow in float32."""
    for scale in (1e-30, 1e30):
        a, b = random(4, 4) * scale, random(4, 4, seed=1) * scale
        assert_like(measure("projector", a, b, None), plain(a, b))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_the_second_alone(value: float) -> None:
    a = random(2, 3)
    b = a.clone()
    b[1, 1] = value
    found = measure("projector", a, b, None)
    assert found.num_bad == 1
    assert math.isnan(found.relative)
    assert not found.agrees
    assert not Measure(max_abs=0, relative=math.nan, cosine=1, tolerance=1.0).agrees


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_both(value: float) -> None:
    """The same in both is no difference; the rest is compared."""
    a = random(2, 3)
    a[1, 1] = value
    assert measure("projector", a, a.clone(), None).num_bad == 0
    assert measure("projector", a, a.clone(), None).relative == 0
    b = a.clone()
    b[0, 0] += 1
    assert measure("projector", a, b, None).max_abs == 1
    other = a.clone()
    other[1, 1] = 1.0 if value == -math.inf else -math.inf
    assert measure("projector", a, other, None).num_bad == 1


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()


@pytest.mark.parametrize("stage", ["lm.layers.0", "lm.embeddings", "xattn.1", "logits"])
def test_padding_of_the_text_is_not_compared(stage: str) -> None:
    a = random(2, 3, 4)
    b = a.clone()
    b[~MASK] = math.nan
    assert measure(stage, a, b, MASK).relative == 0
    assert measure(stage, a, b, MASK).num_bad == 0
    b[0, 1] += 1
    assert_like(measure(stage, a, b, MASK), plain(a[MASK], b[MASK]))


@pytest.mark.parametrize("stage", ["vision.layers.0", "vision.tokens", "perceiver.norm"])
def test_what_is_no_text_has_no_padding(stage: str) -> None:
    a = random(2, 3, 4)
    b = a.clone()
    b[~MASK] += 1
    assert_like(measure(stage, a, b, MASK), plain(a, b))


def test_logits_against_numpy() -> None:
    a, b = random(2, 3, 7), random(2, 3, 7, seed=1)
    found = measure("logits", a, b, MASK)
    x, y = (one[MASK].double().numpy() for one in (a, b))
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    log_q = y - np.log(np.exp(y).sum(-1, keepdims=True))
    assert found.kl == pytest.approx(float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()))
    assert found.argmax_agreement == float((x.argmax(-1) == y.argmax(-1)).mean())
    assert found.kl > 0
    assert_like(found, plain(a[MASK], b[MASK]))
    same = measure("logits", a, a.clone(), MASK)
    assert (same.kl, same.argmax_agreement) == (0.0, 1.0)


def test_logits_of_clip_have_no_tokens() -> None:
    a, b = random(3, 3), random(3, 3, seed=1)
    found = measure("logits", a, b, None)
    assert found.argmax_agreement is not None
    assert_like(found, plain(a, b))


def test_a_vocabulary_that_is_padded_on_one_side() -> None:
    a = random(2, 3, 7)
    wide = torch.cat((a, torch.full((2, 3, 2), -1e30)), dim=-1)
    for ours, theirs in ((a, wide), (wide, a)):
        found = measure("logits", ours, theirs, MASK)
        assert (found.relative, found.argmax_agreement, found.kl) == (0, 1, 0)
    # elsewhere another width is another tensor
    other = measure("lm.layers.0", a, wide, MASK)
    assert other.relative == math.inf
    assert math.isnan(other.cosine)


def test_axes_of_one_are_no_difference() -> None:
    a = random(2, 3, 4)
    assert measure("vision.tokens", a, a[:, None, None], None).relative == 0
    assert measure("vision.tokens", a, a.transpose(0, 1), None).relative == math.inf
    assert measure("vision.tokens", a, a.reshape(6, 4), None).relative == math.inf


def test_a_scalar_and_nothing() -> None:
    one = torch.tensor(2.0)
    assert measure("projector", one, torch.tensor(3.0), None).relative == 0.5
    empty = torch.empty(0, 4)
    assert measure("projector", empty, empty, None).relative == 0
    assert measure("logits", empty, empty, None).argmax_agreement == 1.0


def test_what_is_no_number_is_counted() -> None:
    tensor = random(2, 3, 4)
    tensor[0, 0, 0], tensor[1, 2, 1] = math.nan, math.inf
    assert num_not_finite(tensor, "vision.layers.0", MASK) == 2
    assert num_not_finite(tensor, "lm.layers.0", MASK) == 1
    assert num_not_finite(tensor, "lm.layers.0", None) == 2
    assert num_not_finite(random(2, 3), "projector", None) == 0


def test_padding_of_logits_is_not_counted() -> None:
    """A row that attends to nothing gives what it likes, in all stages alike."""
    tensor = random(2, 3, 4)
    tensor[~MASK] = math.nan
    assert num_not_finite(tensor, "logits", MASK) == 0


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    kept = Trace(str(tmp_path / "a.trace"))
    stages: dict[str, Any] = {
        "first": random(3, 4).mul(3).to(dtype),
        "strided": random(4, 6).mul(3).to(dtype).T[::2],
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "last": random(2, 2).to(dtype),
    }
    for name, tensor in stages.items():
        kept.write(name, tensor)
    assert list(kept.stages) == list(stages)
    for name, tensor in reversed(stages.items()):
        back = kept.read(name)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back, tensor)
        assert kept.digests[name] == digest_of(tensor)
    kept.remove()
    assert list(tmp_path.iterdir()) == []
    kept.remove()  # twice is no error


def test_bits_of_a_stage_are_kept(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1], dtype=torch.int32)
    kept = Trace(str(tmp_path / "a.trace"))
    kept.write("x", bits.view(torch.float32))
    assert torch.equal(kept.read("x").view(torch.int32), bits)
    assert digest_of(torch.tensor(0.0)) != digest_of(torch.tensor(-0.0))


def test_what_is_read_may_be_changed(tmp_path: Path) -> None:
    kept = Trace(str(tmp_path / "a.trace"))
    kept.write("x", torch.ones(3))
    kept.read("x").zero_()
    assert kept.read("x").tolist() == [1, 1, 1]
