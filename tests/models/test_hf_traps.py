"""What transformers does in silence, and its Flamingo twin must not; what Otter's class did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.loading import load_into
from flamingo_ckpt.loading.options import LoadOptions
from flamingo_ckpt.loading.pretrained import load_pretrained
from flamingo_ckpt.models import FlamingoConfig, FlamingoForConditionalGeneration, build
from flamingo_ckpt.models.config import parse_config
from tests import zoo
from tests.layout_support import Files
from tests.models.hf_support import (
    SHALLOW,
    TOKENS,
    batch,
    load,
    quiet_transformers,
    transformers_log,
)
from tests.support import facts_at
from tests.zoo_lms import randomise

_quiet = pytest.fixture(autouse=True)(quiet_transformers)
LATENTS = "perceiver.latents"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("hf"), **SHALLOW)


def shards(folder: Path, into: Path, *parts: dict[str, torch.Tensor], index: Any = None) -> Path:
    """A copy of a folder with its weights in shards; the index as they are, or as told."""
    shutil.copytree(folder, into)
    (into / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, into / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    weight_map |= index or {}
    (into / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return into


@pytest.fixture
def state(files: Files) -> dict[str, torch.Tensor]:
    return dict(load_file(files.whole("gpt_neox") / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("lang_encoder.embed_out.weight", "lang_encoder.lm_head.weight"),
        (
            "vision_encoder.vision_model.embeddings.class_embedding",
            "vision_encoder.embeddings.class_embedding",
        ),
    ],
)
def test_two_names_of_one_tensor(
    name: str, other: str, files: Files, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """transformers takes the first in the alphabet, and reports nothing."""
    folder = tmp_path / "twice"
    shutil.copytree(files.whole("gpt_neox"), folder)
    save_file({**state, other: state[name] + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CkptError) as caught:
        load(folder)
    assert name in str(caught.value)
    assert other in str(caught.value)


def test_one_key_in_two_shards(
    files: Files, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """transformers takes the later shard's."""
    names = sorted(state)
    first = {name: state[name] for name in names[::2]}
    second = {name: state[name] for name in names[1::2]}
    assert load(shards(files.whole("gpt_neox"), tmp_path / "good", first, second)) is not None
    one = next(iter(first))
    second[one] = first[one] + 1
    for index in ({}, {one: "model-00001-of-00002.safetensors"}):
        folder = tmp_path / f"twice{len(index)}"
        with pytest.raises(CkptError) as caught:
            load(shards(files.whole("gpt_neox"), folder, first, second, index=index))
        assert one in str(caught.value)


def test_an_index_of_another_save(
    files: Files, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """It names a tensor that no shard has: transformers does not look."""
    wrong = {"perceiver.other": "model-00001-of-00001.safetensors"}
    folder = shards(files.whole("gpt_neox"), tmp_path / "stale", state, index=wrong)
    with pytest.raises(CkptError, match=r"perceiver\.other"):
        load(folder)


def test_a_repository_is_looked_at_too(
    files: Files, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """What transformers has fetched lies in the hub's cache."""
    repository = tmp_path / "cache" / "models--someone--flamingo"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    wrong = {"perceiver.other": "model-00001-of-00001.safetensors"}
    snapshot = repository / "snapshots" / ("0" * 40)
    shards(files.whole("gpt_neox"), snapshot, state, index=wrong)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    with pytest.raises(CkptError, match=r"perceiver\.other"):
        load("someone/flamingo", **options)  # type: ignore[arg-type]
    index = snapshot / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["perceiver.other"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load("someone/flamingo", **options)  # type: ignore[arg-type]
    assert torch.equal(model.perceiver.latents, state[LATENTS])


def test_a_variant_that_is_saved_again(files: Files, tmp_path: Path) -> None:
    """Of the shards and the one file, transformers leaves what it would load next time."""
    model = load(files.whole("opt"))
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.fp16.json").exists()
    with torch.no_grad():
        model.perceiver.latents.add_(1)
    model.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "model.safetensors.index.fp16.json").exists()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert not (tmp_path / "model.fp16.safetensors").exists()
    again = load(tmp_path, variant="fp16")
    assert torch.equal(again.perceiver.latents, model.perceiver.latents)


def test_final_weights_into_a_port(files: Files, tmp_path: Path) -> None:
    """What Otter's users did with `load_state_dict(strict=False)`; a gate too few is told."""
    made = zoo.hf_flamingo("llama", era="2023", position_ids=True, seed=1)
    kept = ("perceiver.", "gated_cross_attn", "embed_tokens", "lm_head", "inv_freq", "position_ids")
    final = {name: one for name, one in made.state.items() if any(part in name for part in kept)}
    model = load(files.whole("llama", perceiver_depth=6))
    torch.save(final, tmp_path / "final_weights.pt")
    report = load_pretrained(model, tmp_path / "final_weights.pt")
    assert set(report.absent_by_design.values()) == {"vision", "language"}
    found = model.state_dict()
    shared = [name for name in final if name in found]
    assert len(shared) > 90
    assert [name for name in shared if not torch.equal(found[name], final[name])] == []
    del final["lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate"]
    torch.save(final, tmp_path / "final_weights.pt")
    with pytest.raises(CkptError, match="attn_gate"):
        load_pretrained(model, tmp_path / "final_weights.pt")


def test_pickles_are_not_saved_under_another_name(files: Files, tmp_path: Path) -> None:
    """`safe_serialization=False` is swallowed by transformers, which writes safetensors."""
    model = load(files.whole("opt"))
    with pytest.raises(CkptError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", safe_serialization=True)
    assert (tmp_path / "x" / "model.safetensors").exists()


def test_names_that_were_mapped_do_not_come_back(
    files: Files, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """transformers puts a `key_mapping` of the load, reversed, into what is saved."""
    folder = tmp_path / "prefixed"
    shutil.copytree(files.whole("gpt_neox"), folder)
    renamed = {f"model.{name}": tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CkptError):
        load(folder)
    model = load(folder, key_mapping={r"^model\.": ""})
    model.save_pretrained(tmp_path / "saved")
    assert facts_at(tmp_path / "saved") == facts_at(files.whole("gpt_neox"))


def test_several_dtypes_in_one_file(
    files: Files, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A resampler in float32 beside towers in bfloat16: no value is rounded unasked."""
    folder = tmp_path / "mixed"
    shutil.copytree(files.whole("gpt_neox"), folder)
    mixed = {
        name: one if name.startswith("perceiver.") or "gated" in name else one.bfloat16()
        for name, one in state.items()
    }
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    model = load(folder)
    assert torch.equal(model.perceiver.latents.float(), state[LATENTS])


def test_configs_without_a_class_and_with_adapters(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "null"
    shutil.copytree(files.whole("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["architectures"] = None
    (folder / "config.json").write_text(json.dumps(config))
    inputs = batch("llama", dtype=torch.float32)
    with torch.no_grad():
        wanted = load(files.whole("llama"))(**inputs).logits
        assert torch.equal(load(folder)(**inputs).logits, wanted)
    (folder / "config.json").write_text(
        json.dumps(config | {"lora_config": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}})
    )
    with pytest.raises(CkptError, match="lora_config"):
        load(folder)


def test_video(tmp_path: Path) -> None:
    """Otter's resampler has embeddings of frames: the same in both forms, and order matters."""
    config = zoo.openflamingo("llama").config | {"max_num_frames": 4}
    theirs = build(parse_config(config, ""), "hf-flamingo")
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    twin = load(tmp_path)
    assert twin.perceiver.frame_embs.shape[0] == 4
    ours = build(parse_config(config | TOKENS, ""), "openflamingo")
    unused = frozenset({"vision_encoder.proj"})
    load_into(ours, tmp_path / "model.safetensors", LoadOptions(may_miss=unused))
    inputs = batch("llama", dtype=torch.float32)
    inputs["vision_x"] = torch.randn(2, 2, 3, 3, 32, 32)
    with torch.no_grad():
        wanted = ours.eval()(**inputs).logits
        assert (twin(**inputs).logits - wanted).abs().max() < 2e-5
        backwards = twin(**{**inputs, "vision_x": inputs["vision_x"].flip(2)}).logits
    assert (backwards - wanted).abs().max() > 1e-3
    words = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(twin.generate(**inputs, **words), ours.generate(**inputs, **words))
    inputs["vision_x"] = torch.randn(2, 2, 5, 3, 32, 32)
    with pytest.raises(ValueError, match="5 frames, and 4 have an embedding"):
        twin(**inputs)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mpt7b", "opt", "gptj"])
def test_hidden_states_are_those_of_the_layers(family: str, files: Files) -> None:
    """A wrapped layer is still one: they are recorded as without the wrapper."""
    model = load(files.whole(family), attn_implementation="eager")
    inputs = batch(family, dtype=torch.float32)
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 5
    assert len(found.attentions) == 4
    seen: list[torch.Tensor] = []
    layers = model.lang_encoder.get_submodule(zoo.FAMILIES[family][0])
    layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    assert torch.equal(found.hidden_states[2], seen[0])


def test_a_random_model_is_saved_under_the_names_of_a_loaded_one(
    files: Files, tmp_path: Path
) -> None:
    """transformers lets an object's past decide, so that older versions lose the tower."""
    config = FlamingoConfig.from_pretrained(files.whole("gpt_neox"))
    with transformers_log() as said:
        FlamingoForConditionalGeneration(config).save_pretrained(tmp_path)
    assert said == []
    assert set(facts_at(tmp_path)) == set(facts_at(files.whole("gpt_neox")))
    assert all(
        name.startswith("vision_encoder.vision_model.")
        for name in facts_at(tmp_path)
        if name.startswith("vision")
    )
