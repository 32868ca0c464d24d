"""The Hugging Face twin computes what `Flamingo` does, and generates what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import build, load_config
from tests import zoo
from tests.layout_support import Files
from tests.models.hf_support import (
    EXACT,
    SHALLOW,
    TOKENS,
    batch,
    each_family,
    load,
    quiet_transformers,
)
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN

_quiet = pytest.fixture(autouse=True)(quiet_transformers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Folders of `convert --to hf-flamingo`, each made when it is first asked for."""
    return Files(tmp_path_factory.mktemp("hf"), **SHALLOW)


def flamingo(files: Files, family: str) -> Any:
    """`Flamingo` with the same weights, under OpenFlamingo's names."""
    config = load_config(files.config(family))
    model: Any = build(config, dtype="float64", attn_implementation="eager")
    model.load_state_dict(zoo.openflamingo(family, **SHALLOW).full)
    model.media_token_id, model.eoc_token_id = MEDIA_TOKEN, EOC_TOKEN
    return model.eval()


def known_rows(family: str) -> int:
    """Rows of the head that a base supplies: convert leaves the others zero."""
    return min(zoo.base_rows(family), zoo.flamingo_rows(family))


#: LLaMA's norm is computed in float32 whatever comes in.
CLOSE = {"llama": 1e-6}


@each_family
@pytest.mark.parametrize("padded", [None, "right"])
def test_logits_are_those_of_flamingo(files: Files, family: str, padded: str | None) -> None:
    ours, theirs = load(files.whole(family), **EXACT), flamingo(files, family)
    inputs, rows = batch(family, padded=padded), known_rows(family)
    with torch.no_grad():
        found, wanted = ours(**inputs).logits, theirs(**inputs).logits
    assert found.dtype == torch.float64
    assert wanted.std() > 0.1
    assert (found - wanted)[..., :rows].abs().max() < CLOSE.get(family, 1e-14)
    with torch.no_grad():
        blind = ours(**{**inputs, "vision_x": inputs["vision_x"].flip(1)}).logits
    assert (blind - wanted)[..., :rows].abs().max() > 1e-3


def test_tokens_are_those_before_the_last_norm(files: Files) -> None:
    model = load(files.whole("llama"), **EXACT)
    pictures = batch("llama")["vision_x"].flatten(0, 2)
    with torch.no_grad():
        found = model.visual_tokens(pictures)
        wanted = (
            copy.deepcopy(zoo.openflamingo("llama", **SHALLOW).model)
            .double()
            .vision_encoder(pictures)[1]
        )
        assert (found - wanted).abs().max() < 1e-13
        model.config.vision_tokens = "after_ln_post"
        other = type(model)(model.config).double().eval()
        other.load_state_dict(model.state_dict())
        normed = model.vision_encoder.vision_model.post_layernorm(wanted)
        assert (other.visual_tokens(pictures) - normed).abs().max() < 1e-13


@each_family
def test_both_styles_and_the_loss(files: Files, family: str) -> None:
    model = load(files.whole(family), **EXACT)
    port = batch(family)
    own = {
        "input_ids": port["lang_x"],
        "pixel_values": port["vision_x"][:, :, 0],  # without the axis of frames
        "attention_mask": port["attention_mask"],
    }
    with torch.no_grad():
        wanted = model(**port, labels=port["lang_x"])
        found = model(**own, labels=port["lang_x"])
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(found.loss, wanted.loss)
        # one image a row, without the axis of images
        words = port["lang_x"].masked_fill(port["lang_x"] == MEDIA_TOKEN, 5)
        words[:, 0] = MEDIA_TOKEN
        one = model(vision_x=port["vision_x"][:, :1], lang_x=words).logits
        assert torch.equal(
            model(input_ids=words, pixel_values=own["pixel_values"][:, 0]).logits, one
        )
    shifted = wanted.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(shifted, port["lang_x"][:, 1:].flatten())
    assert abs(loss - wanted.loss) < 1e-6


@each_family
def test_greedy_is_what_forwards_say_with_and_without_cache(files: Files, family: str) -> None:
    """The logits of each step too: without its images a model may go on with the same words."""
    model = load(files.whole(family), **EXACT)
    inputs = batch(family)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    pictures = {"vision_x": inputs["vision_x"]}
    with torch.no_grad():
        tokens = inputs["lang_x"]
        for _ in range(6):
            logits = model(**pictures, lang_x=tokens).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    own = {"input_ids": inputs["lang_x"], "pixel_values": inputs["vision_x"]}
    for found in (
        model.generate(**inputs, **options, use_cache=True),
        model.generate(**inputs, **options, use_cache=False),
        model.generate(**own, **options),
        model.generate(inputs["vision_x"], inputs["lang_x"], **options),
    ):
        assert torch.equal(found.sequences, tokens)
        steps = torch.stack(found.logits, dim=1)
        assert (steps - logits[:, 11:]).abs().max() < 1e-6
        assert model.conditioning.media is None
    with torch.no_grad():
        blind = model(vision_x=inputs["vision_x"].flip(1), lang_x=tokens[:, :-1]).logits
    assert (blind - logits)[:, 12:].abs().max() > 1e-4


@each_family
def test_a_loop_with_a_cache_of_ones_own(files: Files, family: str) -> None:
    model = load(files.whole(family), **EXACT)
    inputs = batch(family)
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.cache_media(inputs["lang_x"], inputs["vision_x"])
        first = model(lang_x=inputs["lang_x"][:, :8], use_cache=True)
        rest = model(
            lang_x=inputs["lang_x"][:, 8:], past_key_values=first.past_key_values, use_cache=True
        )
    assert (torch.cat((first.logits, rest.logits), dim=1) - wanted).abs().max() < 1e-6
    model.uncache_media()
    with pytest.raises(ValueError, match="give `vision_x`"):
        model(lang_x=inputs["lang_x"])


@each_family
def test_beams_score_what_forwards_say(files: Files, family: str) -> None:
    model = load(files.whole(family), **EXACT)
    inputs = batch(family)
    found = model.generate(
        **inputs,
        max_new_tokens=4,
        num_beams=3,
        num_return_sequences=2,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert found.sequences.shape == (4, 16)
    with torch.no_grad():
        for row, score in zip(range(4), found.sequences_scores, strict=True):
            tokens, pictures = found.sequences[row][None], inputs["vision_x"][row // 2][None]
            chances = model(vision_x=pictures, lang_x=tokens).logits.log_softmax(-1)
            chosen = chances[0, 11:15].gather(1, tokens[0, 12:, None]).sum()
            assert abs(chosen - score) < 1e-5


def test_left_padding_and_the_end_of_a_chunk(files: Files) -> None:
    model, theirs = load(files.whole("llama"), **EXACT), flamingo(files, "llama")
    inputs = batch("llama", padded="left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    wanted = theirs.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), wanted)
    # generation ends at `<|endofchunk|>`, as the config tells
    assert model.generation_config.eos_token_id == EOC_TOKEN
    model.get_output_embeddings().weight.data.zero_()
    model.eoc_token_id = 0  # all logits are equal: the first token is taken
    alone = {**inputs, "lang_x": inputs["lang_x"][1:], "vision_x": inputs["vision_x"][1:]}
    alone["attention_mask"] = inputs["attention_mask"][1:]
    assert model.generate(**alone, **options).shape == (1, 13)
    assert model.config.eoc_token_id == 0


def test_what_is_asked_for_wrongly(files: Files) -> None:
    model = load(files.whole("opt"), media_token_id=None)
    inputs = batch("opt", dtype=torch.float32)
    with pytest.raises(CkptError, match="which token stands for an image") as caught:
        model(**inputs)
    assert caught.value.code == "FC468"
    assert caught.value.hint is not None
    assert "media_token_id" in caught.value.hint
    with pytest.raises(CkptError, match="which token stands for an image"):
        model.generate(**inputs, max_new_tokens=1)
    model.media_token_id = MEDIA_TOKEN
    assert model.config.media_token_id == MEDIA_TOKEN
    model(**inputs)
    with pytest.raises(ValueError, match="give one of `vision_x`, `pixel_values`"):
        model(**inputs, pixel_values=inputs["vision_x"])
    with pytest.raises(ValueError, match="give one of `lang_x`, `input_ids`"):
        model.generate(**inputs, input_ids=inputs["lang_x"])
    with pytest.raises(ValueError, match="2 rows of text, and images for 3"):
        model(**{**inputs, "vision_x": inputs["vision_x"][[0, 0, 1]]})


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_reaches_every_part(files: Files, family: str, attention: str) -> None:
    model = load(files.whole(family), attn_implementation=attention)
    # transformers' GPT-J has no other than eager attention
    language = attention if family == "llama" else "eager"
    assert model.lang_encoder.config._attn_implementation == language
    assert model.vision_encoder.vision_model.config._attn_implementation == attention
    own = {m.attn_implementation for m in model.modules() if hasattr(m, "attn_implementation")}
    assert own == {attention}
    if family == "llama":
        other = {"eager": "sdpa", "sdpa": "eager"}[attention]
        before = model(**batch("llama", dtype=torch.float32)).logits
        model.set_attn_implementation(other)
        own = {m.attn_implementation for m in model.modules() if hasattr(m, "attn_implementation")}
        assert own == {other}
        assert model.vision_encoder.vision_model.config._attn_implementation == other
        assert (model(**batch("llama", dtype=torch.float32)).logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["mpt1b", "mpt7b", "gpt_neox", "llama", "opt", "gptj"])
def test_checkpointing_gives_the_same_gradients(files: Files, family: str) -> None:
    model = load(files.whole(family)).train()
    inputs = batch(family, dtype=torch.float32)
    # frozen as in training, so that the gradient has to come through what is recomputed
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gated_cross_attn" in name or name.startswith("perceiver"))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["lang_x"]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    assert any(name.startswith("perceiver") for name in wanted)
    with pytest.warns(FutureWarning, match="deprecated"):
        model.gradient_checkpointing_enable()
    assert model.is_activation_checkpointing
    calls = _count_calls(model)
    found = gradients()
    # once forwards, once again in the backward pass
    assert set(calls.values()) == {2}
    assert sorted(found) == sorted(wanted)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    calls.clear()
    gradients()
    assert set(calls.values()) == {1}


def _count_calls(model: Any) -> dict[str, int]:
    from flamingo_ckpt.models.modules.conditioning import FlamingoLayer

    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, FlamingoLayer):
            for part in (module.gated_cross_attn_layer, module.decoder_layer):
                if part is not None:
                    key = f"{name}.{type(part).__name__}"
                    part.register_forward_pre_hook(
                        lambda *_, key=key: calls.__setitem__(key, calls.get(key, 0) + 1)
                    )
    return calls


def test_a_copy_is_a_model_of_its_own(files: Files) -> None:
    model = load(files.whole("opt"))
    other = copy.deepcopy(model)
    inputs = batch("opt", dtype=torch.float32)
    with torch.no_grad():
        wanted = model(**inputs).logits
        for parameter in other.perceiver.parameters():
            parameter.zero_()
        changed = other(**inputs).logits
        assert torch.equal(model(**inputs).logits, wanted)
    assert not torch.equal(changed, wanted)
    head, embedding = other.get_output_embeddings(), other.get_input_embeddings()
    assert head.weight is embedding.weight
    assert embedding.weight is not model.get_input_embeddings().weight


@each_family
def test_more_rows(files: Files, family: str) -> None:
    model = load(files.whole(family))
    rows = zoo.flamingo_rows(family)
    before = model.get_input_embeddings().weight.detach().clone()
    inputs = batch(family, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.resize_token_embeddings(rows + 5, mean_resizing=False)
        found = model(**inputs, labels=inputs["lang_x"])
    assert torch.equal(model.get_input_embeddings().weight[:rows], before)
    assert model.config.text_config.vocab_size == rows + 5
    assert found.logits.shape[-1] == rows + 5
    assert (found.logits[..., :rows] - wanted).abs().max() < 1e-5
    head = model.get_output_embeddings()
    if family in ("mpt7b", "opt"):
        assert head.weight is model.get_input_embeddings().weight


def test_tokens_of_the_config() -> None:
    from flamingo_ckpt.models import FlamingoConfig, FlamingoForConditionalGeneration

    made = zoo.openflamingo("opt").config
    fields = {name: value for name, value in made.items() if name != "model_type"}
    model = FlamingoForConditionalGeneration(FlamingoConfig(**fields, **TOKENS))
    assert (model.media_token_id, model.eoc_token_id) == (MEDIA_TOKEN, EOC_TOKEN)
    assert model.generation_config.eos_token_id == EOC_TOKEN
