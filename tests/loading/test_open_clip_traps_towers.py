"""A CLIP's vision tower inside a Flamingo: its files, its grid, and which tokens are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.models import build
from flamingo_ckpt.models.config import parse_config
from tests import zoo
from tests.loading.open_clip_support import (
    assert_filled,
    assert_ours_fills,
    ours,
    refusal,
    state_of,
)
from tests.zoo_flamingo import VISION_LAYERS
from tests.zoo_lms import randomise, seeded

FAMILY = "opt"
TABLES = {
    "openflamingo": "vision_encoder.positional_embedding",
    "hf-flamingo": "vision_encoder.vision_model.embeddings.position_embedding.weight",
}


def flamingo(layout: str = "openflamingo", *, image: int = 32, seed: int = 99) -> Any:
    """A random Flamingo of the package's."""
    config = zoo.openflamingo(FAMILY).config
    config["vision_config"] = config["vision_config"] | {"image_size": image}
    with seeded(seed):
        model = build(parse_config(config, "config.json"), layout)
        randomise(model)
    return model.eval()


@pytest.mark.parametrize("name", ["open_clip", "openai", "hf", "hf_vision", "hf_vision_flat"])
def test_a_tower_takes_its_tokens_before_the_last_norm(name: str, tmp_path: Path) -> None:
    clip = zoo.clip(layers=VISION_LAYERS)
    path = zoo.save_torch(getattr(clip, name), tmp_path / "a.pt")
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = clip.hf_model.vision_model(pictures).last_hidden_state
        normed = clip.hf_model.vision_model.post_layernorm(hidden)[:, 1:]
        wanted = hidden[:, 1:]

    visual = zoo.clip(layers=VISION_LAYERS).open_clip_model.visual
    visual.output_tokens = True
    try:
        with torch.no_grad():
            _, tokens = visual(pictures)  # what a Flamingo on today's open_clip would be fed
    finally:
        visual.output_tokens = False
    torch.testing.assert_close(tokens, normed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tokens, wanted, atol=0.1)

    model = flamingo()
    ours(model.vision_encoder, path, strict=False)
    with torch.no_grad():
        _, tokens = model.vision_encoder(pictures)
    torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", list(TABLES))
@pytest.mark.parametrize("source", list(TABLES))
def test_another_image_size(layout: str, source: str, tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    state = state_of(flamingo(source, seed=1))
    path = zoo.save_torch(state, tmp_path / "a.pt")
    key = TABLES[layout]
    plain = flamingo(layout)
    wanted = state_of(assert_loads(plain, path))
    table = resample_abs_pos_embed(wanted[key][None], [6, 6], [4, 4])[0]
    assert torch.equal(wanted[key], state[TABLES[source]])
    larger = assert_loads(flamingo(layout, image=48), path)
    wanted[key] = table
    if layout != source == "hf-flamingo":
        wanted["vision_encoder.proj"] = larger.state_dict()["vision_encoder.proj"]
        strictly = flamingo(layout)
        with refusal(strictly, "vision_encoder.proj"):
            ours(strictly, path)
    assert_filled(larger, wanted)


def assert_loads(model: Any, path: Path) -> Any:
    """All but the projection, which only open_clip's tower has and no Flamingo uses."""
    found = ours(model, path, strict=False)
    assert found.unexpected_keys == []
    assert set(found.missing_keys) <= {"vision_encoder.proj"}
    return model


def test_a_tower_and_the_whole_are_told_apart(tmp_path: Path) -> None:
    clip = zoo.clip(layers=VISION_LAYERS)
    path = zoo.save_torch(clip.open_clip, tmp_path / "a.pt")
    model = flamingo()
    found = model.load_state_dict(torch.load(path), strict=False)  # as upstream would, in silence
    assert found.missing_keys == list(model.state_dict())
    for strict in (True, False):
        with refusal(model):
            ours(model, path, strict=strict)
    tower = {n.removeprefix("visual."): t for n, t in clip.open_clip.items() if "visual." in n}
    own = model.vision_encoder
    assert_ours_fills(zoo.save_torch(tower, tmp_path / "b.pt"), tower, model=own)
