"""Generation, against loops of plain forwards: a cache must change nothing but time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flamingo_ckpt.models.modules.flamingo import Flamingo
from tests import zoo
from tests.models.flamingo_support import batch, ours
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN
from tests.zoo_lms import randomise

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
STEPS = 5
#: No end, so that every row has as many steps.
ENDLESS = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": STEPS, "do_sample": False}
#: transformers takes scores in float32, whatever the model is.
ROUNDING = 1e-4


def model_of(family: str) -> Flamingo:
    """A model whose rows never end by themselves."""
    model = ours(family)
    model.eoc_token_id = None
    model.lang_encoder.generation_config.eos_token_id = None
    return model


def greedy(model: Flamingo, inputs: dict[str, Any], steps: int = STEPS) -> torch.Tensor:
    """The most likely continuation, by plain forwards over the whole text."""
    tokens, mask = inputs["lang_x"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(steps):
            logits = model(inputs["vision_x"], tokens, mask).logits[:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return tokens


def log_probabilities(
    model: Flamingo, inputs: dict[str, Any], sequences: torch.Tensor, repeat: int
) -> torch.Tensor:
    """Of what was written, by one plain forward: `[rows]`."""
    start = inputs["lang_x"].shape[1]
    pictures = inputs["vision_x"].repeat_interleave(repeat, dim=0)
    with torch.no_grad():
        logits = model(pictures, sequences, torch.ones_like(sequences)).logits
    written = sequences[:, start:, None]
    return logits[:, start - 1 : -1].log_softmax(-1).gather(-1, written).sum((1, 2))


def favour(model: Flamingo, token: int, by: float = 100.0) -> None:
    """Make one token likelier everywhere."""

    def push(_: Any, __: Any, output: Any) -> Any:
        output.logits[..., token] += by
        return output

    model.lang_encoder.register_forward_hook(push)


@each_family
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_a_loop_of_forwards(family: str, use_cache: bool) -> None:
    """Text before the first image, several images, and an image at the very end of the prompt."""
    model, inputs = model_of(family), batch(family)
    told = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**inputs, use_cache=use_cache, **ENDLESS, **told)
    assert torch.equal(found.sequences, greedy(model, inputs))
    with torch.no_grad():
        mask = torch.ones_like(found.sequences)
        wanted = model(inputs["vision_x"], found.sequences, mask).logits[:, -STEPS - 1 : -1]
        blind = model(inputs["vision_x"].flip(1), found.sequences, mask).logits[:, -STEPS - 1 : -1]
    logits = torch.stack(found.logits, dim=1)
    assert float((logits - wanted).abs().max()) < ROUNDING
    assert float((logits - blind).abs().amax((0, 2)).min()) > 100 * ROUNDING


@each_family
def test_a_beams_score_is_the_sum_of_its_log_probabilities(family: str) -> None:
    model, inputs, beams = model_of(family), batch(family), 3
    found = model.generate(
        **inputs,
        **ENDLESS,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    start = inputs["lang_x"].shape[1]
    assert found.sequences.shape == (2 * beams, start + STEPS)
    scores = log_probabilities(model, inputs, found.sequences, beams)
    assert float((scores - found.sequences_scores).abs().max()) < ROUNDING
    # beams of one row differ, and the best comes first
    assert len({tuple(row.tolist()) for row in found.sequences}) == 2 * beams
    assert bool((found.sequences_scores.view(2, beams).diff(dim=1) <= 0).all())


@each_family
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_written_media_token_counts(family: str, use_cache: bool) -> None:
    """It stands for the next image, also in a beam that has taken another's place."""
    model, inputs, beams = model_of(family), batch(family), 4
    inputs["lang_x"][inputs["lang_x"] == MEDIA_TOKEN] = 5
    inputs["lang_x"][:, 2] = MEDIA_TOKEN
    favour(model, MEDIA_TOKEN, by=1.8)
    found = model.generate(
        **inputs,
        **ENDLESS,
        use_cache=use_cache,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    start = inputs["lang_x"].shape[1]
    written = found.sequences[:, start:]
    numbers = (written[:, :-1] == MEDIA_TOKEN).sum(1)
    assert len(set(numbers.tolist())) > 1
    scores = log_probabilities(model, inputs, found.sequences, beams)
    assert float((scores - found.sequences_scores).abs().max()) < ROUNDING


@pytest.mark.parametrize("family", ["mpt1b", "mpt7b", "gpt_neox", "llama", "opt"])
def test_rows_that_are_padded_on_the_left(family: str) -> None:
    """A row means the same alone and beside a longer one, with other images at other places."""
    model, inputs = model_of(family), batch(family, padded="left")
    model, inputs["vision_x"] = model.float(), inputs["vision_x"].float()
    found = model.generate(**inputs, **ENDLESS)
    alone = {
        "vision_x": inputs["vision_x"][:1],
        "lang_x": inputs["lang_x"][:1, 3:],
        "attention_mask": inputs["attention_mask"][:1, 3:],
    }
    assert torch.equal(found[0, 3:], model.generate(**alone, **ENDLESS)[0])
    assert torch.equal(found[0, 3:], greedy(model, alone)[0])


@pytest.mark.parametrize("places", [[[], [3]], [[0, 1], [0, 5, 11]], [[11], [0, 1, 2, 3]]])
def test_rows_with_other_numbers_of_images(places: list[list[int]]) -> None:
    model, inputs = model_of("mpt1b"), batch("mpt1b")
    inputs["lang_x"][inputs["lang_x"] == MEDIA_TOKEN] = 5
    for row, columns in zip(inputs["lang_x"], places, strict=True):
        row[columns] = MEDIA_TOKEN
    assert torch.equal(model.generate(**inputs, **ENDLESS), greedy(model, inputs))


@each_family
def test_a_cache_is_the_default(family: str) -> None:
    """MPT's config has none, and every step would read the whole text again."""
    model, inputs = model_of(family), batch(family)
    lengths: list[int] = []

    def read(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    model.lang_encoder.register_forward_pre_hook(read, with_kwargs=True)
    model.generate(**inputs, **ENDLESS)
    assert lengths == [inputs["lang_x"].shape[1]] + [1] * (STEPS - 1)


def test_samples_share_the_images_of_their_row() -> None:
    model, inputs = model_of("llama"), batch("llama")
    options = {**ENDLESS, "do_sample": True, "num_return_sequences": 4, "top_k": 0}
    torch.manual_seed(0)
    found = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    assert found.sequences.shape[0] == 8
    pictures = inputs["vision_x"].repeat_interleave(4, dim=0)
    with torch.no_grad():
        wanted = model(pictures, found.sequences, torch.ones_like(found.sequences)).logits
    assert float((found.logits[-1] - wanted[:, -2]).abs().max()) < ROUNDING
    assert len({tuple(row.tolist()) for row in found.sequences[:4, -STEPS:]}) > 1


def test_text_in_pieces_sees_the_same_images() -> None:
    """A prompt that is read piece by piece; only the cache knows what was before."""
    model, inputs = model_of("llama"), batch("llama")
    found = model.generate(**inputs, **ENDLESS, prefill_chunk_size=5)
    assert torch.equal(found, greedy(model, inputs))


@each_family
def test_it_ends_with_the_chunk(family: str) -> None:
    """The rest of a row is filled, and no word is said about a missing padding token."""
    model, inputs = ours(family), batch(family)
    favour(model, EOC_TOKEN)
    found = model.generate(**inputs, max_new_tokens=4)
    assert found.shape[1] == inputs["lang_x"].shape[1] + 1
    assert bool((found[:, -1] == EOC_TOKEN).all())
    longer = model.generate(**inputs, max_new_tokens=4, eos_token_id=7, pad_token_id=0)
    assert longer.shape[1] == inputs["lang_x"].shape[1] + 4


def test_a_generation_config_is_obeyed() -> None:
    from transformers import GenerationConfig

    model, inputs = ours("llama"), batch("llama")
    favour(model, EOC_TOKEN)
    asked = GenerationConfig(max_new_tokens=3, eos_token_id=7, pad_token_id=1)
    found = model.generate(**inputs, generation_config=asked)
    assert found.shape[1] == inputs["lang_x"].shape[1] + 3


def test_cached_images_serve_generation_too() -> None:
    model, inputs = model_of("llama"), batch("llama")
    wanted = model.generate(**inputs, **ENDLESS)
    with torch.no_grad():
        model.cache_media(inputs["lang_x"], inputs["vision_x"])
    assert torch.equal(model.generate(None, *list(inputs.values())[1:], **ENDLESS), wanted)
    with pytest.raises(ValueError, match="images are cached"):
        model.generate(**inputs, **ENDLESS)
    # the language model's own, as upstream's evaluation calls it
    tokens = inputs["lang_x"]
    assert torch.equal(model.lang_encoder.generate(input_ids=tokens, **ENDLESS), wanted)


def test_nothing_is_left_behind() -> None:
    """After generation and after its failure: no images, and the language model's own methods."""
    model, inputs = model_of("llama"), batch("llama")
    model.generate(**inputs, **ENDLESS)
    assert model.conditioning.media is None
    assert "prepare_inputs_for_generation" not in vars(model.lang_encoder)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**inputs, **ENDLESS, no_such_option=1)
    assert model.conditioning.media is None
    assert "prepare_inputs_for_generation" not in vars(model.lang_encoder)


def test_no_gradient_is_kept() -> None:
    model, inputs = model_of("mpt1b"), batch("mpt1b")
    found = model.generate(**inputs, **ENDLESS, return_dict_in_generate=True, output_logits=True)
    assert not found.logits[0].requires_grad


def test_cached_images_are_seen_by_a_prompt_without_a_media_token() -> None:
    """As plain calls see them: the last image of each row, in every beam too."""
    model, inputs = model_of("gpt_neox"), batch("gpt_neox")
    tail = torch.full_like(inputs["lang_x"][:, :4], 9)
    mask = torch.ones_like(tail)
    with torch.no_grad():
        model.cache_media(inputs["lang_x"], inputs["vision_x"])
        wanted = greedy(model, {"vision_x": None, "lang_x": tail, "attention_mask": mask})
    assert torch.equal(model.generate(None, tail, mask, **ENDLESS), wanted)
    told: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True}
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    found = model.generate(None, tail, mask, **ENDLESS, **told, **beams)
    model.uncache_media()
    # the same text after the prompt's last image alone
    last = inputs["vision_x"][:, -1:].repeat_interleave(3, dim=0)
    lead = torch.full_like(found.sequences[:, :1], MEDIA_TOKEN)
    with torch.no_grad():
        model.cache_media(lead, last)
        logits = model(None, found.sequences, torch.ones_like(found.sequences)).logits
    written = found.sequences[:, 4:, None]
    scores = logits[:, 3:-1].log_softmax(-1).gather(-1, written).sum((1, 2))
    assert float((scores - found.sequences_scores).abs().max()) < ROUNDING


def test_a_generation_config_decides_on_the_cache() -> None:
    from transformers import GenerationConfig

    model, inputs = model_of("llama"), batch("llama")
    lengths: list[int] = []

    def read(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    model.lang_encoder.register_forward_pre_hook(read, with_kwargs=True)
    start = inputs["lang_x"].shape[1]
    for use_cache, wanted in ((False, [start, start + 1]), (None, [start, 1])):
        lengths.clear()
        asked = GenerationConfig(max_new_tokens=2, pad_token_id=0, use_cache=use_cache)
        model.generate(**inputs, generation_config=asked)
        assert lengths == wanted


@pytest.mark.parametrize("ends", [[7, 8], (7, 8), torch.tensor([7, 8])])
def test_several_ends(ends: Any) -> None:
    model, inputs = model_of("llama"), batch("llama")
    favour(model, 8)
    found = model.generate(**inputs, max_new_tokens=4, eos_token_id=ends)
    assert found.shape[1] == inputs["lang_x"].shape[1] + 1


def test_one_call_at_a_time() -> None:
    """A second one, inside or from another thread, would change what the first looks at."""
    model, inputs = model_of("llama"), batch("llama")
    wanted = model(**inputs).logits

    def again(*_: Any) -> None:
        handle.remove()
        model(inputs["vision_x"] * 2, inputs["lang_x"])

    handle = model.lang_encoder.register_forward_pre_hook(again)
    with pytest.raises(RuntimeError, match="images of another call"):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, wanted)


def test_a_cache_of_another_kind_is_refused() -> None:
    """Mamba's tells no length; without one the images would be lost after the first step."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = Flamingo.from_towers(
        torch.nn.Linear(5, 32),
        MambaForCausalLM(config),
        vis_dim=32,
        layers="backbone.layers",
        media_token_id=MEDIA_TOKEN,
    ).eval()
    randomise(model)
    inputs = {
        "vision_x": torch.randn(1, 1, 1, 7, 5),
        "lang_x": torch.tensor([[5, MEDIA_TOKEN, 6]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=r"`cache_params`.*use_cache=False"):
        model.generate(**inputs, **ENDLESS)
    found = model.generate(**inputs, **ENDLESS, use_cache=False)
    assert torch.equal(found, greedy(model, inputs))
