"""The vision tower of a Flamingo: where it comes from, its activation, its tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flamingo_ckpt.errors import LoadError
from flamingo_ckpt.loading.places import Access
from flamingo_ckpt.loading.vision import load_vision_tower
from tests import zoo
from tests.hub_server import HubServer, serving
from tests.loading.flamingo_files import (
    named_clip,
    refused,
    save_open_clip,
)
from tests.zoo_flamingo import VISION_LAYERS


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(monkeypatch) as hub:
        yield hub


def tower(path: Any, pretrained: str | None = None, **options: Any) -> Any:
    return load_vision_tower(str(path), pretrained, Access(), **options)


def tokens_of(found: Any) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        tokens: torch.Tensor = found.module.double()(pixels.double())[1]
    return tokens


def expected_tokens(*, quick_gelu: bool = True) -> torch.Tensor:
    """Of transformers' CLIP: its last hidden state without the class token."""
    made = zoo.clip(layers=VISION_LAYERS, quick_gelu=quick_gelu)
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    vision = copy.deepcopy(made.hf_model).double().vision_model
    with torch.no_grad():
        tokens: torch.Tensor = vision(pixel_values=pixels.double()).last_hidden_state[:, 1:]
    return tokens


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-12, rtol=0)


def test_the_tokens_that_openflamingo_was_trained_on(tmp_path: Path) -> None:
    made = zoo.clip(layers=VISION_LAYERS)
    found = tower(save_open_clip(tmp_path, made.open_clip))
    assert close(tokens_of(found), expected_tokens())
    assert found.width == 64
    assert found.config["hidden_act"] == "quick_gelu"
    found.module.final_ln_after_pool = False  # what an open_clip of today does by itself
    assert (tokens_of(found) - expected_tokens()).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel", "hub form"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_folder_of_transformers(kind: str, quick_gelu: bool, tmp_path: Path) -> None:
    made = zoo.clip(layers=VISION_LAYERS, quick_gelu=quick_gelu)
    state = {
        "CLIPModel": made.hf,
        "CLIPVisionModel": made.hf_vision_flat,
        "hub form": made.hf_vision,
    }[kind]
    config = made.config if kind == "CLIPModel" else made.vision_config
    folder = zoo.save_folder(state, config, tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    found = tower(folder)
    assert close(tokens_of(found), expected_tokens(quick_gelu=quick_gelu))
    grey = found.image_processor(Image.new("RGB", (50, 40), (128, 128, 128)))
    wanted = 128 / 255 - torch.tensor([0.1, 0.2, 0.3])
    assert torch.allclose(grey[:, 0, 0], wanted)
    assert ("proj" in dict(found.module.named_parameters())) == (kind == "CLIPModel")


@pytest.mark.parametrize("layout", ["open_clip", "custom_text", "openai", "hf", "hf_vision"])
def test_a_name_and_a_file_of_any_layout(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = named_clip(monkeypatch) + "-quickgelu"
    made = zoo.clip(layers=VISION_LAYERS)
    path = zoo.save_torch(getattr(made, layout), tmp_path / "clip.pt")
    if layout == "hf_vision":  # without the projection, which the name promises
        with pytest.raises(LoadError, match="proj"):
            tower(name, str(path))
        return
    assert close(tokens_of(tower(name, str(path))), expected_tokens())


def test_a_file_does_not_say_its_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = named_clip(monkeypatch)
    path = str(zoo.save_torch(zoo.clip(layers=VISION_LAYERS).open_clip, tmp_path / "clip.pt"))
    found = tower(name, path)
    assert f"`{name}-quickgelu`" in caplog.text
    assert found.config["hidden_act"] == "gelu"
    assert not close(tokens_of(found), expected_tokens())
    caplog.clear()
    assert close(tokens_of(tower(name, path, force_quick_gelu=True)), expected_tokens())
    assert "quickgelu" not in caplog.text


@pytest.mark.parametrize("place", ["someone/clip/", "someone/clip/open_clip_model.safetensors"])
def test_a_tag_says_its_activation(
    place: str, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip since 2.29 builds `ViT-L-14` with `openai` wrongly, and warns."""
    tag = {"hf_hub": place, "quick_gelu": True, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    name = named_clip(monkeypatch, {"openai": tag})
    made = zoo.clip(layers=VISION_LAYERS)
    server.push_folder("someone/clip", save_open_clip(tmp_path / "clip", made.open_clip))
    access = Access(cache_dir=tmp_path / "cache")
    found = load_vision_tower(name, "openai", access)
    assert close(tokens_of(found), expected_tokens())
    assert found.image_processor(Image.new("RGB", (50, 40)))[0, 0, 0] == 0
    error = refused("FC452", load_vision_tower, name, "opanai", access)
    assert "`opanai` is neither a file nor a tag" in error.message
    assert "openai" in (error.hint or "")


def test_the_real_tag_of_the_releases() -> None:
    import open_clip

    tag = open_clip.get_pretrained_cfg("ViT-L-14", "openai")
    assert tag["quick_gelu"]
    assert tag["hf_hub"]


def test_no_weights_is_said_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = tower(named_clip(monkeypatch))
    assert "RANDOM weights" in caplog.text
    assert not any(one.is_meta for one in found.module.parameters())
    assert tokens_of(found).shape == (2, 16, 64)


def test_a_tower_with_a_tensor_too_few(tmp_path: Path) -> None:
    state = zoo.clip(layers=VISION_LAYERS).open_clip
    lost = "visual.transformer.resblocks.1.ln_2.bias"
    del state[lost]
    with pytest.raises(LoadError) as caught:
        tower(save_open_clip(tmp_path, state))
    assert "ln_2.bias" in str(caught.value.report.missing_keys)


def test_a_tower_with_a_layer_too_many(tmp_path: Path) -> None:
    """A deeper tower fills a shallower one without a gap, and is another tower."""
    with pytest.raises(LoadError) as caught:
        tower(save_open_clip(tmp_path, zoo.clip(layers=VISION_LAYERS + 1).open_clip))
    assert "resblocks.3" in str(caught.value.report.unexpected_keys)
    assert not [key for key in caught.value.report.unexpected_keys if "visual" not in key]


def test_towers_without_patch_tokens(tmp_path: Path) -> None:
    refused("FC451", tower, "RN50")
    refused("FC451", tower, "ViT-B-16-SigLIP")
    refused("FC451", tower, "coca_ViT-B-32")
    refused("FC450", tower, "ViT-Z-99")
    made = zoo.openflamingo("llama")
    refused("FC451", tower, zoo.save_folder(made.language, made.text_config, tmp_path))


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_repository_of_transformers_in_shards(
    prefix: str, server: HubServer, tmp_path: Path
) -> None:
    """Also of weights in pickles, which are read and never run; `owner/name` is enough."""
    made = zoo.clip(layers=VISION_LAYERS)
    names, weight_map = sorted(made.hf), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        zoo.save_torch({name: made.hf[name] for name in part}, tmp_path / "up" / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "up" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "up" / "config.json").write_text(json.dumps(made.config))
    server.push_folder("openai/clip-tiny", tmp_path / "up")
    access = Access(cache_dir=tmp_path / "cache")
    found = load_vision_tower(f"{prefix}openai/clip-tiny", None, access)
    assert close(tokens_of(found), expected_tokens())


def test_a_folder_with_the_name_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = zoo.clip(layers=VISION_LAYERS)
    zoo.save_folder(made.hf, made.config, tmp_path / "vit-b-32")
    monkeypatch.chdir(tmp_path)
    assert close(tokens_of(tower("vit-b-32")), expected_tokens())


def test_a_folder_with_other_weights(tmp_path: Path) -> None:
    """A file instead of the folder's own; a tag is no file."""
    folder = save_open_clip(tmp_path / "clip", zoo.clip(layers=VISION_LAYERS, seed=1).open_clip)
    path = zoo.save_torch(zoo.clip(layers=VISION_LAYERS).open_clip, tmp_path / "other.pt")
    assert not close(tokens_of(tower(folder)), expected_tokens())
    assert close(tokens_of(tower(f"local-dir:{folder}", str(path))), expected_tokens())
    refused("FC452", tower, folder, "openai")


def test_the_outer_width_of_a_projection_counts(tmp_path: Path) -> None:
    """Configs of transformers may have another in `vision_config`, which its class ignores."""
    made = zoo.clip(layers=VISION_LAYERS)
    vision = made.config["vision_config"] | {"projection_dim": 7}
    folder = zoo.save_folder(made.hf, made.config | {"vision_config": vision}, tmp_path)
    assert close(tokens_of(tower(folder)), expected_tokens())


def test_positions_of_another_size_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_open_clip(tmp_path)
    assert tower(folder).module.positional_embedding.shape[0] == 17
    assert "positions" not in caplog.text
    path = folder / "open_clip_config.json"
    path.write_text(path.read_text().replace('"image_size": 32', '"image_size": 64'))
    assert tower(folder).module.positional_embedding.shape[0] == 65
    assert "image positions resized from 4x4 to 8x8" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"resample": 1},
        {"do_normalize": False},
        {"do_center_crop": False},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0, 0.5]},
    ],
)
def test_a_preprocessor_that_is_not_clips(settings: Any, tmp_path: Path) -> None:
    """Pictures prepared in another way than the file says would be a silent loss."""
    made = zoo.clip(layers=VISION_LAYERS)
    folder = zoo.save_folder(made.hf, made.config, tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    refused("FC401", tower, folder)


@pytest.mark.parametrize(
    ("part", "value", "code"),
    [
        ("quick_gelu", "false", "FC401"),
        ("vision_cfg", {"no_such_field": 1}, "FC405"),
        ("preprocess_cfg", {"interpolation": "nicest"}, "FC401"),
        ("preprocess_cfg", {"mean": "grey"}, "FC401"),
    ],
)
def test_an_open_clip_config_with_a_field_of_no_use(
    part: str, value: Any, code: str, tmp_path: Path
) -> None:
    path = save_open_clip(tmp_path) / "open_clip_config.json"
    config = json.loads(path.read_text())
    inner = config if part == "preprocess_cfg" else config["model_cfg"]
    inner[part] = inner[part] | value if part == "vision_cfg" else value
    path.write_text(json.dumps(config))
    refused(code, tower, tmp_path)
