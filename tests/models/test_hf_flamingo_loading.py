"""`from_pretrained` and `save_pretrained` of the Hugging Face twin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import FlamingoConfig, FlamingoForConditionalGeneration
from tests import zoo
from tests.layout_support import Files, each_model
from tests.models.hf_support import (
    SHALLOW,
    TOKENS,
    batch,
    changed,
    each_family,
    load,
    quiet_transformers,
    transformers_log,
)
from tests.support import cli, cli_ok, facts_at, python
from tests.zoo_flamingo import EOC_TOKEN, MEDIA_TOKEN

_quiet = pytest.fixture(autouse=True)(quiet_transformers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Folders of `convert --to hf-flamingo`, each made when it is first asked for."""
    return Files(tmp_path_factory.mktemp("hf"), **SHALLOW)


#: Families whose head is the embedding: `convert` carries a copy where the source has one.
TIED = ("mpt7b", "opt")
HEAD = "lang_encoder.lm_head.weight"


def facts_once(folder: Path, family: str) -> dict[str, Any]:
    """What a folder holds, a tied head left out."""
    found = dict(facts_at(folder))
    if family in TIED:
        found.pop(HEAD, None)
    return found


@each_model
def test_a_converted_folder_loads_whole_and_is_saved_as_it_was(
    files: Files, family: str, era: str, tmp_path: Path
) -> None:
    folder = files.whole(family, era)
    with transformers_log() as said:
        model, info = load(folder, output_loading_info=True)
        model.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
    assert said == []
    assert {what: list(names) for what, names in info.items() if names} == {}
    assert facts_at(tmp_path / "saved") == facts_once(folder, family)
    inputs = batch(family, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    outcome = cli("diff", tmp_path / "saved", f"model:{tmp_path / 'saved' / 'config.json'}")
    assert outcome.code == 0, outcome
    # the names that have no word of the object's history
    made = FlamingoForConditionalGeneration(again.config)
    made.save_pretrained(tmp_path / "made")
    shapes = {name: one.shape for name, one in facts_at(tmp_path / "made").items()}
    assert shapes == {name: one.shape for name, one in facts_once(folder, family).items()}
    cli_ok("convert", tmp_path / "saved", tmp_path / "back.pt", "--to", "openflamingo")


@each_family
def test_buffers_are_those_of_a_fresh_model(files: Files, family: str) -> None:
    model = load(files.whole(family))
    fresh = FlamingoForConditionalGeneration(model.config)
    wanted = dict(fresh.named_buffers())
    found = dict(model.named_buffers())
    assert sorted(found) == sorted(wanted)
    assert any(name.endswith("position_ids") for name in wanted)
    assert all(found[name].dtype == wanted[name].dtype for name in wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    if family in ("llama", "gpt_neox", "pythia"):
        assert any(name.endswith("inv_freq") for name in wanted)
    for module in model.modules():
        hidden = {name: one for name, one in vars(module).items() if isinstance(one, torch.Tensor)}
        assert not any(tensor.is_meta for tensor in hidden.values())


def test_a_random_model_is_sane(files: Files) -> None:
    config = FlamingoConfig.from_pretrained(files.whole("llama"), **TOKENS)
    model = FlamingoForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("_gate"):
            assert parameter.item() == 0
        elif name.endswith("weight") and parameter.ndim == 1:  # of a norm
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert 0 < parameter.std() < 2, name
    latents = model.perceiver.latents
    assert 0.9 < latents.std() < 1.1
    inputs = batch("llama", dtype=torch.float32)
    with torch.no_grad():  # gates are shut: pictures say nothing yet
        found, other = model(**inputs), model(**{**inputs, "vision_x": -inputs["vision_x"]})
    assert torch.equal(found.logits, other.logits)


@pytest.mark.parametrize("family", ["llama", "mpt1b"])
def test_what_is_missing_starts_as_in_a_random_model(
    files: Files, family: str, tmp_path: Path
) -> None:
    """Where the caller asks for transformers' way. Gates stand inside the language model."""
    folder = files.whole(family)
    names = [n for n in facts_at(folder) if "gated_cross_attn" in n or n.startswith("perceiver")]
    lacking = changed(folder, tmp_path / "lacking", **dict.fromkeys(names))
    with torch.random.fork_rng(devices=[]):
        model, info = load(lacking, output_loading_info=True)
    assert set(info["missing_keys"]) == set(names)
    tensors = model.state_dict()
    assert all((tensors[name] == 0).all() for name in names if name.endswith("_gate"))
    assert all((tensors[name] == 0).all() for name in names if name.endswith("bias"))
    assert 0.9 < tensors["perceiver.latents"].std() < 1.1
    assert (tensors["perceiver.norm.weight"] == 1).all()
    weights = [tensors[name] for name in names if name.endswith("to_q.weight")]
    assert all(0.1 < weight.std() * (3 * weight.shape[1]) ** 0.5 < 1.9 for weight in weights)
    assert sorted(load_file(folder / "model.safetensors")) == sorted(tensors)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_published_files(family: str, tmp_path: Path) -> None:
    """As Otter wrote them: buffers of the time, another `model_type`, an extra row."""
    made = zoo.hf_flamingo(family, era="2023", model_type="otter", position_ids=True, extra_rows=1)
    tower = "vision_encoder.vision_model."
    state = {
        tower + name.removeprefix("vision_encoder.").removeprefix("vision_model.")
        if name.startswith("vision_encoder.")
        else name: tensor
        for name, tensor in made.state.items()
    }
    config = {**made.config, "use_media_placement_augmentation": True, "only_attend_previous": True}
    zoo.save_folder(state, config, tmp_path / "otter")
    with transformers_log() as said:
        model = load(tmp_path / "otter")
    assert said == []
    assert type(model).__name__ == "FlamingoForConditionalGeneration"
    # never obeyed: upstream's forward would be another each time
    inputs = batch(family, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert model.config.use_media_placement_augmentation is True

    from transformers import AutoConfig, AutoModel

    other = AutoModel.from_pretrained(tmp_path / "otter")
    assert type(other).__name__ == "OtterForConditionalGeneration"
    assert AutoConfig.from_pretrained(tmp_path / "otter").model_type == "otter"
    other.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == "otter"
    assert written["architectures"] == ["OtterForConditionalGeneration"]
    assert written["only_attend_previous"] is True
    cli_ok("diff", tmp_path / "saved", f"model:{tmp_path / 'saved' / 'config.json'}")


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_names_of_a_state_dict_in_memory(files: Files, family: str, tmp_path: Path) -> None:
    """Vision keys without `vision_model.` and a head called `lm_head`, as transformers has them."""
    folder = tmp_path / "flat"
    shutil.copytree(files.whole(family), folder)
    state = {
        name.replace("vision_encoder.vision_model.", "vision_encoder.").replace(
            ".embed_out.", ".lm_head."
        ): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert facts_at(tmp_path / "saved") == facts_once(files.whole(family), family)


def test_a_save_over_an_earlier_one(files: Files, tmp_path: Path) -> None:
    """transformers leaves the file that it would load next time."""
    model = load(files.whole("gpt_neox"))
    wanted = facts_at(files.whole("gpt_neox"))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.perceiver.latents.add_(1)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert "lang_encoder.embed_out.weight" in index["weight_map"]
    assert torch.equal(load(tmp_path).perceiver.latents, model.perceiver.latents)
    with torch.no_grad():
        model.perceiver.latents.sub_(1)
    again = load(tmp_path)
    again.perceiver.latents.data.copy_(model.perceiver.latents)
    again.save_pretrained(tmp_path)  # the folder that it was loaded from
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert sorted(facts_at(tmp_path)) == sorted(wanted)
    assert torch.equal(load(tmp_path).perceiver.latents, model.perceiver.latents)
    again.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).perceiver.latents, model.perceiver.latents)


def test_dtype(files: Files, tmp_path: Path) -> None:
    folder = files.whole("llama")
    model = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    # pictures are cast; rotary frequencies are not
    assert model(**batch("llama", dtype=torch.float32)).logits.dtype == torch.bfloat16
    buffers = {name: one for name, one in model.named_buffers() if name.endswith("inv_freq")}
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert next(load(tmp_path).parameters()).dtype == torch.bfloat16
    cli_ok("diff", tmp_path, f"model:{tmp_path / 'config.json'}")


@each_family
def test_the_config_goes_round(files: Files, family: str, tmp_path: Path) -> None:
    config = FlamingoConfig.from_pretrained(files.whole(family), **TOKENS)
    again = FlamingoConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    found = FlamingoConfig.from_pretrained(tmp_path)
    assert (found.media_token_id, found.eoc_token_id) == (MEDIA_TOKEN, EOC_TOKEN)
    assert found.text_config.to_dict() == config.text_config.to_dict()
    assert found.vision_config.to_dict() == config.vision_config.to_dict()
    model = FlamingoForConditionalGeneration(found)
    assert model.config.text_config is model.lang_encoder.config
    assert model.generation_config.eos_token_id == EOC_TOKEN


def test_where_generation_ends_is_saved(files: Files, tmp_path: Path) -> None:
    model = load(files.whole("opt"))
    assert model.generation_config.eos_token_id == EOC_TOKEN
    model.save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.eos_token_id == EOC_TOKEN
    own = json.loads((tmp_path / "generation_config.json").read_text()) | {"eos_token_id": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    assert load(tmp_path).generation_config.eos_token_id == 7


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(files: Files, device_map: str) -> None:
    model = load(files.whole("llama"), device_map=device_map)
    inputs = batch("llama", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, load(files.whole("llama"))(**inputs).logits)


@pytest.mark.parametrize("family", ["gpt_neox", "mpt1b"])
def test_a_model_in_two_places(files: Files, family: str, tmp_path: Path) -> None:
    """Half of the layers on disk: no decoder layer is parted from its gated block."""
    folder = files.whole(family)
    path = zoo.FAMILIES[family][0]
    whole = load(folder)
    names = [name for name, _ in whole.named_children() if name != "lang_encoder"]
    places: dict[str, Any] = dict.fromkeys(names, "cpu")
    inner = path.split(".")[0]
    for name, _ in whole.lang_encoder.named_children():
        if name != inner:
            places[f"lang_encoder.{name}"] = "cpu"
    for name, _ in whole.lang_encoder.get_submodule(inner).named_children():
        if f"{inner}.{name}" != path:
            places[f"lang_encoder.{inner}.{name}"] = "cpu"
    places |= {f"lang_encoder.{path}.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    model = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert {"FlamingoLayer", "PerceiverResampler", "CLIPEncoderLayer"} <= model._no_split_modules
    inputs = batch(family, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    words = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(words, whole.generate(**inputs, max_new_tokens=3, do_sample=False))
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "saved")
    assert facts_at(tmp_path / "saved") == facts_at(folder)


def test_device_map_without_accelerate(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(CkptError, match="`device_map` needs accelerate") as caught:
        load(files.whole("llama"), device_map="auto")
    assert caught.value.code == "FC466"
    assert "pip install flamingo-ckpt[accelerate]" in str(caught.value.hint)


_AS_A_USER = """
import sys
folder, out = sys.argv[1:]
import flamingo_ckpt, flamingo_ckpt.models
assert "torch" not in sys.modules and "transformers" not in sys.modules
# nothing is registered before it is asked for
flamingo_ckpt.models.load_config(folder)
from transformers import CONFIG_MAPPING
assert "flamingo" not in CONFIG_MAPPING and "otter" not in CONFIG_MAPPING
from flamingo_ckpt.models import FlamingoForConditionalGeneration
assert "flamingo" in CONFIG_MAPPING and "otter" in CONFIG_MAPPING
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
assert type(AutoConfig.from_pretrained(folder)).__name__ == "FlamingoConfig"
models = [
    FlamingoForConditionalGeneration.from_pretrained(folder, media_token_id=94, eoc_token_id=93),
    AutoModel.from_pretrained(folder, media_token_id=94, eoc_token_id=93),
    AutoModelForImageTextToText.from_pretrained(folder, media_token_id=94, eoc_token_id=93),
]
torch.manual_seed(0)
words, pictures = torch.tensor([[94, 5, 6, 7]]), torch.randn(1, 1, 3, 32, 32)
mask = torch.ones_like(words)
texts = [
    model.generate(input_ids=words, attention_mask=mask, pixel_values=pictures, max_new_tokens=5)
    for model in models
]
assert all(torch.equal(text, texts[0]) for text in texts)
models[0].save_pretrained(out)
again = AutoModelForImageTextToText.from_pretrained(out)
assert again.media_token_id == 94
assert torch.equal(
    again.generate(input_ids=words, attention_mask=mask, pixel_values=pictures, max_new_tokens=5),
    texts[0],
)
print(texts[0].shape[1] > 4)
"""


def test_as_a_user_would(files: Files, tmp_path: Path) -> None:
    done = python(_AS_A_USER, files.whole("gpt_neox"), tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
