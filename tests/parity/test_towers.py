"""CLIP's image tower alone: its four forms against each other and against a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.parity.sides import Sides, parity

STAGES = (
    *("vision.embeddings", "vision.pre_norm", "vision.layers.0", "vision.layers.1"),
    "image_features",
)
State = dict[str, Any]


def visual() -> State:
    """open_clip's tower as `model.visual` saves it."""
    state = zoo.clip(layers=2).open_clip
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}


def folder(form: str, path: Path, *, projected: bool = False) -> Path:
    clip = zoo.clip(layers=2)
    name = "CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"
    config = {**clip.vision_config, "architectures": [name]}
    return zoo.save_folder(getattr(clip, form), config, path)


@pytest.mark.parametrize("form", ["hf_vision", "hf_vision_flat", "hf_vision_projection", "visual"])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_tower_against_a_whole_model(
    form: str, is_first: bool, sides: Sides, tmp_path: Path
) -> None:
    pair = sides.clip()
    if form == "visual":
        tower = zoo.save_torch(visual(), tmp_path / "visual.pt")
    else:
        tower = folder(form, tmp_path / form, projected=form.endswith("projection"))
    a, b = (tower, pair.a) if is_first else (pair.a, tower)
    answer = parity(a, b, "--config", sides.clip_config())
    assert (answer.code, answer.errors, answer.stages) == (0, [], STAGES)
    assert answer.document["greedy"] is None
    # the other half of the whole model is not compared, and the projection where both have one
    count = len(visual()) + 4 * 2  # query, key and value are one tensor there, weight and bias
    has_projection = form in ("visual", "hf_vision_projection")
    assert answer.document["parameters"]["compared"] == count - (not has_projection)


def test_a_projection_is_seen_where_both_have_one(sides: Sides, tmp_path: Path) -> None:
    state = visual()
    state["proj"] = state["proj"] * 2
    scaled = zoo.save_torch(state, tmp_path / "visual.pt")
    tower = folder("hf_vision_projection", tmp_path / "hf", projected=True)
    answer = parity(tower, scaled, "--config", sides.clip_config())
    assert (answer.code, answer.diverges_at) == (1, {"as-is": "image_features"})
    assert answer.blame[0].keys == ("proj",)
    assert "B's is A's times 2" in answer.blame[0].suspect


def test_a_fault_in_a_tower(sides: Sides, tmp_path: Path) -> None:
    state = visual()
    key = "transformer.resblocks.1.attn.out_proj.weight"
    state[key] = state[key].T.contiguous()
    answer = parity(
        sides.clip().a,
        zoo.save_torch(state, tmp_path / "visual.pt"),
        *("--config", sides.clip_config()),
    )
    assert (answer.code, answer.blame[0].stage) == (1, "vision.layers.1")
    assert answer.blame[0].keys == (key,)
    assert "transposed" in answer.blame[0].suspect


def test_a_whole_clip_lacks_nothing(sides: Sides) -> None:
    """Its projection is what its features are made with."""
    pair = sides.clip()
    answer = pair.answer(lambda s: {k: v for k, v in s.items() if k != "visual_projection.weight"})
    assert answer.code == 1
    assert answer.told("FC203") == ["visual_projection.weight"]
    assert answer.blame[0].keys == ("visual_projection.weight",)
