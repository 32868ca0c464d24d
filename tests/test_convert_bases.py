"""convert with bases: self-contained folders, and that they compute the same."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.layout_support import (
    BUFFER,
    Files,
    assert_same,
    carried,
    each_model,
    metadata,
    on_disk,
    without_rows,
)
from tests.support import cli_ok, facts_at, torch_facts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("zoo"))


@each_model
def test_a_self_contained_folder_and_the_way_back(
    files: Files, family: str, era: str, tmp_path: Path
) -> None:
    model, folder = zoo.openflamingo(family, era=era), files.whole(family, era)
    expected = on_disk(zoo.hf_flamingo(family, era=era).state)
    found = facts_at(folder)
    heads = [name for name in found if re.fullmatch(r"lang_encoder\.(lm_head|embed_out)\..*", name)]
    rows, base = zoo.flamingo_rows(family), zoo.base_rows(family)
    for name in heads:
        # what a base's head of its own lacks is zero, and upstream has random numbers there
        if rows > base and expected[name] != found[name]:
            zeros = bytes(len(found[name].data) * (rows - base) // rows)
            assert found[name].data.endswith(zeros)
            found[name], expected[name] = (
                without_rows(one[name], base) for one in (found, expected)
            )
    assert_same(found, expected)
    config = json.loads((folder / "config.json").read_text())
    given = json.loads(files.config(family).read_text())
    assert config == given | {"vision_tokens": "before_ln_post"}
    assert config["text_config"]["vocab_size"] == rows
    assert "flamingo_ckpt.partial" not in metadata(folder)
    cli_ok("convert", folder, tmp_path / "back.pt", "--to", "openflamingo")
    assert_same(facts_at(tmp_path / "back.pt"), carried(model.partial))


@pytest.mark.parametrize("form", ["openai", "custom_text", "hf", "hf_vision", "hf_vision_flat"])
def test_every_form_of_a_clip_supplies_the_tower(files: Files, form: str, tmp_path: Path) -> None:
    clip = getattr(zoo.clip(layers=3), form)
    zoo.save_torch(clip, tmp_path / "clip.pt")
    cli_ok(
        *("convert", files.write("partial", "mpt1b"), tmp_path / "out", "--to", "hf-flamingo"),
        *("--config", files.config("mpt1b"), "--base-vision", tmp_path / "clip.pt"),
        *("--base-language", files.write("language", "mpt1b")),
    )
    tower = {n: t for n, t in facts_at(tmp_path / "out").items() if n.startswith("vision_encoder")}
    wanted = torch_facts(
        {f"vision_encoder.{n}": t for n, t in zoo.clip(layers=3).hf_vision.items()}
    )
    assert_same(tower, {n: one for n, one in wanted.items() if not BUFFER.search(n)})


def test_a_whole_flamingo_can_be_the_base(files: Files, tmp_path: Path) -> None:
    folder = files.whole("llama")
    cli_ok(
        *("convert", files.write("partial", "llama"), tmp_path / "out", "--to", "hf-flamingo"),
        *("--config", files.config("llama"), "--base-vision", folder, "--base-language", folder),
    )
    assert facts_at(tmp_path / "out") == facts_at(folder)


def test_the_checkpoint_wins_over_a_base(files: Files, tmp_path: Path) -> None:
    """A base that holds the same tensors with other bits changes nothing."""
    other = zoo.save_torch(zoo.openflamingo("llama", seed=7).full, tmp_path / "other.pt")
    src = files.write("full", "llama")
    dst = tmp_path / "out.safetensors"
    cli_ok(
        *("convert", src, dst, "--to", "hf-flamingo"),
        *("--base-vision", other, "--base-language", other),
    )
    assert_same(facts_at(dst), carried(zoo.hf_flamingo("llama").state))


def test_a_partial_folder_is_completed_later(files: Files, tmp_path: Path) -> None:
    """In two steps as in one, and then nothing says that it is partial."""
    partial, vision = tmp_path / "partial", tmp_path / "vision"
    cli_ok("convert", files.write("partial", "gpt_neox"), partial, "--to", "hf-flamingo")
    clip, language = (files.write(what, "gpt_neox") for what in ("clip", "language"))
    config = ["--config", files.config("gpt_neox")]
    cli_ok(
        *("convert", partial, tmp_path / "lm", "--to", "hf-flamingo", *config),
        *("--base-language", language),
    )
    assert metadata(tmp_path / "lm")["flamingo_ckpt.partial"] == "true"
    cli_ok(
        "convert", tmp_path / "lm", vision, "--to", "hf-flamingo", *config, "--base-vision", clip
    )
    assert facts_at(vision) == facts_at(files.whole("gpt_neox"))
    assert "flamingo_ckpt.partial" not in metadata(vision)
    assert "flamingo_ckpt" not in json.loads((vision / "config.json").read_text())
    cli_ok("convert", vision, tmp_path / "back.pt", "--to", "openflamingo")
    assert_same(facts_at(tmp_path / "back.pt"), carried(zoo.openflamingo("gpt_neox").partial))


def language_model(family: str, config: Mapping[str, Any]) -> Any:
    """The class that the config names."""
    if family == "mpt1b":
        from tests.zoo_lms import _mosaic_gpt_class

        kind = _mosaic_gpt_class()
        return kind(kind.config_class(**config["text_config"]))
    import transformers

    text = dict(config["text_config"])
    made = transformers.AutoConfig.for_model(text.pop("model_type"), **text)
    return transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_folder_loads_in_its_own_classes_and_computes_the_same(
    files: Files, family: str
) -> None:
    import safetensors.torch
    import torch

    zoo.prepare()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = files.whole(family)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    upstream = copy.deepcopy(zoo.openflamingo(family).model).double()
    # the tower
    tower = CLIPVisionModel(CLIPVisionConfig(**config["vision_config"])).eval().double()
    prefix = "vision_encoder.vision_model."
    tower.load_state_dict(
        {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    )
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = tower(pixels).last_hidden_state[:, 1:]
        wanted = upstream.vision_encoder(pixels)[1]
    assert (found - wanted).abs().max() < 1e-12
    # the language model, upstream's gates closed
    words = {
        name.removeprefix("lang_encoder.").replace(".decoder_layer.", "."): tensor
        for name, tensor in state.items()
        if name.startswith("lang_encoder.") and ".gated_cross_attn_layer." not in name
    }
    if family in ("gpt_neox", "pythia"):
        words["lm_head.weight"] = words.pop("embed_out.weight")
    model = language_model(family, config).eval()
    lacking = model.load_state_dict(words, strict=False)
    tied = {*(model._tied_weights_keys or ())} if config["tie_word_embeddings"] else set()
    assert lacking.unexpected_keys == []
    assert {*lacking.missing_keys} <= tied
    model.tie_weights()
    model.double()
    with torch.no_grad():
        for block in upstream.lang_encoder.gated_cross_attn_layers:
            if block is not None:
                block.attn_gate.zero_()
                block.ff_gate.zero_()
        inputs = {n: t.double() if t.is_floating_point() else t for n, t in _inputs(family).items()}
        tokens = {"input_ids": inputs["lang_x"], "attention_mask": inputs["attention_mask"]}
        logits, expected = model(**tokens).logits, upstream(**inputs).logits
    # rows of an output embedding of its own that no release holds are zero here
    rows = min(zoo.base_rows(family), zoo.flamingo_rows(family))
    assert expected.abs().max() > 0.1
    assert (logits - expected)[..., :rows].abs().max() < 1e-11


def _inputs(family: str) -> dict[str, Any]:
    return zoo.openflamingo(family).inputs()
