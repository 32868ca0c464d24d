"""Any naming of a model into a module with any other: the same bits as upstream's own module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.errors import LoadError
from flamingo_ckpt.loading import LoadOptions, load_into
from tests import zoo
from tests.loading.engine_support import assert_same, bits, on_meta, saved, scrambled

_CLIP: dict[str, Callable[[], Any]] = {
    "open_clip": lambda: zoo.clip().open_clip,
    "openai": lambda: zoo.clip().openai,
    "custom": lambda: zoo.clip().custom_text,
    "hf": lambda: zoo.clip().hf,
    "module.": lambda: {"module." + name: t for name, t in zoo.clip().hf.items()},
}
_CLIP_MODULES: dict[str, Callable[[], Any]] = {
    "CLIP": lambda: zoo.clip().open_clip_model,
    "CustomTextCLIP": lambda: zoo.clip().custom_model,
    "CLIPModel": lambda: zoo.clip().hf_model,
}


@pytest.mark.parametrize("source", _CLIP)
@pytest.mark.parametrize("module", _CLIP_MODULES)
def test_clip_in_every_naming_fills_clip_of_every_kind(
    source: str, module: str, tmp_path: Path
) -> None:
    reference = _CLIP_MODULES[module]()
    path = saved(_CLIP[source](), tmp_path)
    for model in (scrambled(reference), on_meta(reference)):
        report = load_into(model, str(path))
        assert_same(model, reference)
        assert report.missing_keys == report.unexpected_keys == ()


@pytest.mark.parametrize("source", ["hf_vision", "hf_vision_flat", "visual"])
def test_an_image_tower_in_every_naming_fills_towers(source: str, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    clip = zoo.clip()
    state = (
        dict(clip.open_clip_model.visual.state_dict())
        if source == "visual"
        else getattr(clip, source)
    )
    path = saved(state, tmp_path, ".safetensors")
    reference = CLIPVisionModel(clip.hf_model.config.vision_config).eval()
    reference.load_state_dict(clip.hf_vision_flat)
    model = scrambled(reference)
    load_into(model, path)
    assert_same(model, reference)
    visual = scrambled(clip.open_clip_model.visual)
    if source == "visual":
        load_into(visual, path)
        assert_same(visual, clip.open_clip_model.visual)
    else:
        with pytest.raises(LoadError, match="1 missing from the file:\n    proj"):
            load_into(visual, path)


def test_a_bare_tower_finds_its_place_in_a_whole_clip(tmp_path: Path) -> None:
    clip = zoo.clip()
    path = saved(dict(clip.open_clip_model.visual.state_dict()), tmp_path)
    model = scrambled(clip.open_clip_model)
    before = bits(model)
    report = load_into(model, path, LoadOptions(policy="lenient"))
    after, wanted = bits(model), bits(clip.open_clip_model)
    assert report.unexpected_keys == ()
    assert {name for name in after if after[name] == wanted[name]} >= {
        name for name in after if name.startswith("visual.")
    }
    missing = {name for name in after if not name.startswith("visual.")}
    assert set(report.missing_keys) == missing
    assert all(after[name] == before[name] for name in missing)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_big_vision_siglip_fills_open_clip(stacked: bool, prefix: str, tmp_path: Path) -> None:
    siglip = zoo.siglip()
    path = saved(siglip.npz(stacked=stacked, prefix=prefix), tmp_path, ".npz")
    for model in (scrambled(siglip.model), on_meta(siglip.model)):
        load_into(model, path)
        assert_same(model, siglip.model)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["L1", "L2", "L3", "L4", "L5", "L6"])
def test_paligemma_in_every_naming_fills_transformers_model(
    version: int, tied: bool, layout: str, tmp_path: Path
) -> None:
    pali = zoo.paligemma(version=version, tied=tied)
    path = saved(pali.layout(layout), tmp_path, ".safetensors")
    for model in (scrambled(pali.model), on_meta(pali.model)):
        if layout == "L6" and not tied:
            with pytest.raises(LoadError, match="lm_head"):
                load_into(model, path)
            continue
        load_into(model, path)
        assert_same(model, pali.model)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("era", ["now", "2023"])
def test_a_whole_flamingo_fills_upstreams_module(family: str, era: str, tmp_path: Path) -> None:
    flamingo = zoo.openflamingo(family, era=era)
    path = saved(flamingo.full, tmp_path)
    model = scrambled(flamingo.model)
    load_into(model, path)
    assert_same(model, flamingo.model)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_hugging_face_port_fills_upstreams_module(family: str, tmp_path: Path) -> None:
    flamingo = zoo.openflamingo(family)
    path = saved(zoo.hf_flamingo(family).state, tmp_path)
    model = scrambled(flamingo.model)
    # CLIP's projection, which no Flamingo uses, is in no file of that layout
    report = load_into(model, path, LoadOptions(may_miss=frozenset({"vision_encoder.proj"})))
    model.vision_encoder.proj.data.copy_(flamingo.model.vision_encoder.proj)
    assert_same(model, flamingo.model)
    assert report.layout == "hf-flamingo"


def test_the_language_models_head_under_both_of_its_names(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("pythia", era="2023")
    assert "embed_out.weight" in flamingo.language
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**flamingo.text_config)
    model = AutoModelForCausalLM.from_config(config)
    assert "lm_head.weight" in model.state_dict()
    load_into(model, saved(flamingo.language, tmp_path))
    import torch

    assert torch.equal(model.lm_head.weight, flamingo.language["embed_out.weight"])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_big_visions_paligemma_fills_transformers_model(
    version: int, prefix: str, tmp_path: Path
) -> None:
    """Its vocabulary ends with the last token; the rows that transformers adds are zero."""
    pali = zoo.paligemma(version=version)
    arrays = pali.npz(prefix=prefix)
    path = saved(arrays, tmp_path, ".npz")
    for model in (scrambled(pali.model), on_meta(pali.model)):
        report = load_into(model, path)
        assert_same(model, pali.model)
        assert list(report.zero_filled.values()) == ["rows 192 to 255, which are padding"]
    name = f"{prefix}llm/embedder/input_embedding"
    arrays[name] = arrays[name][:-70]
    with pytest.raises(LoadError, match="in the file"):
        load_into(scrambled(pali.model), saved(arrays, tmp_path, ".npz"))
