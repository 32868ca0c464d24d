"""What broke Flamingos when transformers moved below them, and what never worked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.loading.flamingo import create_model_and_transforms
from flamingo_ckpt.loading.pretrained import load_pretrained
from flamingo_ckpt.models.modules.conditioning import FlamingoLayer
from tests import zoo
from tests.loading.flamingo_files import save_parts
from tests.models.flamingo_support import batch, ours, theirs
from tests.zoo_lms import WORDS

EVERY_FAMILY = [*zoo.FAMILIES, "gptj"]
#: Of transformers' own attention, which takes its softmax in float32.
ROUNDING = 1e-5
STEPS: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def endless(family: str) -> Any:
    model = ours(family, dtype="float32")
    model.eoc_token_id = None
    model.lang_encoder.generation_config.eos_token_id = None
    return model


# --- GPT-J: gave its layers their input by keyword, and upstream's wrapper failed -----------------


@pytest.mark.parametrize("padded", ["", "right"])
def test_gptj_is_upstreams(padded: str) -> None:
    inputs = batch("gptj", padded=padded, dtype="float32")
    with torch.no_grad():
        wanted = theirs("gptj", dtype="float32")(**inputs).logits
        found = ours("gptj", dtype="float32")(**inputs).logits
        blind = ours("gptj", dtype="float32")(**{**inputs, "vision_x": -inputs["vision_x"]}).logits
    assert torch.equal(found, wanted)
    assert (blind - wanted).abs().max() > 100 * ROUNDING


def test_gptj_from_its_folder_to_its_words(tmp_path: Path) -> None:
    made = zoo.openflamingo("gptj")
    model, _, _ = create_model_and_transforms(
        **save_parts("gptj", tmp_path),
        cross_attn_every_n_layers=made.every_n,
        attn_implementation="eager",
    )
    report = load_pretrained(model, zoo.save_torch(made.partial, tmp_path / "checkpoint.pt"))
    assert "lang_encoder.lm_head.bias" in report.absent_by_design
    inputs = made.inputs()
    with torch.no_grad():
        wanted = made.model(**inputs).logits[..., :WORDS]
        assert (model(**inputs).logits[..., :WORDS] - wanted).abs().max() < ROUNDING
        assert model.generate(**inputs, **STEPS).shape == (2, 16)


def test_a_layer_takes_its_input_by_position_and_by_name() -> None:
    model = ours("opt", dtype="float32")
    inputs = batch("opt", dtype="float32")
    layer = model.lang_encoder.model.decoder.layers[1]
    assert isinstance(layer, FlamingoLayer)
    calls: list[Any] = []

    def by_name(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        calls.append(kwargs)
        return args[1:], {**kwargs, "hidden_states": args[0]}

    with torch.no_grad():
        wanted = model(**inputs).logits
        layer.register_forward_pre_hook(by_name, with_kwargs=True)
        assert torch.equal(model(**inputs).logits, wanted)
    assert calls


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_prompt_without_a_mask_and_with_one_of_ones(family: str) -> None:
    """transformers takes a mask of ones away, and upstream's mixin demands one."""
    model, inputs = endless(family), batch(family, dtype="float32")
    wanted = model.generate(**inputs, **STEPS)
    del inputs["attention_mask"]
    assert torch.equal(model.generate(**inputs, **STEPS), wanted)
    assert wanted.shape[1] == inputs["lang_x"].shape[1] + 4
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_gptj_is_padded_on_the_left() -> None:
    """A row means the same alone and beside a longer one."""
    model, inputs = endless("gptj"), batch("gptj", padded="left", dtype="float32")
    found = model.generate(**inputs, **STEPS)
    alone = {
        "vision_x": inputs["vision_x"][:1],
        "lang_x": inputs["lang_x"][:1, 3:],
        "attention_mask": inputs["attention_mask"][:1, 3:],
    }
    assert torch.equal(found[0, 3:], model.generate(**alone, **STEPS)[0])


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_pictures_are_encoded_once(family: str) -> None:
    """Not at every step; and later tokens do look at them, with and without a cache."""
    model, inputs = endless(family), batch(family, dtype="float32")
    calls: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    for use_cache in (True, False):
        calls.clear()
        model.generate(**inputs, **STEPS, use_cache=use_cache, num_beams=2)
        assert calls == [4]


@pytest.mark.parametrize("family", ["llama", "mpt7b"])
def test_a_cache_of_the_old_form(family: str) -> None:
    """Tuples of keys and values, as upstream's evaluation kept them, tell nothing of pictures."""
    model, inputs = ours(family, dtype="float32"), batch(family, dtype="float32")
    with torch.no_grad():
        kept = model(**inputs, use_cache=True).past_key_values
        old = tuple((layer.keys, layer.values) for layer in kept.layers)
        with pytest.raises(ValueError, match="tuple"):
            model(inputs["vision_x"], torch.tensor([[7], [8]]), past_key_values=old)
        assert model(**inputs).logits.isfinite().all()


# --- training -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_language_models_own_checkpointing(family: str) -> None:
    """Its switch reaches the layers through their wrappers: gradients stay what they are."""
    model, inputs = ours(family, dtype="float32").train(), batch(family, dtype="float32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gated_cross_attn" in name or name.startswith("perceiver"))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(**inputs).logits
        logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    assert any(name.startswith("perceiver") for name in wanted)
    model.lang_encoder.gradient_checkpointing_enable()
    for also in (False, True):
        model.use_gradient_checkpointing(also)
        found = gradients()
        assert sorted(found) == sorted(wanted)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, atol=1e-7), name
