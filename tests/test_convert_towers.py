"""convert --to for CLIP and PaliGemma: what is written loads and computes the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flamingo_ckpt.formats import open_checkpoint
from tests import zoo
from tests.support import cli, cli_ok, facts_at, load_torch, names_in, torch_facts

# -- CLIP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> zoo.ClipZoo:
    return zoo.clip(layers=2)


def open_clip_config(folder: Path) -> Path:
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": zoo.open_clip_cfg(2)}))
    return path


def pixels_and_words() -> tuple[Any, Any]:
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.manual_seed(0))
    return pixels, torch.tensor([[1, 5, 7, 98, *[0] * 8], [4, 9, 2, 3, 97, *[0] * 7]])


@pytest.mark.parametrize("form", ["open_clip", "openai", "custom_text"])
def test_an_open_clip_becomes_a_folder_of_transformers(
    clip: zoo.ClipZoo, form: str, tmp_path: Path
) -> None:
    from transformers import CLIPModel

    src = zoo.save_torch(getattr(clip, form), tmp_path / "clip.pt")
    dst = tmp_path / "hf"
    config = open_clip_config(tmp_path)
    document = cli_ok("convert", src, dst, "--to", "hf-clip", "--config", config, "--json").document
    assert facts_at(dst) == torch_facts(clip.hf)
    assert document["summary"]["dropped"] == (3 if form == "openai" else 0)
    model, told = CLIPModel.from_pretrained(dst, output_loading_info=True, dtype=torch.float64)
    assert not any(told.values()), told
    pixels, words = pixels_and_words()
    ours = copy.deepcopy(clip.open_clip_model).double()
    with torch.no_grad():
        found = model.visual_projection(model.vision_model(pixels).pooler_output)
        assert (found - ours.encode_image(pixels)).abs().max() < 1e-12
        found = model.text_projection(model.text_model(words).pooler_output)
        assert (found - ours.encode_text(words)).abs().max() < 1e-12
    cli_ok("verify", src, dst)
    target = "open_clip-custom" if form == "custom_text" else "open_clip"
    cli_ok("convert", dst, tmp_path / "back.pt", "--to", target)
    wanted = clip.custom_text if form == "custom_text" else clip.open_clip
    assert facts_at(tmp_path / "back.pt") == torch_facts(wanted)


@pytest.mark.parametrize("custom", [False, True])
def test_a_folder_of_transformers_loads_in_open_clip(
    clip: zoo.ClipZoo, custom: bool, tmp_path: Path
) -> None:
    from open_clip.model import CLIP, CustomTextCLIP

    src = zoo.save_folder(clip.hf, clip.config, tmp_path / "hf")
    dst = tmp_path / "clip.pt"
    cli_ok("convert", src, dst, "--to", "open_clip-custom" if custom else "open_clip")
    model = (CustomTextCLIP if custom else CLIP)(**zoo.open_clip_cfg(2)).eval()
    model.load_state_dict(load_torch(dst), strict=True)
    model.double()
    theirs = copy.deepcopy(clip.hf_model).double()
    pixels, words = pixels_and_words()
    with torch.no_grad():
        wanted = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        assert (model.encode_image(pixels) - wanted).abs().max() < 1e-12
        wanted = theirs.text_projection(theirs.text_model(words).pooler_output)
        assert (model.encode_text(words) - wanted).abs().max() < 1e-12


def test_a_folder_needs_a_config_and_a_file_does_not(clip: zoo.ClipZoo, tmp_path: Path) -> None:
    src = zoo.save_torch(clip.open_clip, tmp_path / "clip.pt")
    outcome = cli("convert", src, tmp_path / "hf", "--to", "hf-clip", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC421"])
    assert names_in(tmp_path) == ["clip.pt"]
    cli_ok("convert", src, tmp_path / "hf.safetensors", "--to", "hf-clip")
    assert facts_at(tmp_path / "hf.safetensors") == torch_facts(clip.hf)


def test_a_config_of_another_size(clip: zoo.ClipZoo, tmp_path: Path) -> None:
    src = zoo.save_torch(clip.open_clip, tmp_path / "clip.pt")
    outcome = cli(
        *("convert", src, tmp_path / "hf", "--to", "hf-clip", "--config", "vit-b-32", "--json")
    )
    assert (outcome.code, outcome.codes) == (2, ["FC205"])
    assert names_in(tmp_path) == ["clip.pt"]


# -- PaliGemma -----------------------------------------------------------------------------------


def gemma_files(folder: Path, **options: Any) -> tuple[zoo.PaliGemmaZoo, Path, Path]:
    """(model, npz, config)"""
    model = zoo.paligemma(**options)
    config = folder / "config.json"
    config.write_text(json.dumps(model.config))
    return model, zoo.save_npz(model.npz(), folder / "model.npz"), config


def npz_layout(model: zoo.PaliGemmaZoo) -> str:
    return "paligemma-npz" if model.version == 1 else "paligemma2-npz"


@pytest.mark.parametrize("version", [1, 2])
def test_google_arrays_become_a_folder_of_transformers(version: int, tmp_path: Path) -> None:
    from transformers import PaliGemmaForConditionalGeneration

    model, src, config = gemma_files(tmp_path, version=version)
    dst = tmp_path / "hf"
    outcome = cli_ok("convert", src, dst, "--to", "paligemma", "--config", config, "--json")
    embed = "language_model.model.embed_tokens.weight"
    (padded,) = [f for f in outcome.document["findings"] if f["code"] == "FC418"]
    assert padded["key"] == embed
    assert padded["data"] == {"rows": 256, "source_rows": 192, "zero_rows": 64}
    assert facts_at(dst) == torch_facts(model.layout("L1"))
    loaded, told = PaliGemmaForConditionalGeneration.from_pretrained(dst, output_loading_info=True)
    assert not any(told.values()), told
    inputs = zoo.paligemma_inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    wanted = copy.deepcopy(model.model).double()
    with torch.no_grad():
        difference = loaded.eval().double()(**inputs).logits - wanted(**inputs).logits
    assert difference.abs().max() < 1e-9
    cli_ok("verify", src, dst, "--config", config)
    back = tmp_path / "back.npz"
    cli_ok("convert", dst, back, "--to", npz_layout(model))
    found, arrays = dict(np.load(back)), model.npz()
    assert sorted(found) == sorted(arrays)
    assert all(found[n].tobytes() == arrays[n].tobytes() for n in arrays)
    assert all(found[n].shape == arrays[n].shape for n in arrays)


@pytest.mark.parametrize("version", [1, 2])
def test_a_folder_there_and_back_through_arrays(version: int, tmp_path: Path) -> None:
    model = zoo.paligemma(version=version)
    src = zoo.save_folder(model.layout("L1"), model.config, tmp_path / "src")
    arrays, back = tmp_path / "out.npz", tmp_path / "back"
    cli_ok("convert", src, arrays, "--to", npz_layout(model))
    assert np.load(arrays)["params/llm/embedder/input_embedding"].shape[0] == 192
    cli_ok("verify", src, arrays)
    cli_ok("convert", arrays, back, "--to", "paligemma", "--config", src / "config.json")
    assert facts_at(back) == facts_at(src)
    # L1 as it stands has nothing to pad or cut
    cli_ok("convert", back, tmp_path / "same", "--to", "paligemma")
    assert facts_at(tmp_path / "same") == facts_at(src)


def test_padding_that_is_none_is_not_cut_off_without_a_word(tmp_path: Path) -> None:
    """The rows of the hub's files are not zero."""
    model = zoo.paligemma(padding="random")
    src = zoo.save_folder(model.layout("L1"), model.config, tmp_path / "src")
    dst = tmp_path / "out.npz"
    outcome = cli("convert", src, dst, "--to", "paligemma-npz", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC419"])
    assert "--vocab-rows" in outcome.document["findings"][0]["hint"]
    assert not dst.exists()
    outcome = cli_ok("convert", src, dst, "--to", "paligemma-npz", "--vocab-rows", "192", "--json")
    (cut,) = [f for f in outcome.document["findings"] if f["code"] == "FC418"]
    assert cut["severity"] == "warning"
    found = np.load(dst)["params/llm/embedder/input_embedding"]
    embed = model.layout("L1")["language_model.model.embed_tokens.weight"].numpy()
    assert found.tobytes() == embed[:192].tobytes()


@pytest.mark.parametrize("target", zoo.PALIGEMMA_LAYOUTS)
@pytest.mark.parametrize("source", ["L1", "L4"])
def test_any_spelling_becomes_any_other(source: str, target: str, tmp_path: Path) -> None:
    model = zoo.paligemma(tied=target == "L6")
    names = {"L1": "paligemma"} | {f"L{n}": f"paligemma-l{n}" for n in range(2, 7)}
    src = zoo.save_torch(model.layout(source), tmp_path / "src.pt")
    cli_ok("convert", src, tmp_path / "out.safetensors", "--to", names[target])
    wanted = model.l6_nested if target == "L6" else model.layout(target)
    assert facts_at(tmp_path / "out.safetensors") == torch_facts(wanted)
    cli_ok("convert", tmp_path / "out.safetensors", tmp_path / "back.pt", "--to", names[source])
    assert facts_at(tmp_path / "back.pt") == facts_at(src)


def test_adapters_are_left_out_and_listed(tmp_path: Path) -> None:
    model = zoo.paligemma()
    src = zoo.save_torch(model.peft(), tmp_path / "peft.pt")
    outcome = cli_ok("convert", src, tmp_path / "out.safetensors", "--to", "paligemma", "--json")
    assert facts_at(tmp_path / "out.safetensors") == torch_facts(model.layout("L1"))
    adapters = {name for name in model.peft() if "lora_" in name}
    told = {f["key"] for f in outcome.document["findings"] if f["code"] == "FC209"}
    assert adapters
    assert adapters == told


def test_heads_are_wanted_where_no_shape_tells_them(tmp_path: Path) -> None:
    model = zoo.paligemma()
    src = zoo.save_torch(model.layout("L1"), tmp_path / "src.pt")
    outcome = cli("convert", src, tmp_path / "out.npz", "--to", "paligemma-npz", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC415"])
    finding = outcome.document["findings"][0]
    assert "heads" in finding["detail"]
    assert "--config" in finding["hint"]
    assert names_in(tmp_path) == ["src.pt"]


def test_big_arrays_are_gathered_in_bounded_pieces(tmp_path: Path) -> None:
    """A stack of layers is written from tensors that lie apart, and no run is a copy of all."""
    model = zoo.paligemma()
    src = zoo.save_folder(model.layout("L1"), model.config, tmp_path / "src")
    cli_ok("convert", src, tmp_path / "out.npz", "--to", "paligemma-npz")
    name = "params/llm/layers/mlp/gating_einsum"
    tensor = open_checkpoint(str(tmp_path / "out.npz")).by_name()[name]
    state = model.layout("L1")
    assert tensor.shape == (4, 2, 40, 72)
    array = np.load(tmp_path / "out.npz")[name]
    for layer in range(4):
        for at, part in enumerate(("gate", "up")):
            weight = state[f"language_model.model.layers.{layer}.mlp.{part}_proj.weight"]
            assert np.array_equal(array[layer, at], weight.numpy().T)
