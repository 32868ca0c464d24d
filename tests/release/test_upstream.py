"""Releases as the libraries of others write them: nothing is said but what is truly missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.release.faults import Told
from tests.support import cli

MISSING: frozenset[Told] = frozenset(
    {
        ("FC611", "info", "record"),
        ("FC612", "info", "SHA256SUMS"),
        ("FC614", "info", "model.sig"),
    }
)


def told(folder: Path, *options: object) -> set[Told]:
    """What a check says of a folder with a card, beside what is missing and of modes.

    safetensors writes files that only their owner may read, which is told and true.
    """
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    outcome = cli("check", folder, "--json", *options)
    assert outcome.code in (0, 1), outcome
    assert outcome.err == ""
    found = {(one["code"], one["severity"], one["key"]) for one in outcome.document["findings"]}
    assert found >= MISSING
    checks = outcome.document["summary"]["checks"]
    assert {checks[name] for name in ("keys", "values")} == {"pass"}, checks
    assert checks["config"] in ("pass", "warn")
    return found - MISSING


def clip(seed: int = 0) -> Any:
    zoo.prepare()
    import torch
    import transformers

    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    tower |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config=tower | text, vision_config=tower | vision, projection_dim=8
    )
    return transformers.CLIPModel(config)


def test_clip_as_transformers_makes_and_saves_it(tmp_path: Path) -> None:
    """Fresh: every norm is 1 and every bias 0, in all layers."""
    import transformers

    clip().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(tmp_path)
    assert told(tmp_path) == set()


def test_clip_in_half_precision_and_shards(tmp_path: Path) -> None:
    clip().half().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    assert told(tmp_path) == set()


def test_clip_that_was_cast_and_says_so_nowhere(tmp_path: Path) -> None:
    """The config of a float32 release beside bfloat16 weights: one finding, and it is mended."""
    clip().bfloat16().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    field = next(name for name in ("dtype", "torch_dtype") if name in document)
    (tmp_path / "config.json").write_text(json.dumps(document | {field: "float32"}))
    assert told(tmp_path) == {("FC613", "warning", f"config.json: {field}")}
    assert told(tmp_path, "--fix", "--yes") == set()


@pytest.mark.parametrize("fresh", [True, False])
def test_paligemma(tmp_path: Path, fresh: bool) -> None:
    import transformers

    made = zoo.paligemma().model
    model = transformers.PaliGemmaForConditionalGeneration(made.config) if fresh else made
    model.save_pretrained(tmp_path)
    side = made.config.vision_config.image_size
    transformers.SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(
        tmp_path
    )
    assert told(tmp_path) == {("FC605", "warning", "tokenizer.json")}


def test_open_clip_with_both_forms_that_it_pushes(tmp_path: Path) -> None:
    """open_clip uploads a pickle beside the safetensors, unless it is told not to."""
    import torch

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 4, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 4},
    }
    zoo.prepare()
    import open_clip

    torch.manual_seed(0)
    state = open_clip.CLIP(**config).state_dict()
    zoo.save_safetensors(state, tmp_path / "open_clip_model.safetensors")
    statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    document = {"model_cfg": config, "preprocess_cfg": statistics | {"interpolation": "bicubic"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    assert told(tmp_path) == set()
    zoo.save_torch(state, tmp_path / "open_clip_pytorch_model.bin")
    pickle = "open_clip_pytorch_model.bin"
    assert told(tmp_path) == {("FC116", "error", pickle), ("FC507", "error", pickle)}


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_a_language_model_tied_or_not(tmp_path: Path, family: str) -> None:
    from tests.zoo_lms import language_model

    language_model(family, 4).save_pretrained(tmp_path)
    assert told(tmp_path) == set()


def test_a_flamingo_as_upstream_saves_it(tmp_path: Path) -> None:
    """A pickle of the trained parts: what is frozen is absent by design."""
    made = zoo.openflamingo("opt")
    zoo.save_torch(made.partial, tmp_path / "checkpoint.pt")
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    found = told(tmp_path)
    assert {one for one in found if one[0] != "FC215"} == {
        ("FC507", "warning", "checkpoint.pt"),
        ("FC603", "error", "base_model"),
        ("FC605", "warning", "tokenizer.json"),
        ("FC610", "info", "config.json"),
    }


def test_a_flamingo_before_training(tmp_path: Path) -> None:
    """Its gates are 0, which is what the check is there to see; nothing else is said."""
    state = dict(zoo.hf_flamingo("opt").state)
    gates = [name for name in state if name.endswith(("attn_gate", "ff_gate"))]
    for name in gates:
        state[name] = state[name] * 0
    zoo.save_folder(state, zoo.hf_flamingo("opt").config, tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    found = {
        (one["code"], one["key"])
        for one in cli("check", tmp_path, "--json").document["findings"]
        if one["severity"] == "error"
    }
    assert found == {*(("FC351", name) for name in gates), ("FC603", "base_model")}
