"""The tests' own models are what they claim to be, or nothing that is compared with them counts."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from tests import zoo
from tests.support import load_torch
from tests.zoo import assert_generic

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


# -- upstream's model --------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("era", ["now", "2023"])
def test_nothing_is_left_as_initialised(family: str, era: str) -> None:
    model = zoo.openflamingo(family, era=era)
    for state in (model.full, model.partial, model.clip, model.language):
        assert_generic(state)


@each_family
def test_upstream_runs_and_its_pictures_matter(family: str) -> None:
    import torch

    model = zoo.openflamingo(family)
    inputs = model.inputs()
    with torch.no_grad():
        logits = model.model(**inputs).logits
        other = model.model(**inputs | {"vision_x": inputs["vision_x"] + 1.0}).logits
    assert logits.shape == (2, 12, zoo.flamingo_rows(family))
    assert logits.isfinite().all()
    assert (logits - other).abs().max() > 1e-3


@each_family
def test_aliases_are_in_the_full_state_and_share_storage(family: str) -> None:
    model = zoo.openflamingo(family)
    path = zoo.FAMILIES[family][0]
    full = model.full
    for alias, child in (
        ("old_decoder_blocks", "decoder_layer"),
        ("gated_cross_attn_layers", "gated_cross_attn_layer"),
    ):
        names = [name for name in full if name.startswith(f"lang_encoder.{alias}.")]
        assert len({name.split(".")[2] for name in names}) == (4 if "old" in alias else 2)
        for name in names:
            _, _, layer, rest = name.split(".", 3)
            canonical = full[f"lang_encoder.{path}.{layer}.{child}.{rest}"]
            assert canonical.data_ptr() == full[name].data_ptr()
    # frozen: bit for bit the language model it was made of
    for name, tensor in model.language.items():
        if name.startswith(f"{path}."):
            _, layer, rest = name.rsplit(path, 1)[1].split(".", 2)
            assert full[f"lang_encoder.old_decoder_blocks.{layer}.{rest}"].equal(tensor)


@each_family
def test_the_partial_state_is_what_upstream_keeps(family: str) -> None:
    model = zoo.openflamingo(family, every_n=1, era="2023")
    partial = model.partial
    gated = [name for name in partial if ".gated_cross_attn_layer." in name]
    perceiver = [name for name in partial if name.startswith("perceiver.")]
    assert (len(perceiver), len(gated)) == (69, 4 * 11)
    rest = {"mpt1b": 1, "mpt7b": 1, "gptj": 1, "opt": 3, "llama": 1 + 4, "gpt_neox": 2 + 4 * 3}
    assert len(partial) - 69 - 44 == (rest | {"pythia": 2 + 4 * 3})[family]
    embedding = f"lang_encoder.{zoo.FAMILIES[family][1]}.weight"
    assert len(partial[embedding]) == zoo.flamingo_rows(family)
    assert len(model.language[embedding.removeprefix("lang_encoder.")]) == zoo.base_rows(family)


def test_large_indices_occur() -> None:
    model = zoo.openflamingo("mpt7b", layers=12, every_n=4, perceiver_depth=12)
    assert model.gated_layers == [3, 7, 11]
    assert "perceiver.layers.11.1.3.weight" in model.partial
    assert (
        "lang_encoder.transformer.blocks.11.gated_cross_attn_layer.ff_gate"
        in zoo.hf_flamingo("mpt7b", layers=12, every_n=4, perceiver_depth=12).state
    )
    assert model.config["perceiver_depth"] == 12


def test_seeds_differ_and_repeat() -> None:
    import torch

    before = torch.random.get_rng_state()
    first, second = (zoo.openflamingo("llama", seed=seed).partial for seed in (0, 1))
    assert first.keys() == second.keys()
    assert not any(first[name].equal(second[name]) for name in first)
    assert torch.random.get_rng_state().equal(before)


def test_mosaic_gpt_looks_back_and_not_ahead() -> None:
    import torch

    model = zoo.openflamingo("mpt1b", every_n=4).model
    inputs = zoo.openflamingo("mpt1b").inputs()
    changed = inputs["lang_x"].clone()
    changed[:, 8] = 5
    with torch.no_grad():
        difference = model(**inputs).logits - model(**inputs | {"lang_x": changed}).logits
    moved = difference.abs().amax((0, 2))
    assert (moved[:8] == 0).all()
    assert (moved[8:] > 0).all()


# -- the other layouts of it -------------------------------------------------------------------


def test_v1_keeps_one_alias_and_the_buffers() -> None:
    state = zoo.openflamingo_v1(layers=4, every_n=2)
    assert_generic(state)
    assert len(state) == 69 + 1 + 22 * 2 + 4 + 2
    assert not any("old_decoder_blocks" in name for name in state)
    assert not any("lm_head" in name for name in state)
    alias = state["lang_encoder.gated_cross_attn_layers.1.attn_gate"]
    canonical = state["lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate"]
    assert alias.data_ptr() == canonical.data_ptr()


@each_family
@pytest.mark.parametrize("whole", [False, True])
def test_vlm(family: str, whole: bool) -> None:
    state = zoo.vlm(family, whole=whole)
    assert_generic(state)
    assert not any(re.match(r"perceiver|lang_encoder", name) for name in state)
    rows = state[f"lang_model.{zoo.FAMILIES[family][1]}.additional_embedding.weight"]
    source = zoo.openflamingo(family).partial[f"lang_encoder.{zoo.FAMILIES[family][1]}.weight"]
    assert rows.equal(source[93:95])
    assert whole == any("vision_encoder" in name for name in state)


@each_family
def test_hf_vision_tower_computes_what_upstream_computes(family: str) -> None:
    import torch

    zoo.prepare()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    hf = zoo.hf_flamingo(family)
    assert_generic(hf.state)
    tower = CLIPVisionModel(CLIPVisionConfig(**hf.config["vision_config"])).eval().double()
    prefix = "vision_encoder.vision_model."
    tower.load_state_dict(
        {n.removeprefix(prefix): t for n, t in hf.state.items() if n.startswith(prefix)}
    )
    visual = copy.deepcopy(hf.source.model.vision_encoder).double()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        tokens, expected = tower(pixels).last_hidden_state[:, 1:], visual(pixels)[1]
    assert (tokens - expected).abs().max() < 1e-12


def test_hf_options() -> None:
    plain = zoo.hf_flamingo("llama")
    otter = zoo.hf_flamingo(
        "llama", model_type="otter", position_ids=True, module_prefix=True, extra_rows=1
    )
    name = "module.vision_encoder.vision_model.embeddings.position_ids"
    assert otter.state.keys() - {name} == {f"module.{name}" for name in plain.state}
    assert otter.config["text_config"]["vocab_size"] == 97
    assert len(otter.state["module.lang_encoder.lm_head.weight"]) == 97
    flat = zoo.hf_flamingo("opt", flat_vision=True, extra_rows=2).state
    assert "vision_encoder.pre_layrnorm.weight" in flat
    tied = ("lang_encoder.lm_head.weight", "lang_encoder.model.decoder.embed_tokens.weight")
    assert len({flat[name].data_ptr() for name in tied}) == 1


def test_released_names_of_gpt_neox() -> None:
    model = zoo.openflamingo("gpt_neox", era="2023")
    assert "lang_encoder.embed_out.weight" in model.partial
    assert "embed_out.weight" in model.language
    assert not any(
        "lm_head" in name for name in model.full | zoo.hf_flamingo("gpt_neox", era="2023").state
    )


# -- CLIP and SigLIP ---------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_is_the_same_in_both_libraries(quick_gelu: bool) -> None:
    import torch

    clip = zoo.clip(quick_gelu=quick_gelu)
    assert_generic(clip.open_clip)
    ours = [copy.deepcopy(model).double() for model in (clip.open_clip_model, clip.custom_model)]
    theirs = copy.deepcopy(clip.hf_model).double()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    words = torch.randint(1, 90, (2, 12))
    words[:, -1] = 98  # pooled at the highest token
    vision = theirs.vision_model(pixels)
    text = theirs.text_projection(theirs.text_model(words).pooler_output)
    for model in ours:
        model.visual.output_tokens = True
        pooled, tokens = model.visual(pixels)
        expected = theirs.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
        assert (tokens - expected).abs().max() < 1e-12
        image = theirs.visual_projection(vision.pooler_output)
        assert (pooled - image).abs().max() < 1e-12
        assert (model.encode_text(words) - text).abs().max() < 1e-12


def test_clip_layouts() -> None:
    clip = zoo.clip(layers=12)
    assert len(clip.open_clip) == len(clip.custom_text) == len(clip.openai) - 3 == 24 * 12 + 14
    assert len(clip.hf) == 32 * 12 + 14
    assert len(clip.hf_vision) == len(clip.hf_vision_flat) == 16 * 12 + 7
    assert clip.hf_vision_projection.keys() - clip.hf_vision.keys() == {"visual_projection.weight"}
    assert "text.transformer.resblocks.11.ln_1.weight" in clip.custom_text


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("prefix", ["params/", ""])
@pytest.mark.parametrize("layers", [4, 12])
def test_open_clip_reads_the_big_vision_arrays(
    tmp_path: Path, layers: int, prefix: str, stacked: bool
) -> None:
    import torch
    from open_clip.convert import load_big_vision_weights

    siglip = zoo.siglip(layers=layers)
    assert_generic(siglip.state)
    arrays = siglip.npz(stacked=stacked, prefix=prefix)
    assert all(array.flags.c_contiguous for array in arrays.values())
    path = zoo.save_npz(arrays, tmp_path / "siglip.npz")
    model = copy.deepcopy(siglip.model)
    for parameter in model.parameters():
        parameter.zero_()
    load_big_vision_weights(model, str(path))
    loaded = model.state_dict()
    assert loaded.keys() == siglip.state.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in siglip.state.items())
    assert siglip.model.encode_image(torch.randn(1, 3, 32, 32)).shape == (1, 64)


# -- related code ------------------------------------------------------------------------------


def test_related_layouts() -> None:
    for make in (zoo.flamingo_mini, zoo.lucidrains, zoo.idefics):
        assert_generic(make(layers=12, depth=11))
    assert "flamingo.lm.h.10.xattn_block.alpha_ffw" in zoo.flamingo_mini(layers=12)
    assert "perceiver_resampler.layers.10.1.3.weight" in zoo.lucidrains(depth=11)


def test_idefics_names_are_those_of_transformers() -> None:
    zoo.prepare()
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    resampler = {"use_resampler": True, "resampler_n_latents": 6, "resampler_depth": 3}
    resampler |= {"resampler_n_heads": 4, "resampler_head_dim": 8, "qk_layer_norms_perceiver": True}
    vision = {"embed_dim": 24, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
    config = IdeficsConfig(
        vocab_size=30,
        additional_vocab_size=2,
        hidden_size=20,
        intermediate_size=60,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config=vision | {"num_attention_heads": 4, "intermediate_size": 30},
        perceiver_config=resampler,
    )
    states = (IdeficsForVisionText2Text(config).state_dict(), zoo.idefics())
    theirs, ours = (
        {n: t.shape for n, t in state.items() if not n.startswith("model.vision_model.")}
        for state in states
    )
    assert ours == theirs


def test_files(tmp_path: Path) -> None:
    partial = zoo.openflamingo("opt").partial
    path = zoo.save_torch(
        partial, tmp_path / "run" / "checkpoint.pt", wrapper="model_state_dict", prefix="module."
    )
    loaded = load_torch(path)["model_state_dict"]
    assert loaded.keys() == {f"module.{name}" for name in partial}
    tied = ("lm_head", "model.decoder.embed_tokens")
    pointers = {loaded[f"module.lang_encoder.{name}.weight"].data_ptr() for name in tied}
    assert len(pointers) == 1
