"""The arithmetic of the perceiver and of the gated block, against upstream's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.models.modules.cross_attention import GatedCrossAttentionBlock, text_times
from flamingo_ckpt.models.modules.perceiver import PerceiverResampler

SIZES = {"dim_head": 8, "heads": 3, "ff_mult": 2}
EXACT = {"eager": 0.0, "sdpa": 1e-12}
each_kernel = pytest.mark.parametrize("kernel", EXACT)


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random: norms of 1, biases of 0 and closed gates would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double().eval()


def close(found: torch.Tensor, wanted: torch.Tensor, kernel: str) -> bool:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max()) <= EXACT[kernel]


@each_kernel
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("embeddings", [{}, {"max_num_frames": 4, "max_num_media": 5}])
def test_the_perceiver(kernel: str, paired: bool, embeddings: dict[str, int]) -> None:
    from open_flamingo.src.helpers import PerceiverResampler as Upstream

    theirs = randomised(Upstream(dim=12, depth=3, num_latents=7, **SIZES, **embeddings))
    ours = PerceiverResampler(
        dim=12,
        depth=3,
        num_latents=7,
        paired=paired,
        attn_implementation=kernel,
        max_num_frames=embeddings.get("max_num_frames"),
        max_num_media=embeddings.get("max_num_media"),
        **SIZES,
    ).double()
    state = theirs.state_dict()
    if not paired:
        pairs = {".0.": ".", ".1.": ".feed_forward."}
        state = {_unpaired(name, pairs): one for name, one in state.items()}
    ours.load_state_dict(state)
    frames = 3 if embeddings else 1
    media = torch.randn(2, 4, frames, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        assert close(ours(media), theirs(media), kernel)


def _unpaired(name: str, pairs: dict[str, str]) -> str:
    if not name.startswith("layers."):
        return name
    _, layer, half, rest = name.split(".", 3)
    return f"layers.{layer}{pairs[f'.{half}.']}{rest}"


def test_frames_without_an_embedding_are_refused() -> None:
    plain = PerceiverResampler(dim=8, depth=1, num_latents=2, **SIZES)
    with pytest.raises(ValueError, match="2 frames, and none has an embedding"):
        plain(torch.randn(1, 1, 2, 3, 8))
    known = PerceiverResampler(
        dim=8, depth=1, num_latents=2, max_num_frames=2, max_num_media=1, **SIZES
    )
    with pytest.raises(ValueError, match="3 frames, and 2 have an embedding"):
        known(torch.randn(1, 1, 3, 3, 8))
    with pytest.raises(ValueError, match="2 media, and 1 have an embedding"):
        known(torch.randn(1, 2, 2, 3, 8))


def blocks(kernel: str, ff_name: str) -> tuple[Any, Any]:
    from open_flamingo.src.helpers import GatedCrossAttentionBlock as Upstream

    theirs = randomised(Upstream(dim=10, dim_visual=6, **SIZES))
    ours = GatedCrossAttentionBlock(
        dim=10, dim_visual=6, ff_name=ff_name, attn_implementation=kernel, **SIZES
    ).double()
    state = theirs.state_dict()
    ours.load_state_dict({name.replace("ff.", f"{ff_name}."): one for name, one in state.items()})
    return ours, theirs


@each_kernel
@pytest.mark.parametrize("ff_name", ["ff", "feed_forward"])
@given(data=st.data())
def test_the_gated_block(kernel: str, ff_name: str, data: Any) -> None:
    """Images anywhere: none, several at once, more places than images, text before the first."""
    ours, theirs = blocks(kernel, ff_name)
    images, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    locations = torch.tensor([data.draw(row), data.draw(row)])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    text = torch.randn(2, tokens, 10, dtype=torch.float64, generator=generator)
    media = torch.randn(2, images, 4, 6, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        found = ours(text, media, text_times(locations, tokens))
        assert close(found, theirs(text, media, media_locations=locations), kernel)
        more = torch.randn(2, 2, 10, dtype=torch.float64, generator=generator)
        found = ours(more, media, text_times(locations, 2, is_continuation=True))
        wanted = theirs(more, media, media_locations=locations, use_cached_media=True)
        assert close(found, wanted, kernel)


def test_closed_gates_leave_the_text_as_it_is() -> None:
    block = GatedCrossAttentionBlock(dim=10, dim_visual=6, **SIZES)
    text, media = torch.randn(2, 5, 10), torch.randn(2, 1, 4, 6)
    assert torch.equal(block(text, media, torch.ones(2, 5, dtype=torch.long)), text)


def test_locations_and_tokens_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 tokens, and media locations for 4"):
        text_times(torch.zeros(1, 4, dtype=torch.bool), 3)


def test_an_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="eager or sdpa"):
        PerceiverResampler(dim=8, depth=1, num_latents=2, attn_implementation="flash", **SIZES)
