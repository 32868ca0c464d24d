"""timm's and Apple's names of CLIP, against timm's and open_clip's own converters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flamingo_ckpt.layouts import clip as clip_layouts
from flamingo_ckpt.layouts import timm_clip
from flamingo_ckpt.layouts.detect import detect
from flamingo_ckpt.layouts.mapping import assemble
from tests import zoo
from tests.layouts.carry import State, assert_same_bits, carry, read

OPEN_CLIP, _, CUSTOM, HF, _ = clip_layouts.LAYOUTS
TIMM, MOBILE = timm_clip.LAYOUTS


@pytest.fixture(scope="module")
def model() -> zoo.ClipZoo:
    return zoo.clip(layers=2)


def timm_tower(model: zoo.ClipZoo) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=4,
        num_classes=40,
        pre_norm=True,
    )


def test_timm_reads_what_is_written_for_it(model):
    from timm.models.vision_transformer import checkpoint_filter_fn

    tower = timm_tower(model)
    visual = {name: one for name, one in model.open_clip.items() if name.startswith("visual.")}
    theirs = checkpoint_filter_fn(dict(visual), tower)
    bias = theirs.pop("head.bias")
    ours = carry(OPEN_CLIP, TIMM, visual)
    assert_same_bits(ours, theirs)
    tower.load_state_dict(ours | {"head.bias": bias}, strict=True)
    assert_same_bits(carry(TIMM, OPEN_CLIP, ours), visual)
    assert_same_bits(
        carry(TIMM, HF, ours), {name: model.hf[name] for name in model.hf_vision_projection}
    )


def test_the_bias_that_timm_adds_is_no_part_of_clip(model):
    state = timm_tower(model).state_dict()
    reading = read(TIMM, state)
    assert not reading.unknown
    made = assemble(reading.atoms, OPEN_CLIP.table(), {})
    assert set(made.unplaced) == {*timm_clip.ZEROS} == {"vision.projection.bias"}
    assert_same_bits(carry(TIMM, TIMM, state), state)


def test_other_towers_of_timm_give_no_evidence():
    from timm.models.vision_transformer import VisionTransformer

    plain = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    assert not any(name.startswith(TIMM.sentinels) for name in plain.state_dict())


def hybrid_tower() -> Any:
    """MobileCLIP-B's image tower, small."""
    from functools import partial

    import torch
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import ConvStem

    stem = ConvStem(
        channels=(8, 8, 32),
        stride=(4, 2, 2),
        kernel_size=(4, 2, 2),
        padding=0,
        act_layer=torch.nn.GELU,
    )
    return VisionTransformer(
        img_size=32,
        patch_size=1,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=40,
        no_embed_class=True,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
    )


def apple(model: zoo.ClipZoo) -> State:
    """A MobileCLIP-B as Apple's own code names it."""
    import torch

    found: State = {"logit_scale": torch.tensor(4.5)}
    for name, tensor in hybrid_tower().state_dict().items():
        if name != "head.bias":
            found["image_encoder.model." + _apple_image(name)] = torch.rand_like(tensor.float())
    found["image_encoder.model.classifier.proj"] = torch.randn(32, 40)
    found["image_encoder.model.pos_embed.pos_embed.pos_embed"] = torch.randn(1, 1, 4, 32)
    for name, tensor in model.open_clip.items():
        if not name.startswith(("visual.", "logit_")):
            found["text_encoder." + _apple_text(name)] = tensor
    key = "text_encoder.positional_embedding.pos_embed.pos_embed"
    found[key] = found[key][None, None]
    return found


def _apple_block(name: str, layer: str) -> str:
    for theirs, ours in {
        "norm1": "pre_norm_mha.0",
        "ln_1": "pre_norm_mha.0",
        "norm2": "pre_norm_ffn.0",
        "ln_2": "pre_norm_ffn.0",
        "attn.qkv": "pre_norm_mha.1.qkv_proj",
        "attn.in_proj_": "pre_norm_mha.1.qkv_proj.",
        "attn.out_proj": "pre_norm_mha.1.out_proj",
        "attn.proj": "pre_norm_mha.1.out_proj",
        "mlp.fc1": "pre_norm_ffn.1",
        "mlp.c_fc": "pre_norm_ffn.1",
        "mlp.fc2": "pre_norm_ffn.4",
        "mlp.c_proj": "pre_norm_ffn.4",
    }.items():
        if name.startswith(theirs):
            return f"transformer.{layer}.{ours}{name.removeprefix(theirs)}"
    raise KeyError(name)


def _apple_image(name: str) -> str:
    first, _, rest = name.partition(".")
    if first == "blocks":
        layer, _, leaf = rest.partition(".")
        return _apple_block(leaf, layer)
    if first == "patch_embed":
        _, stage, kind, leaf = rest.split(".")
        return f"patch_emb.{stage}.block.{'norm' if kind == 'bn' else kind}.{leaf}"
    return {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed.pos_embed.pos_embed",
        "norm.weight": "post_transformer_norm.weight",
        "norm.bias": "post_transformer_norm.bias",
        "head.weight": "classifier.proj",
    }[name]


def _apple_text(name: str) -> str:
    if name.startswith("transformer.resblocks."):
        layer, _, leaf = name.removeprefix("transformer.resblocks.").partition(".")
        return _apple_block(leaf, layer)
    return {
        "token_embedding.weight": "embedding_layer.weight",
        "positional_embedding": "positional_embedding.pos_embed.pos_embed",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
        "text_projection": "projection_layer",
    }[name]


def test_mobileclip_becomes_what_open_clip_makes_of_it(model):
    from open_clip.convert import convert_mobile_clip_state_dict

    state = apple(model)
    assert sum(name.startswith("text_encoder.") for name in state) == 29
    tower = SimpleNamespace(visual=SimpleNamespace(trunk=hybrid_tower()))
    theirs = convert_mobile_clip_state_dict(tower, dict(state), fastvit=False)
    assert not theirs.pop("visual.trunk.head.bias").any()
    ours = carry(MOBILE, CUSTOM, state)
    assert_same_bits(ours, theirs)
    assert_same_bits(carry(CUSTOM, CUSTOM, ours), theirs)
    assert MOBILE.read_only
    assert MOBILE.lossy


def test_mobileclips_image_tower_has_no_place_in_other_layouts(model):
    atoms = read(MOBILE, apple(model)).atoms
    hybrid = {name for name in atoms if name.startswith("vision.")}
    for target in (OPEN_CLIP, HF, TIMM):
        assert hybrid <= {*assemble(atoms, target.table(), {}).unplaced}


def test_the_layout_is_found_by_its_keys(model):
    for state, wanted in (
        (timm_tower(model).state_dict(), "timm-clip"),
        (apple(model), "mobileclip"),
        (carry(MOBILE, CUSTOM, apple(model)), "open_clip-custom"),
    ):
        found = detect(state, "file")
        assert (found.layout.name, found.num_fit) == (wanted, len(state))
