"""Gradients with and without computing everything twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flamingo_ckpt.models.modules.conditioning import Conditioning, FlamingoLayer
from flamingo_ckpt.models.modules.flamingo import Flamingo
from tests import zoo
from tests.models.flamingo_support import batch, ours, theirs


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of everything that OpenFlamingo trains; the rest is frozen."""
    model.requires_grad_(False)
    trained = (
        model.perceiver,
        model.lang_encoder.gated_cross_attn_layers,
        model.lang_encoder.get_input_embeddings(),
    )
    for module in trained:
        module.requires_grad_(True)
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert all(bool(one.abs().sum() > 0) for one in found.values())
    return found


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gradients_are_upstreams_and_the_same_when_computed_anew(family: str) -> None:
    inputs = batch(family)
    upstream = theirs(family)
    wanted = gradients(upstream, inputs)
    upstream.requires_grad_(False)
    model = ours(family).train()
    found = gradients(model, inputs)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert torch.allclose(one, wanted[name], atol=1e-12, rtol=1e-9), name
    keys = list(model.state_dict())
    model.use_gradient_checkpointing()
    assert list(model.state_dict()) == keys
    runs = count_runs(model)
    again = gradients(model, inputs)
    # the images were forgotten after the forward, and the backward has seen them all the same
    assert model.conditioning.media is None
    assert runs == {"perceiver": 2, "gated": 2, "decoder": 2}
    assert all(torch.equal(one, found[name]) for name, one in again.items())


def count_runs(model: Flamingo) -> dict[str, int]:
    """How often a layer of each kind is computed from now on."""
    runs = {"perceiver": 0, "gated": 0, "decoder": 0}

    def count(name: str, module: torch.nn.Module) -> None:
        def seen(*_: Any) -> None:
            runs[name] += 1

        module.register_forward_pre_hook(seen)

    language: Any = model.lang_encoder
    count("perceiver", model.perceiver.layers[0][0])
    count("gated", language.gated_cross_attn_layers[1].attn)
    count("decoder", next(iter(language.old_decoder_blocks[0].children())))
    return runs


@pytest.mark.parametrize("family", ["mpt1b", "mpt7b", "llama"])
def test_a_cache_is_filled_once(family: str) -> None:
    """A layer that puts keys into a cache is not computed a second time, which would put them
    there twice; and without gradients nothing is."""
    model, inputs = ours(family), batch(family)
    with torch.no_grad():
        wanted = model(**inputs).logits
    model.use_gradient_checkpointing()
    output = model(**inputs, use_cache=True)
    output.logits.sum().backward()
    assert torch.allclose(output.logits, wanted, atol=1e-6)
    assert output.past_key_values.get_seq_length() == inputs["lang_x"].shape[1]
    runs = count_runs(model)
    with torch.no_grad():
        model(**inputs)
    assert runs == {"perceiver": 1, "gated": 1, "decoder": 1}


def test_a_cache_may_be_given_by_place() -> None:
    """Some language models give it to their layers without a name."""
    from transformers import DynamicCache

    runs: list[torch.Tensor] = []

    class Decoder(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, cache: Any) -> torch.Tensor:
            del cache
            runs.append(hidden_states)
            return hidden_states.sin()

    layer = FlamingoLayer(None, Decoder(), Conditioning())
    layer.uses_checkpointing = True
    text = torch.ones(1, 2, 3, requires_grad=True)
    for cache, wanted in ((DynamicCache(), 1), (None, 2)):
        runs.clear()
        layer(text, cache).sum().backward()
        assert len(runs) == wanted


def test_the_constructors_argument() -> None:
    from tests.models.test_openflamingo import brain_model

    model = brain_model(gradient_checkpointing=True)
    runs = count_runs(model)
    tokens = torch.tensor([[90, 4], [5, 90]])
    model(torch.randn(2, 1, 1, 7, 50), tokens).logits.sum().backward()
    assert runs == {"perceiver": 2, "gated": 2, "decoder": 2}


def test_another_half_of_the_model_in_another_dtype() -> None:
    """Under autocast a float32 model with a bfloat16 tower gives gradients too."""
    model, inputs = ours("llama", dtype="float32", kernel="sdpa"), batch("llama", dtype="float32")
    model.vision_encoder.bfloat16().requires_grad_(False)
    model.use_gradient_checkpointing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=inputs["lang_x"]).loss
    loss.backward()
    assert model.perceiver.latents.grad.dtype == torch.float32
    assert bool(torch.isfinite(model.perceiver.latents.grad).all())
