"""CLIP's maps: open_clip, OpenAI and transformers, both ways."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from flamingo_ckpt.layouts import clip as clip_layouts
from flamingo_ckpt.layouts import timm_clip
from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.mapping import assemble
from flamingo_ckpt.layouts.rules import split_numbers
from tests import zoo
from tests.layouts.carry import State, assert_same_bits, carry, read

OPEN_CLIP, VISUAL, CUSTOM, HF, HF_TEXT = clip_layouts.LAYOUTS
_, MOBILE = timm_clip.LAYOUTS
HERE = {"open_clip": OPEN_CLIP, "open_clip-custom": CUSTOM, "hf-clip": HF}


@pytest.fixture(scope="module")
def model() -> zoo.ClipZoo:
    return zoo.clip(layers=2)


def states(model: zoo.ClipZoo) -> dict[str, State]:
    return {
        "open_clip": model.open_clip,
        "open_clip-custom": model.custom_text,
        "hf-clip": model.hf,
    }


def transformers_class(model: zoo.ClipZoo, name: str) -> Any:
    import transformers

    config = model.hf_model.config
    part = config.vision_config if "Vision" in name else config.text_config
    return getattr(transformers, name)(part)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(HERE, HERE)))
def test_all_become_what_an_independent_converter_makes(model, source, target):
    state = states(model)
    assert_same_bits(carry(HERE[source], HERE[target], state[source]), state[target])


def test_every_key_names_each_canonical_tensor_once(model):
    for name, state in states(model).items():
        reading = read(HERE[name], state)
        assert sorted(reading.names) == sorted(state)
        assert sum(map(len, reading.names.values())) == len(reading.atoms)
    assert len({*reading.atoms}) == len(model.hf)


def test_the_sizes_in_openais_files_are_dropped_with_a_reason(model):
    reading = read(OPEN_CLIP, model.openai)
    assert set(reading.dropped) == {"input_resolution", "context_length", "vocab_size"}
    assert all(reading.dropped.values())
    assert_same_bits(carry(OPEN_CLIP, HF, model.openai), model.hf)


def test_what_is_carried_computes_the_same_in_float64(model):
    import torch
    import transformers
    from open_clip.model import CLIP

    hf = transformers.CLIPModel(model.hf_model.config).eval()
    hf.load_state_dict(carry(OPEN_CLIP, HF, model.open_clip), strict=True)
    back = CLIP(**zoo.open_clip_cfg(2)).eval()
    back.load_state_dict(carry(HF, OPEN_CLIP, model.hf), strict=True)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.manual_seed(0))
    words = torch.tensor([[1, 5, 7, 98, *[0] * 8], [4, 9, 2, 3, 97, *[0] * 7]])
    with torch.no_grad():
        images, texts = [], []
        for one in (copy.deepcopy(model.open_clip_model), back):
            images.append(one.double().encode_image(pixels))
            texts.append(one.encode_text(words))
        hf.double()
        images.append(hf.visual_projection(hf.vision_model(pixels).pooler_output))
        texts.append(hf.text_projection(hf.text_model(words).pooler_output))
    for first, *others in (images, texts):
        assert first.abs().max() > 0.1
        for other in others:
            assert (first - other).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("CLIPVisionModel", "vision_model."),
        ("CLIPVisionModelWithProjection", ""),
        ("CLIPTextModelWithProjection", ""),
    ],
)
def test_the_towers_of_transformers_are_read_and_written_with_their_prefix(model, name, prefix):
    state = transformers_class(model, name).state_dict()
    whole = {prefix + key: tensor for key, tensor in state.items()}
    assert {*whole} < {*model.hf}
    assert_same_bits(carry(HF, HF, state), whole)


def test_a_flat_text_tower_is_never_taken_for_a_vision_tower(model):
    state = transformers_class(model, "CLIPTextModel").state_dict()
    flat = {name for name in state if name.startswith(HF.never_has)}
    assert flat == {
        "embeddings.token_embedding.weight",
        "final_layer_norm.weight",
        "final_layer_norm.bias",
    }
    assert any(name.startswith(HF_TEXT.sentinels) for name in state)
    vision = transformers_class(model, "CLIPVisionModel").state_dict()
    assert not any(name.startswith(HF_TEXT.sentinels) for name in vision)
    wanted = {f"text_model.{name}": tensor for name, tensor in state.items()}
    assert_same_bits(carry(HF_TEXT, HF, state), wanted)
    assert HF_TEXT.read_only
    assert {*assemble(read(HF, model.hf).atoms, HF_TEXT.table(), {}).unplaced} == {
        *read(HF, model.hf).atoms
    }


def test_position_ids_are_dropped_with_a_reason_wherever_they_stand(model):
    import torch

    places = ["vision_model.", "text_model.", ""]
    ids = {f"{place}embeddings.position_ids": torch.arange(5)[None] for place in places}
    reading = read(HF, model.hf | ids)
    assert set(reading.dropped) == set(ids)
    assert_same_bits(carry(HF, OPEN_CLIP, model.hf | ids), model.open_clip)


@pytest.mark.parametrize("custom", [False, True])
def test_a_projection_with_a_bias_is_read_and_refused_where_there_is_none(custom):
    import open_clip.model

    config = zoo.open_clip_cfg(1)
    config["text_cfg"]["proj_bias"] = True
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    state = kind(**config).state_dict()
    reading = read(CUSTOM if custom else OPEN_CLIP, state)
    assert not reading.unknown
    assert reading.atoms["text.projection.weight"].shape == (40, 36)
    for target in HERE.values():
        assert assemble(reading.atoms, target.table(), {}).unplaced == ("text.projection.bias",)


def test_a_logit_bias_has_no_place_in_transformers(model):
    import torch

    reading = read(OPEN_CLIP, model.open_clip | {"logit_bias": torch.tensor(-10.0)})
    assert assemble(reading.atoms, HF.table(), {}).unplaced == ("logit_bias",)
    assert assemble(reading.atoms, CUSTOM.table(), {}).unplaced == ()


@pytest.mark.parametrize("source", HERE)
def test_a_logit_scale_of_one_axis_is_the_same_scalar(model, source):
    state = states(model)[source]
    longer = state | {"logit_scale": state["logit_scale"].reshape(1)}
    for target in HERE:
        assert_same_bits(carry(HERE[source], HERE[target], longer), states(model)[target])


def odd_models() -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    """What is changed in the vision and in the text configuration, and a word of the reason."""
    blocks = {"block_type": "custom"}
    return {
        "resnet": ({"layers": [1, 1, 1, 1], "width": 32, "head_width": 64}, {}, "ResNet"),
        "pooler": ({"attentional_pool": True, "attn_pooler_heads": 4}, {}, "attentional pooler"),
        "two poolers": (
            {"attentional_pool": "parallel", "attn_pooler_heads": 4},
            {},
            "attentional pooler",
        ),
        "layer scale": ({"ls_init_value": 0.1}, {"ls_init_value": 0.1}, "layer scale"),
        "norms": ({**blocks, "qk_norm": True}, {**blocks, "scale_attn": True}, "further norms"),
        "scales": (
            {**blocks, "scale_heads": True, "scale_fc": True},
            {**blocks, "scaled_cosine_attn": True, "scale_attn_inner": True},
            "further norms",
        ),
        "class token": ({}, {"embed_cls": True}, "class token"),
        "timm": ({"timm_model_name": "resnet18", "timm_pool": "avg"}, {}, "timm"),
    }


@pytest.mark.parametrize(
    ("odd", "custom"),
    # `CLIP` forgets the class token of its text tower
    [
        pair
        for pair in itertools.product(odd_models(), [False, True])
        if pair != ("class token", False)
    ],
)
def test_unknown_keys_of_other_architectures_have_a_reason(odd, custom):
    import open_clip.model

    vision, text, reason = odd_models()[odd]
    config = zoo.open_clip_cfg(1)
    config["vision_cfg"] |= vision
    config["text_cfg"] |= text
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    zoo.prepare()
    unknown = read(CUSTOM if custom else OPEN_CLIP, kind(**config).state_dict()).unknown
    assert unknown
    for name in unknown:
        assert reason in why_unsupported(name), name


def test_unknown_keys_of_coca_have_a_reason():
    from open_clip.coca_model import CoCa

    config = zoo.open_clip_cfg(1)
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision |= {"attentional_pool": True, "attn_pooler_heads": 4}
    text |= {"embed_cls": True}
    decoder = {"width": 36, "heads": 3, "layers": 1, "context_length": 12, "vocab_size": 99}
    state = CoCa(40, decoder, text, vision).state_dict()
    reasons = {why_unsupported(name) for name in read(CUSTOM, state).unknown}
    assert len(reasons) == 3
    assert all("no other layout" in one or "pooler" in one for one in reasons)


def test_unknown_keys_of_a_text_tower_of_transformers_have_a_reason():
    import transformers
    from open_clip.hf_model import HFTextEncoder

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.RobertaConfig(vocab_size=9, max_position_embeddings=8, **sizes)
    tower = HFTextEncoder("", 40, config=config, pooler_type="mean_pooler", proj_type="mlp")
    state = {f"text.{name}": one for name, one in tower.state_dict().items()}
    unknown = read(CUSTOM, state).unknown
    assert {*unknown} == {*state}
    assert {why_unsupported(name) for name in unknown} == {
        "a text tower of transformers' own (`hf_model_name`)"
    }


def test_unknown_keys_of_mobileclips_convolutional_towers_have_a_reason():
    name = "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"
    assert all(one.table().match(name) is None for one in (*HERE.values(), MOBILE))
    assert "FastViT" in why_unsupported(name)


def why_unsupported(name: str) -> str:
    template, _ = split_numbers(name)
    table = clip_layouts.UNSUPPORTED
    return next((table[prefix] for prefix in table if template.startswith(prefix)), "")


def test_a_tower_that_lacks_what_transformers_always_has_is_named():
    from open_clip.model import CLIP

    config = zoo.open_clip_cfg(1)
    config["vision_cfg"]["no_ln_pre"] = True
    reading = read(OPEN_CLIP, CLIP(**config).state_dict())
    assert not reading.unknown
    lacking = [name for name in clip_layouts.ALWAYS_THERE if name not in reading.atoms]
    assert lacking == ["vision.pre_norm.weight"]


def test_siglip_of_transformers_gives_no_evidence_of_clip():
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.SiglipConfig(
        text_config={**sizes, "vocab_size": 9, "projection_size": 32},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
    )
    state = transformers.SiglipModel(config).state_dict()
    reading = read(HF, state)
    shown = {name for name in state if name.startswith(HF.never_has)}
    assert shown
    assert shown <= {*reading.unknown}
    assert all("SigLIP" in why_unsupported(name) for name in shown)


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("open_clip", "open_clip"),
        ("open_clip", "openai"),
        ("open_clip-custom", "custom_text"),
        ("hf-clip", "hf"),
        ("hf-clip", "hf_vision"),
        ("hf-clip", "hf_vision_flat"),
        ("hf-clip", "hf_vision_projection"),
        ("hf-clip-text", "CLIPTextModel"),
        ("hf-clip", "CLIPTextModelWithProjection"),
    ],
)
def test_the_layout_is_found_by_its_keys(model, wanted, name):
    own = name.startswith("CLIP")
    state = transformers_class(model, name).state_dict() if own else getattr(model, name)
    found = detect(state, "file")
    assert (found.layout.name, found.num_fit) == (wanted, len(state))
    assert not found.unknown


def test_a_file_that_is_half_another_layout_names_both(model):
    text = {name for name in model.hf if name.startswith("text")}
    visual = {name for name in model.open_clip if name.startswith("visual")}
    found = detect([*sorted(text), *sorted(visual)], "file")
    assert found.layout.name == "hf-clip"
    assert found.elsewhere is not None
    assert (found.elsewhere[0], {*found.elsewhere[1]}) == ("open_clip", visual)
