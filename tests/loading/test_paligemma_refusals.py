"""Folders that `load_hf_model` refuses, and what other loaders make of them without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo_ckpt.errors import CkptError, LoadError
from flamingo_ckpt.loading.paligemma import load_hf_model
from tests.loading.folders import write_config, write_folder, write_tokenizer, write_weights
from tests.loading.from_scratch import careless_load
from tests.loading.paligemma_support import from_pretrained, loads, refused
from tests.zoo_clip import clip
from tests.zoo_paligemma import LAYOUTS, PaliGemmaZoo, paligemma

LAYERS = 2
HEAD, EMBED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
LAYER = "language_model.model.layers.1."


@pytest.fixture(scope="module")
def zoo() -> PaliGemmaZoo:
    return paligemma(layers=LAYERS)


@pytest.fixture(scope="module")
def untied() -> PaliGemmaZoo:
    return paligemma(layers=LAYERS, tied=False)


# --- a: a layout that the loader does not know is swallowed --------------------------------------


@pytest.mark.parametrize("name", [one for one in LAYOUTS if one != "L1"])
def test_other_layouts_leave_a_careless_loader_random(
    tmp_path: Path, zoo: PaliGemmaZoo, name: str
) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout(name))
    careless = careless_load(tmp_path).state_dict()
    tower = [key for key in zoo.layout("L1") if key.endswith("self_attn.q_proj.weight")]
    assert any(not torch.equal(careless[key], zoo.layout("L1")[key]) for key in tower)
    loads(tmp_path, zoo)


def test_a_missing_layer(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    state = {k: v for k, v in zoo.layout("L1").items() if not k.startswith(LAYER)}
    write_folder(tmp_path, zoo.config, state)
    careless_load(tmp_path)
    _, info = from_pretrained(tmp_path)
    assert len(info["missing_keys"]) == 9, "and a model with random weights beside them"
    error = refused(tmp_path)
    assert isinstance(error, LoadError)
    assert len(error.report.missing_keys) == 9
    assert all(".language_model.layers.1." in key for key in error.report.missing_keys)
    assert "missing from the file" in str(error.report)


def test_a_file_without_the_vision_tower(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    state = {k: v for k, v in zoo.layout("L1").items() if not k.startswith("vision_tower.")}
    write_folder(tmp_path, zoo.config, state)
    error = refused(tmp_path)
    assert isinstance(error, LoadError)
    assert {key.split(".")[1] for key in error.report.missing_keys} == {"vision_tower"}


def test_a_key_of_nothing(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1") | {"value_head.weight": torch.zeros(3)})
    careless_load(tmp_path)
    _, info = from_pretrained(tmp_path)
    assert info["unexpected_keys"] == {"value_head.weight"}
    assert "value_head.weight" in str(refused(tmp_path))


def test_more_layers_than_the_config(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    text = zoo.config["text_config"] | {"num_hidden_layers": 1}
    write_folder(tmp_path, zoo.config | {"text_config": text}, zoo.layout("L1"))
    error = refused(tmp_path)
    assert isinstance(error, LoadError)
    assert len(error.report.unexpected_keys) == 9


def test_another_width(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    text = zoo.config["text_config"] | {"intermediate_size": 80}
    write_folder(tmp_path, zoo.config | {"text_config": text}, zoo.layout("L1"))
    error = refused(tmp_path)
    assert isinstance(error, LoadError)
    shapes = {(file, model) for file, model in error.report.mismatched.values()}
    assert shapes == {((72, 40), (80, 40)), ((40, 72), (40, 80))}


def test_the_other_generation(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    second = paligemma(version=2, layers=LAYERS)
    write_folder(tmp_path, zoo.config, second.layout("L1"))
    assert isinstance(refused(tmp_path), CkptError)
    write_config(tmp_path, second.config)
    loads(tmp_path, second)


# --- b, c, h, i: the config (test_paligemma_config.py has the spellings) --------------------------


def test_configs_of_version_5_load(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    text = dict(zoo.config["text_config"])
    assert text["pad_token_id"] == 0
    assert text["rope_parameters"]["rope_theta"] == 10000.0
    write_folder(tmp_path, zoo.config, zoo.layout("L1"))
    loads(tmp_path, zoo)
    # the same as version 4 wrote it
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    pad = text.pop("pad_token_id")
    config = {k: v for k, v in zoo.config.items() if k != "dtype"}
    write_config(
        tmp_path, config | {"text_config": text, "torch_dtype": "float32", "pad_token_id": pad}
    )
    loads(tmp_path, zoo)


def test_pictures_of_another_size(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    """Never resized here: the config is wrong, or the file."""
    vision = zoo.config["vision_config"] | {"image_size": 64, "num_image_tokens": 64}
    text = zoo.config["text_config"] | {"num_image_tokens": 64}
    config = zoo.config | {"vision_config": vision, "text_config": text}
    error = refused(write_folder(tmp_path, config, zoo.layout("L1")))
    assert error.code == "FC205"
    assert "16 positions" in error.message
    assert "have 64" in error.message
    assert '"image_size": 32' in (error.hint or "")


def test_a_trimmed_config_finds_its_size(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    vision = {k: v for k, v in zoo.config["vision_config"].items() if k != "image_size"}
    config = zoo.config | {"vision_config": vision | {"num_image_tokens": 16}}
    loads(write_folder(tmp_path, config, zoo.layout("L1")), zoo)
    text = {k: v for k, v in zoo.config["text_config"].items() if k != "num_image_tokens"}
    write_config(tmp_path, zoo.config | {"vision_config": vision, "text_config": text})
    error = refused(tmp_path)
    assert '"image_size": 32' in (error.hint or ""), "by default it is 224"


def test_the_pictures_token(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    token = zoo.config["image_token_index"]
    config = {k: v for k, v in zoo.config.items() if k != "image_token_index"}
    write_folder(tmp_path, config, zoo.layout("L1"))
    model, _ = load_hf_model(tmp_path, "cpu")
    assert model.config.image_token_id == token, "as the tokenizer says"
    assert from_pretrained(tmp_path)[0].config.image_token_id == 256000
    write_config(tmp_path, zoo.config | {"image_token_index": token - 1})
    error = refused(tmp_path)
    assert (error.code, str(token - 1) in error.message) == ("FC456", True)


# --- d: which files count -------------------------------------------------------------------------


def _noise(path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in state.items()}, path)


@pytest.mark.parametrize(
    "stray",
    ["consolidated.safetensors", "zz_old.safetensors", "model-00001-of-00009.safetensors"],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_stray_files(tmp_path: Path, zoo: PaliGemmaZoo, stray: str, shards: int) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=shards)
    _noise(tmp_path / stray, {EMBED: zoo.layout("L1")[EMBED]})
    fooled = not torch.equal(careless_load(tmp_path).state_dict()[EMBED], zoo.layout("L1")[EMBED])
    assert fooled is (stray > "model.safetensors" or stray > "model-00002"), "by the order of names"
    loads(tmp_path, zoo)


def test_an_adapter_beside_the_weights(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=2)
    save_file(zoo.peft_adapter(), tmp_path / "adapter_model.safetensors")
    loads(tmp_path, zoo)


def test_weights_with_adapters_inside(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.peft())
    error = refused(tmp_path)
    assert error.code == "FC459"
    assert "lora" in (error.key or "")


def test_an_adapter_alone(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_config(tmp_path, zoo.config)
    write_tokenizer(tmp_path)
    save_file(zoo.peft_adapter(), tmp_path / "weights.safetensors")
    assert refused(tmp_path).code == "FC459"


def test_a_missing_shard(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=3)
    gone = tmp_path / "model-00002-of-00003.safetensors"
    gone.unlink()
    careless_load(tmp_path)
    error = refused(tmp_path)
    assert (error.code, gone.name in error.message) == ("FC107", True)


def test_an_index_of_another_release(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    first = right["weight_map"][EMBED]
    wrong = right | {"weight_map": right["weight_map"] | {"vision_tower.ghost.weight": first}}
    index.write_text(json.dumps(wrong))
    from_pretrained(tmp_path)
    error = refused(tmp_path)
    assert (error.code, error.key) == ("FC107", "vision_tower.ghost.weight")
    # a key in a shard that no index names
    index.write_text(
        json.dumps({"weight_map": {k: v for k, v in right["weight_map"].items() if k != EMBED}})
    )
    assert (refused(tmp_path).code, refused(tmp_path).key) == ("FC107", EMBED)


def test_a_shard_of_another_save(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    """The stale half of a repository that was uploaded twice."""
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=2)
    other = tmp_path / "other"
    write_folder(other, zoo.config, zoo.layout("L4"), shards=2)
    name = "model-00002-of-00002.safetensors"
    (tmp_path / name).write_bytes((other / name).read_bytes())
    assert refused(tmp_path).code == "FC107"


def test_one_key_in_two_shards(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=2)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[EMBED])
    stale = load_file(tmp_path / other) | {EMBED: torch.zeros_like(zoo.layout("L1")[EMBED])}
    save_file(stale, tmp_path / other, metadata={"format": "pt"})
    error = refused(tmp_path)
    assert (error.code, error.key) == ("FC202", EMBED)


def test_two_keys_for_one_tensor(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    """transformers takes the first in the alphabet, and says nothing of the other."""
    second = "model." + EMBED
    state = zoo.layout("L1")
    write_folder(tmp_path, zoo.config, state | {second: torch.zeros_like(state[EMBED])})
    error = refused(tmp_path)
    assert second in str(error)


def test_two_sets_of_weights(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    """A re-save into one file beside the index of many that was there before."""
    write_folder(tmp_path, zoo.config, zoo.layout("L1"), shards=2)
    write_weights(tmp_path, zoo.layout("L1"))
    error = refused(tmp_path)
    assert error.code == "FC207"


@pytest.mark.parametrize("what", ["nothing", "a file", "an id"])
def test_no_folder(tmp_path: Path, what: str) -> None:
    path: Any = tmp_path / "nothing"
    if what == "a file":
        path.write_text("{}")
    if what == "an id":
        path = "google/paligemma-3b-pt-224"
    assert refused(path).code == "FC404"


def test_a_folder_without_weights(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_config(tmp_path, zoo.config)
    write_tokenizer(tmp_path)
    assert refused(tmp_path).code == "FC001"


def test_weights_of_another_kind(tmp_path: Path, zoo: PaliGemmaZoo) -> None:
    write_folder(tmp_path, zoo.config, clip(layers=2).hf)
    error = refused(tmp_path)
    assert (error.code, "clip" in error.message) == ("FC416", True)
