"""The model's forward against upstream's, on the same random weights in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from flamingo_ckpt.models.modules.flamingo import Flamingo
from tests import zoo
from tests.models.flamingo_support import batch, ours, theirs
from tests.zoo_flamingo import LATENTS, MEDIA_TOKEN
from tests.zoo_lms import language_model

#: transformers' eager attention takes its softmax in float32, whatever the model is.
ROUNDING = 1e-6
#: The perceiver as upstream makes it.
DEEP: dict[str, Any] = {"perceiver_depth": 6}
each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@each_family
@pytest.mark.parametrize("padded", ["", "right"])
def test_logits_are_upstreams_bit_for_bit(family: str, padded: str) -> None:
    model, inputs = ours(family, **DEEP), batch(family, padded=padded)
    with torch.no_grad():
        wanted, found = theirs(family, **DEEP)(**inputs).logits, model(**inputs).logits
        assert torch.equal(found, wanted)
        blind = model(**{**inputs, "vision_x": inputs["vision_x"].flip(1)}).logits
    assert not torch.equal(blind, wanted)


@each_family
@pytest.mark.parametrize("places", [[[], [3]], [[0, 1], [0, 5, 11]], [[11], [0, 1, 2, 3]]])
def test_rows_with_other_numbers_of_images(family: str, places: list[list[int]]) -> None:
    """None, as many as there are, one for the last, and more than there are."""
    inputs = batch(family)
    inputs["lang_x"][inputs["lang_x"] == MEDIA_TOKEN] = 5
    for row, columns in zip(inputs["lang_x"], places, strict=True):
        row[columns] = MEDIA_TOKEN
    with torch.no_grad():
        assert torch.equal(ours(family)(**inputs).logits, theirs(family)(**inputs).logits)


@each_family
def test_padding_on_the_left(family: str) -> None:
    """In float32: transformers takes a softmax of a float64 mask in float32, which gives NaN."""
    inputs = batch(family, padded="left", dtype="float32")
    with torch.no_grad():
        wanted = theirs(family, dtype="float32")(**inputs).logits
        found = ours(family, dtype="float32")(**inputs).logits
    assert torch.equal(found, wanted)


@each_family
def test_another_interval_and_a_loss(family: str) -> None:
    options = {"every_n": 1, "perceiver_depth": 2}
    inputs = batch(family)
    inputs["labels"] = inputs["lang_x"]
    upstream = theirs(family, **options)
    if family == "mpt1b":  # the zoo's class has no loss
        del inputs["labels"]
    with torch.no_grad():
        wanted, found = upstream(**inputs), ours(family, **options)(**inputs)
    assert torch.equal(found.logits, wanted.logits)
    assert family == "mpt1b" or torch.equal(found.loss, wanted.loss)


@each_family
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_fused_kernel_differs_by_rounding(family: str, dtype: str) -> None:
    model, inputs = ours(family, kernel="sdpa", dtype=dtype), batch(family, padded="right")
    with torch.no_grad():
        wanted, found = theirs(family)(**inputs).logits, model(**inputs).logits
    assert found.dtype == getattr(torch, dtype)
    seen = inputs["attention_mask"].bool()
    distance = float((found.double() - wanted)[seen].abs().max())
    assert distance < {"float64": ROUNDING, "float32": 2e-5}[dtype]


@each_family
def test_bfloat16_takes_float32_pictures(family: str) -> None:
    """Pictures are cast to the tower's dtype."""
    model, inputs = ours(family, kernel="sdpa", dtype="bfloat16"), batch(family)
    with torch.no_grad():
        wanted = ours(family)(**inputs).logits
        found = model(**{**inputs, "vision_x": inputs["vision_x"].float()}).logits
    assert found.dtype == torch.bfloat16
    assert float((found.double() - wanted).abs().max()) < 0.1


@each_family
def test_cached_images(family: str) -> None:
    upstream, model = theirs(family), ours(family)
    inputs = batch(family)
    for one in (upstream, model):
        with torch.no_grad():
            one.cache_media(inputs["lang_x"], inputs["vision_x"])
    more = torch.full((2, 3), 7)
    arguments = {"lang_x": more, "attention_mask": torch.ones_like(more)}
    with torch.no_grad():
        wanted = upstream(vision_x=None, **arguments, clear_conditioned_layers=False).logits
        upstream.uncache_media()  # it is shared with other tests
        assert torch.equal(model(vision_x=None, **arguments).logits, wanted)
        # the images stay until they are given up
        assert torch.equal(model(vision_x=None, **arguments).logits, wanted)
    with pytest.raises(ValueError, match="images are cached"):
        model(**inputs)
    model.uncache_media()
    with pytest.raises(ValueError, match="give `vision_x`"):
        model(vision_x=None, **arguments)


@each_family
def test_a_prompt_is_read_once_for_several_endings(family: str) -> None:
    """Images and keys are kept, as upstream's evaluation does it, and dropped in between."""
    model, inputs = ours(family), batch(family)
    prompt, endings = inputs["lang_x"], torch.tensor([[[7, 8], [9, 6]], [[4, 4], [3, 8]]])
    with torch.no_grad():
        model.cache_media(prompt, inputs["vision_x"])
        kept = model(None, prompt, use_cache=True).past_key_values
        found = [
            model(None, ending, past_key_values=copy.deepcopy(kept)).logits for ending in endings
        ]
        model.uncache_media()
        for logits, ending in zip(found, endings, strict=True):
            whole = torch.cat((prompt, ending), dim=1)
            wanted = model(inputs["vision_x"], whole).logits[:, -2:]
            assert float((logits - wanted).abs().max()) < ROUNDING


def test_a_cache_remembers_its_images() -> None:
    """Calls that go on with a cache number the images from the beginning of the text."""
    model, inputs = ours("llama"), batch("llama")
    tokens, pictures = inputs["lang_x"], inputs["vision_x"]
    with torch.no_grad():
        wanted = model(pictures, tokens).logits
        first = model(pictures, tokens[:, :5], use_cache=True)
        rest = model(pictures, tokens[:, 5:], past_key_values=first.past_key_values)
        assert float((rest.logits - wanted[:, 5:]).abs().max()) < ROUNDING
        # cut back, the cache still knows what is left of it
        first.past_key_values.crop(-8)
        again = model(pictures, tokens[:, 4:8], past_key_values=first.past_key_values)
        assert float((again.logits - wanted[:, 4:8]).abs().max()) < ROUNDING


def test_a_cache_from_elsewhere_is_refused() -> None:
    model, inputs = ours("llama"), batch("llama")
    other = language_model("llama", 4).double()
    cache = other(input_ids=inputs["lang_x"] % 90, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="12 tokens that this model has not put there"):
        model(inputs["vision_x"], inputs["lang_x"], past_key_values=cache)


def test_images_are_forgotten_after_a_call_and_after_a_failure() -> None:
    model, inputs = ours("llama"), batch("llama")
    alone = {"input_ids": inputs["lang_x"]}
    with torch.no_grad():
        model(**inputs)
        with pytest.raises(RuntimeError, match="has seen no images"):
            model.lang_encoder(**alone)
        with pytest.raises(ValueError, match="images for 2"):
            model(inputs["vision_x"], inputs["lang_x"].repeat(2, 1))
        with pytest.raises(RuntimeError, match="has seen no images"):
            model.lang_encoder(**alone)
        model(**inputs, clear_conditioned_layers=False)
        model.lang_encoder(**alone)


def test_one_row_of_images_for_several_of_text() -> None:
    model, inputs = ours("llama"), batch("llama")
    pictures = inputs["vision_x"][:1]
    with torch.no_grad():
        found = model(pictures, inputs["lang_x"]).logits
        assert torch.equal(found, model(pictures.repeat(2, *[1] * 5), inputs["lang_x"]).logits)


def test_embeddings_instead_of_tokens_are_refused() -> None:
    model, inputs = ours("llama"), batch("llama")
    with torch.no_grad(), model.looking_at(inputs["vision_x"]):
        embedded = model.lang_encoder.get_input_embeddings()(inputs["lang_x"])
        with pytest.raises(ValueError, match="needs `input_ids`"):
            model.lang_encoder(inputs_embeds=embedded)


def test_a_model_without_a_media_token() -> None:
    model, inputs = ours("llama"), batch("llama")
    model.media_token_id = None
    with pytest.raises(RuntimeError, match="without a media token"):
        model(**inputs)
    model.media_token_id = MEDIA_TOKEN
    model(**inputs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_look_at_their_own_images(copied: Any) -> None:
    model, inputs = ours("mpt1b"), batch("mpt1b")
    twin = copied(model)
    assert twin.conditioning is not model.conditioning
    with torch.no_grad():
        twin.cache_media(inputs["lang_x"], inputs["vision_x"])
        assert model.conditioning.media is None
        wanted = model(**inputs).logits
        twin.uncache_media()
        assert torch.equal(twin(**inputs).logits, wanted)


class Brain(torch.nn.Module):
    """An encoder of something that is no picture: `[n, regions, 50]` to `[n, regions, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(50, width)

    def forward(self, voxels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.proj(voxels)
        return found


def brain_model(**options: Any) -> Flamingo:
    return Flamingo.from_towers(
        Brain(20),
        language_model("llama", 2),
        vis_dim=20,
        layers="model.layers",
        media_token_id=90,
        **options,
    )


def test_any_encoder_that_gives_tokens() -> None:
    model = brain_model()
    assert model.perceiver.latents.shape == (LATENTS, 20)
    latents = model.encode_vision(torch.randn(2, 3, 1, 7, 50))
    assert latents.shape == (2, 3, LATENTS, 20)
    logits = model(torch.randn(2, 1, 1, 7, 50), torch.tensor([[90, 4], [5, 90]])).logits
    assert logits.shape == (2, 2, 93)
    with pytest.raises(ValueError, match=r"has the shape \(2, 3, 50\)"):
        model.encode_vision(torch.randn(2, 3, 50))
    with pytest.raises(ValueError, match=r"\(2, 0, 1, 7, 50\): no image"):
        model.encode_vision(torch.randn(2, 0, 1, 7, 50))


def test_a_frozen_encoder_gets_no_gradient_and_another_does() -> None:
    model = brain_model()
    scans = torch.randn(2, 1, 1, 7, 50)
    model.encode_vision(scans).sum().backward()
    assert model.vision_encoder.proj.weight.grad is not None
    model.vision_encoder.requires_grad_(False)
    seen: list[bool] = []
    model.vision_encoder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model.encode_vision(scans)
    assert seen == [False]


def test_frames_are_refused_unless_they_have_an_embedding() -> None:
    """Upstream refuses them always: nothing would tell their order."""
    with pytest.raises(ValueError, match="3 frames, and none has an embedding"):
        brain_model().encode_vision(torch.randn(1, 2, 3, 7, 50))
    model = brain_model(max_num_frames=3)
    scans = torch.randn(1, 2, 3, 7, 50)
    torch.nn.init.normal_(model.perceiver.frame_embs)
    found = model.encode_vision(scans)
    assert found.shape == (1, 2, LATENTS, 20)
    assert not torch.allclose(found, model.encode_vision(scans.flip(2)), atol=1e-4)
    with pytest.raises(ValueError, match="4 frames, and 3 have an embedding"):
        model.encode_vision(torch.randn(1, 2, 4, 7, 50))


def test_a_language_model_without_a_table() -> None:
    """Any decoder of transformers, by the path of its layers; GPT-2's give tuples or tensors."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=60,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = Flamingo.from_towers(
        Brain(20),
        transformers.GPT2LMHeadModel(config),
        vis_dim=20,
        layers="transformer.h",
        media_token_id=58,
    ).eval()
    model.resize_token_embeddings(64, mean_resizing=False)
    tokens = torch.tensor([[58, 4, 5, 63]])
    scans = torch.randn(1, 1, 1, 7, 50)
    with torch.no_grad():
        assert model(scans, tokens).logits.shape == (1, 4, 64)
    written = model.generate(scans, tokens, max_new_tokens=3, pad_token_id=0)
    assert written.shape[1] <= 7


def test_layers_that_are_not_there() -> None:
    language = language_model("llama", 2)
    with pytest.raises(AttributeError):
        Flamingo.from_towers(Brain(8), language, vis_dim=8, layers="model.h")
    with pytest.raises(TypeError, match="not a list of layers"):
        Flamingo.from_towers(Brain(8), language, vis_dim=8, layers="model.norm")


def test_layers_that_cannot_get_a_block() -> None:
    """A block before no layer would be a model that never looks; twice would be two blocks."""
    language = language_model("llama", 2)
    for every in (0, 3):
        with pytest.raises(ValueError, match=f"2 layers, and a block before each {every}-th"):
            Flamingo.from_towers(Brain(8), language, vis_dim=8, layers="model.layers", every=every)
    Flamingo.from_towers(Brain(8), language, vis_dim=8, layers="model.layers")
    with pytest.raises(ValueError, match="gated cross-attention already"):
        Flamingo.from_towers(Brain(8), language, vis_dim=8, layers="model.layers")


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (Brain(7), r"the shape \(2, 7, 7\), not \[2, tokens, 20\]"),
        (torch.nn.Flatten(), r"the shape \(2, 350\)"),
        (torch.nn.ModuleDict({}), "a dict"),
    ],
)
def test_an_encoder_that_gives_something_else(encoder: torch.nn.Module, words: str) -> None:
    model = brain_model()
    if isinstance(encoder, torch.nn.ModuleDict):  # as the towers of transformers
        encoder.forward = lambda pixels: {"last_hidden_state": pixels}  # type: ignore[method-assign]
    model.vision_encoder = encoder
    with pytest.raises(ValueError, match=words):
        model.encode_vision(torch.randn(2, 1, 1, 7, 50))
