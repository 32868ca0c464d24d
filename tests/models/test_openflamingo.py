"""The model's forward against upstream's, on the same random weights in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock
from flamingo_ckpt.models.modules.flamingo import OpenFlamingo
from flamingo_ckpt.models.modules.perceiver import PerceiverResampler
from tests import zoo
from tests.zoo_flamingo import DIM_HEAD, FF_MULT, HEADS, LATENTS, MEDIA_TOKEN
from tests.zoo_lms import LANG_DIM, language_model

SIZES = {"dim_head": DIM_HEAD, "heads": HEADS, "ff_mult": FF_MULT}
# mpt1b is the zoo's own class there, and here it has a module of its own that does not run yet
FAMILIES = [family for family in zoo.FAMILIES if family != "mpt1b"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family: str, **options: Any) -> tuple[Any, OpenFlamingo]:
    """(upstream's, ours), with equal weights."""
    made = zoo.openflamingo(family, **options)
    theirs = copy.deepcopy(made.model).double().eval()
    language = language_model(family, made.layers)
    language.resize_token_embeddings(zoo.flamingo_rows(family))
    width = theirs.perceiver.norm.weight.shape[0]
    ours = OpenFlamingo(
        vision=copy.deepcopy(theirs.vision_encoder),
        perceiver=PerceiverResampler(
            dim=width,
            depth=made.perceiver_depth,
            num_latents=LATENTS,
            attn_implementation="eager",
            **SIZES,
        ),
        language=language,
        layers=zoo.FAMILIES[family][0],
        every=made.every_n,
        make_block=lambda: GatedCrossAttentionBlock(
            dim=LANG_DIM, dim_visual=width, attn_implementation="eager", **SIZES
        ),
        media_token_id=MEDIA_TOKEN,
    )
    ours.double().eval().load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(family: str, *, padded: bool = False) -> dict[str, Any]:
    """Two rows: images before, between and after the text; one row with text before the first."""
    inputs = dict(zoo.openflamingo(family).inputs())
    tokens = inputs["lang_x"].clone()
    tokens[tokens == MEDIA_TOKEN] = 5
    tokens[0, [0, 6]] = MEDIA_TOKEN
    tokens[1, [3, 11]] = MEDIA_TOKEN
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, -3:] = 0
    pictures = inputs["vision_x"].double()
    return {"vision_x": pictures, "lang_x": tokens, "attention_mask": mask}


@each_family
@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_upstreams_bit_for_bit(family: str, padded: bool) -> None:
    theirs, ours = pair(family)
    inputs = batch(family, padded=padded)
    with torch.no_grad():
        wanted, found = theirs(**inputs).logits, ours(**inputs).logits
    assert torch.equal(found, wanted)
    with torch.no_grad():
        blind = ours(**{**inputs, "vision_x": inputs["vision_x"].flip(1)}).logits
    assert not torch.equal(blind, wanted)


@each_family
def test_another_interval_and_a_loss(family: str) -> None:
    theirs, ours = pair(family, every_n=1, perceiver_depth=2)
    inputs = batch(family)
    inputs["labels"] = inputs["lang_x"]
    with torch.no_grad():
        wanted, found = theirs(**inputs), ours(**inputs)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.logits, wanted.logits)


@each_family
def test_cached_images(family: str) -> None:
    theirs, ours = pair(family)
    inputs = batch(family)
    for model in (theirs, ours):
        model.cache_media(inputs["lang_x"], inputs["vision_x"])
    more = torch.full((2, 3), 7)
    arguments = {"lang_x": more, "attention_mask": torch.ones_like(more)}
    with torch.no_grad():
        wanted = theirs(vision_x=None, **arguments, clear_conditioned_layers=False).logits
        assert torch.equal(ours(vision_x=None, **arguments).logits, wanted)
        # the images stay until they are given up
        assert torch.equal(ours(vision_x=None, **arguments).logits, wanted)
    with pytest.raises(ValueError, match="images are cached"):
        ours(**inputs)
    ours.uncache_media()
    with pytest.raises(ValueError, match="give `vision_x`"):
        ours(vision_x=None, **arguments)


def test_images_are_forgotten_after_a_call() -> None:
    _, ours = pair("llama")
    inputs = batch("llama")
    with torch.no_grad():
        ours(**inputs)
        with pytest.raises(RuntimeError, match="has seen no images"):
            ours.lang_encoder(input_ids=inputs["lang_x"])


def test_any_encoder_that_gives_tokens() -> None:
    class Brain(torch.nn.Module):
        def forward(self, signal: torch.Tensor) -> torch.Tensor:
            return signal.flatten(2).transpose(1, 2)

    _, ours = pair("llama")
    width = ours.perceiver.norm.weight.shape[0]
    ours.vision_encoder = Brain()
    latents = ours.encode_vision(torch.randn(2, 3, 1, width, 4, 2, dtype=torch.float64))
    assert latents.shape == (2, 3, LATENTS, width)
