"""SigLIP's maps, against open_clip's own reader of big_vision's arrays."""

from __future__ import annotations

import numpy as np
import pytest

from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.mapping import assemble
from flamingo_ckpt.layouts.siglip import LAYOUTS
from tests.layouts.carry import assert_same_bits, carry, read
from tests.zoo import SiglipZoo, siglip

BIG_VISION, OPEN_CLIP = LAYOUTS
VARIANTS = [(stacked, root) for stacked in (True, False) for root in ("params/", "")]


@pytest.fixture(scope="module")
def zoo() -> SiglipZoo:
    """More than ten layers, so that layer 10 must not sort before layer 2."""
    return siglip(layers=11)


def heads(zoo: SiglipZoo) -> dict[str, int]:
    return {"visionheads": zoo.heads, "textheads": zoo.heads}


@pytest.mark.parametrize(("stacked", "root"), VARIANTS)
def test_arrays_become_what_open_clip_makes_of_them(zoo, tmp_path, stacked, root):
    from open_clip.convert import load_big_vision_weights
    from open_clip.model import CustomTextCLIP

    arrays = zoo.npz(stacked=stacked, prefix=root)
    np.savez(tmp_path / "siglip.npz", **arrays)
    model = CustomTextCLIP(**zoo.config, init_logit_bias=0.0)
    load_big_vision_weights(model, str(tmp_path / "siglip.npz"))
    carried = carry(BIG_VISION, OPEN_CLIP, arrays)
    assert_same_bits(carried, dict(model.state_dict()))
    assert_same_bits(carried, zoo.state)


@pytest.mark.parametrize(("stacked", "root"), VARIANTS)
def test_any_variant_is_written_stacked_below_params(zoo, stacked, root):
    arrays = zoo.npz(stacked=stacked, prefix=root)
    assert_same_bits(carry(BIG_VISION, BIG_VISION, arrays, heads(zoo)), zoo.npz())


def test_open_clip_becomes_arrays_and_comes_back(zoo):
    arrays = carry(OPEN_CLIP, BIG_VISION, zoo.state, heads(zoo))
    assert_same_bits(arrays, zoo.npz())
    assert_same_bits(carry(BIG_VISION, OPEN_CLIP, arrays), zoo.state)


def test_scalars_of_one_axis_are_the_same_scalars(zoo):
    longer = {
        name: one.reshape(1) if name.startswith("logit_") else one
        for name, one in zoo.state.items()
    }
    assert_same_bits(carry(OPEN_CLIP, OPEN_CLIP, longer), zoo.state)
    assert_same_bits(carry(OPEN_CLIP, BIG_VISION, longer, heads(zoo)), zoo.npz())


def test_each_tower_has_its_own_number_of_heads(zoo):
    arrays = carry(OPEN_CLIP, BIG_VISION, zoo.state, {"visionheads": 2, "textheads": 16})
    attention = "MultiHeadDotProductAttention_0/"
    assert arrays[f"params/img/MAPHead_0/{attention}query/bias"].shape == (2, 32)
    assert arrays[f"params/img/Transformer/encoderblock/{attention}out/kernel"].shape == (
        *(11, 2, 32),
        64,
    )
    assert arrays[f"params/txt/Encoder_0/encoderblock/{attention}key/kernel"].shape == (
        *(11, 64, 16),
        4,
    )
    assert_same_bits(carry(BIG_VISION, OPEN_CLIP, arrays), zoo.state)


def test_without_the_number_of_heads_the_arrays_with_heads_are_refused_by_name(zoo):
    made = assemble(read(OPEN_CLIP, zoo.state).atoms, BIG_VISION.table(), {"visionheads": 4})
    refused = [name for name in made.faults if "textheads" in made.faults[name]]
    attention = "params/txt/Encoder_0/encoderblock/MultiHeadDotProductAttention_0/"
    assert sorted(refused) == sorted(
        f"{attention}{one}"
        for one in (
            *(
                f"{part}/{leaf}"
                for part in ("query", "key", "value")
                for leaf in ("kernel", "bias")
            ),
            "out/kernel",
        )
    )
    assert len(made.faults) == len(refused)


def test_a_missing_layer_leaves_a_hole_that_is_refused(zoo):
    state = dict(zoo.state)
    del state["visual.trunk.blocks.3.norm1.weight"]
    made = assemble(read(OPEN_CLIP, state).atoms, BIG_VISION.table(), heads(zoo))
    assert made.faults == {
        "params/img/Transformer/encoderblock/LayerNorm_0/scale": "10 of its 11 parts are there"
    }


def test_the_layout_is_found_by_its_keys(zoo):
    files = [zoo.npz(stacked=stacked, prefix=root) for stacked, root in VARIANTS]
    for state, wanted in (*((one, BIG_VISION) for one in files), (zoo.state, OPEN_CLIP)):
        found = detect(state, "file")
        assert (found.layout.name, found.num_fit) == (wanted.name, len(state))


def test_paligemma_arrays_give_no_evidence_of_siglip():
    theirs = ["params/img/Transformer/encoderblock/LayerNorm_0/scale", "params/img/head/kernel"]
    assert not any(name.startswith(BIG_VISION.sentinels) for name in theirs)
    assert BIG_VISION.table().match("params/img/head/kernel") is None
