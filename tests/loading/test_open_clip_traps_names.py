"""Names and scalars that open_clip's `load_checkpoint` trips over, and what ours does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import zoo
from tests.loading.open_clip_support import (
    LAYERS,
    assert_filled,
    assert_ours_fills,
    clip_model,
    ours,
    refusal,
    state_of,
    timm_clip,
    upstream_load,
)
from tests.zoo_lms import State


@pytest.fixture(scope="module")
def state() -> State:
    return state_of(clip_model(seed=1))


def saved(state: State, tmp_path: Path, name: str = "a.pt") -> Path:
    return zoo.save_torch(state, tmp_path / name)


# --- logit_scale and logit_bias --------------------------------------------------------------


def test_logit_bias_in_the_file_alone(state: State, tmp_path: Path) -> None:
    path = saved(state | {"logit_bias": torch.tensor(-9.5)}, tmp_path)
    for strict in (True, False):
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'ndim'"):
            upstream_load(clip_model(), path, strict=strict)
    model = clip_model(seed=99)
    with refusal(model, "logit_bias", "unexpected") as caught:
        ours(model, path)
    assert isinstance(caught.value, RuntimeError)
    assert ours(model, path, strict=False) == ([], ["logit_bias"])
    assert_filled(model, state)


def test_logit_bias_in_the_model_alone(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    model = clip_model(init_logit_bias=-10.0)
    before = model.logit_bias.clone()
    assert before != 0
    upstream_load(model, path)
    # the logits stay those of the source, and nobody is told
    assert model.logit_bias == 0
    for strict in (True, False):
        model = clip_model(init_logit_bias=-10.0, seed=99)
        result = ours(model, path, strict=strict)
        assert result == ([], [])
        assert_filled(model, state | {"logit_bias": torch.tensor(0.0)})
        assert list(result.report.zero_filled) == ["logit_bias"]
        told = [one for one in result.report.findings if one.code == "FC435"]
        assert "logit_bias" in told[0].detail


def test_no_logit_scale(state: State, tmp_path: Path) -> None:
    path = saved({n: t for n, t in state.items() if n != "logit_scale"}, tmp_path)
    for strict in (True, False):
        with pytest.raises(KeyError, match="logit_scale"):
            upstream_load(clip_model(init_logit_bias=-10.0), path, strict=strict)
    model = clip_model(init_logit_bias=-10.0, seed=99)
    with refusal(model, "logit_scale", "logit_bias"):
        ours(model, path)
    result = ours(model, path, strict=False)
    assert set(result.missing_keys) == {"logit_scale", "logit_bias"}
    assert result.unexpected_keys == []


@pytest.mark.parametrize(("file_1d", "model_1d"), [(True, False), (False, True), (True, True)])
def test_scalars_of_no_and_of_one_axis(file_1d: bool, model_1d: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"init_logit_bias": -10.0}
    source = clip_model(seed=1, nonscalar_logit_scale=file_1d, **options)
    path = saved(source.state_dict(), tmp_path)
    wanted = {
        name: tensor.reshape([1] if model_1d else []) if name.startswith("logit_") else tensor
        for name, tensor in state_of(source).items()
    }
    for load in (upstream_load, ours):
        model = clip_model(seed=99, nonscalar_logit_scale=model_1d, **options)
        assert load(model, path) == ([], [])
        assert_filled(model, wanted)


# --- Hugging Face's names --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_names_of_transformers(kind: str, suffix: str, tmp_path: Path) -> None:
    clip = zoo.clip(layers=LAYERS)
    save = zoo.save_torch if suffix == "bin" else zoo.save_safetensors
    path = save(clip.hf, tmp_path / f"model.{suffix}")
    if kind == "CLIP":
        with pytest.raises(RuntimeError, match="Missing key"):
            upstream_load(clip_model(), path)
        found = upstream_load(clip_model(), path, strict=False)
        assert len(found.missing_keys) == len(clip.open_clip) - 1  # only logit_scale is loaded
    wanted = clip.open_clip if kind == "CLIP" else clip.custom_text
    for strict in (True, False):
        model = clip_model(kind=kind, seed=99)
        assert_ours_fills(path, wanted, model=model, strict=strict)


def test_names_of_open_clip_into_transformers(tmp_path: Path) -> None:
    from transformers import CLIPModel

    clip = zoo.clip(layers=LAYERS)
    for state in (clip.open_clip, clip.custom_text, clip.openai):
        model = CLIPModel(clip.hf_model.config)
        assert_ours_fills(saved(state, tmp_path), clip.hf, model=model)


def test_positions_buffers_of_old_transformers(tmp_path: Path) -> None:
    from transformers import CLIPModel

    clip = zoo.clip(layers=LAYERS)
    extra = {
        "text_model.embeddings.position_ids": torch.arange(12)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    path = saved(clip.hf | extra, tmp_path)
    model = CLIPModel(clip.hf_model.config)
    with pytest.raises(RuntimeError, match="position_ids"):
        model.load_state_dict(torch.load(path))
    assert_ours_fills(path, clip.hf, model=model)
    assert_ours_fills(path, clip.open_clip)


def test_position_ids_of_a_text_tower_of_transformers(tmp_path: Path) -> None:
    model = hf_text_clip(seed=1)
    wanted = state_of(model)
    name = "text.transformer.embeddings.position_ids"
    path = saved(wanted | {name: torch.arange(16)[None]}, tmp_path)
    assert upstream_load(hf_text_clip(), path) == ([], [])
    assert_ours_fills(path, wanted, model=hf_text_clip(seed=99))


def hf_text_clip(*, seed: int = 0) -> Any:
    """`CustomTextCLIP` with a BERT of transformers as its text tower."""
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    from tests.zoo_clip import EMBED_DIM
    from tests.zoo_lms import randomise, seeded

    config = BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = clip_model(kind="CustomTextCLIP", seed=seed)
    with seeded(seed):
        model.text = HFTextEncoder("", EMBED_DIM, config=config, proj_type="linear")
        randomise(model.text)
    return model.eval().requires_grad_(False)


def test_text_positions_into_a_model_without(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
        upstream_load(hf_text_clip(), path)
    model = hf_text_clip(seed=99)
    before = state_of(model)
    for strict in (True, False):
        # a model that keeps all of its random text tower is no loaded model
        with refusal(model, "positional_embedding", "text.transformer.") as caught:
            ours(model, path, strict=strict)
        assert isinstance(caught.value, RuntimeError)
    result = ours(model, path, strict=False, include=("visual.*", "logit_scale"))
    assert all(key.startswith("text.") for key in result.missing_keys)
    assert result.unexpected_keys == []
    vision = {n: t for n, t in state.items() if n.startswith("visual.") or n == "logit_scale"}
    assert_filled(model, before | vision)


def test_text_positions_into_a_model_without_a_text_tower(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    model = clip_model(kind="CustomTextCLIP", seed=99)
    model.text = nn.Identity()
    for strict in (True, False):
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
            upstream_load(model, path, strict=strict)
    with refusal(model, "positional_embedding", "unexpected"):
        ours(model, path)
    result = ours(model, path, strict=False)
    assert result.missing_keys == []
    text = {n for n in state if not n.startswith(("visual.", "logit_"))}
    assert set(result.unexpected_keys) == text
    assert_filled(model, {n: t for n, t in state.items() if n not in text})


# --- towers ----------------------------------------------------------------------------------


def test_a_bare_vision_tower(tmp_path: Path) -> None:
    state = state_of(clip_model(text_width=64, seed=1))
    tower = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    path = saved(tower, tmp_path)
    with pytest.raises(AssertionError, match="text pos_embed width changed!"):
        upstream_load(clip_model(), path, strict=False)
    model = clip_model(text_width=64)
    before = state_of(model)
    found = upstream_load(model, path, strict=False)
    # nothing of the picture's side arrives; its positions, shortened, are the text's now
    assert {"conv1.weight", "class_embedding"} <= set(found.unexpected_keys)
    visual = {name for name in before if name.startswith("visual.")}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in visual)
    assert not torch.equal(model.positional_embedding, before["positional_embedding"])

    model = clip_model(text_width=64, seed=99)
    before = state_of(model)
    with refusal(model, "missing"):
        ours(model, path)
    result = ours(model, path, strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == before.keys() - visual
    assert_filled(model, before | {name: state[name] for name in visual})
    assert_ours_fills(path, tower, model=clip_model(seed=99).visual)


@pytest.mark.parametrize("flat", [False, True])
def test_a_vision_tower_of_transformers(flat: bool, tmp_path: Path) -> None:
    clip = zoo.clip(layers=LAYERS)
    path = saved(clip.hf_vision_flat if flat else clip.hf_vision, tmp_path)
    model = clip_model(seed=99)
    assert len(upstream_load(model, path, strict=False).unexpected_keys) > 30
    before = state_of(model)
    result = ours(model, path, strict=False)
    loaded = before.keys() - set(result.missing_keys)
    assert loaded == {n for n in before if n.startswith("visual.")} - {"visual.proj"}
    assert_filled(model, before | {name: clip.open_clip[name] for name in loaded})


def test_flat_and_prefixed_towers_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    clip = zoo.clip(layers=LAYERS)
    fresh = CLIPVisionModel(clip.hf_model.config.vision_config)
    wanted = state_of(fresh).keys()
    assert wanted == clip.hf_vision_flat.keys()
    for state in (clip.hf_vision, clip.hf_vision_flat, clip.hf_vision_projection, clip.hf):
        path = saved(state, tmp_path)
        model = CLIPVisionModel(clip.hf_model.config.vision_config)
        if state is not clip.hf_vision_flat and "embeddings.class_embedding" not in state:
            # by torch alone nothing fits, and only the result says so
            found = model.load_state_dict(torch.load(path), strict=False)
            assert set(found.missing_keys) == wanted
        ours(model, path, strict=state.keys() <= clip.hf_vision.keys() | wanted)
        assert_filled(model, clip.hf_vision_flat)


def test_a_trunk_of_timm_by_itself(tmp_path: Path) -> None:
    source = timm_clip(seed=1)
    wanted = state_of(source.visual.trunk)
    path = saved(wanted, tmp_path)
    found = upstream_load(timm_clip(), path, strict=False)
    assert len(found.unexpected_keys) == len(wanted)
    assert_ours_fills(path, wanted, model=timm_clip(seed=99).visual.trunk)


# --- flat and nested text --------------------------------------------------------------------


def test_flat_text_into_a_nested_tower_and_back(state: State, tmp_path: Path) -> None:
    flat = saved(state, tmp_path)
    custom = clip_model(kind="CustomTextCLIP", seed=5)
    assert upstream_load(custom, flat) == ([], [])
    nested_state = state_of(custom)
    assert_ours_fills(flat, nested_state, model=clip_model(kind="CustomTextCLIP", seed=99))

    nested = saved(nested_state, tmp_path, "nested.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        upstream_load(clip_model(), nested)
    assert_ours_fills(nested, state)


def test_flat_text_without_its_projection(state: State, tmp_path: Path) -> None:
    flat = saved({n: t for n, t in state.items() if n != "text_projection"}, tmp_path)
    custom = clip_model(kind="CustomTextCLIP")
    found = upstream_load(custom, flat, strict=False)
    assert len(found.missing_keys) > 20  # the projection's name decides over all text
    model = clip_model(kind="CustomTextCLIP", seed=99)
    assert ours(model, flat, strict=False) == (["text.text_projection"], [])


def test_names_that_begin_like_the_text_tower(state: State, tmp_path: Path) -> None:
    path = saved(state | {"transformer_extra.x": torch.randn(3)}, tmp_path)
    found = upstream_load(clip_model(kind="CustomTextCLIP"), path, strict=False)
    assert found.unexpected_keys == ["text.transformer_extra.x"]  # no such key in the file
    model = clip_model(kind="CustomTextCLIP", seed=99)
    with refusal(model, "transformer_extra.x"):
        ours(model, path)
    assert ours(model, path, strict=False) == ([], ["transformer_extra.x"])


# --- dtypes and shapes -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_files_are_cast_and_counted(
    dtype: torch.dtype, state: State, tmp_path: Path
) -> None:
    from flamingo_ckpt.loading import load_into

    path = saved({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path)
    wanted = {name: tensor.to(dtype).float() for name, tensor in state.items()}
    model = clip_model()
    upstream_load(model, path)
    assert_filled(model, wanted)
    assert_ours_fills(path, wanted)
    assert load_into(clip_model(), path).cast.keys() == state.keys()


def test_another_patch_size(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for visual\.conv1\.weight"):
            upstream_load(clip_model(patch=16), path, strict=strict)
        model = clip_model(patch=16, seed=99)
        with refusal(model, "visual.conv1.weight", "64x3x8x8", "64x3x16x16"):
            ours(model, path, strict=strict)
