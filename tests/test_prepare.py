"""What a config adds to a conversion: sizes that no shape tells, and what must not be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.support import cli, cli_ok


def write_config(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def flamingo(tmp_path: Path, drop: str = "", family: str = "llama") -> tuple[Path, ...]:
    """A partial checkpoint (without one key), its bases and its config."""
    model = zoo.openflamingo(family)
    partial = {name: tensor for name, tensor in model.partial.items() if name != drop}
    assert drop in (*model.partial, "")
    zoo.save_torch(partial, tmp_path / "partial.pt")
    zoo.save_torch(model.clip, tmp_path / "clip.pt")
    zoo.save_torch(model.language, tmp_path / "lm.pt")
    config = write_config(tmp_path / "config.json", model.config)
    return tmp_path / "partial.pt", tmp_path / "clip.pt", tmp_path / "lm.pt", config


def test_siglip_heads_come_from_its_config(tmp_path: Path) -> None:
    model = zoo.siglip()
    zoo.save_torch(model.state, tmp_path / "siglip.pt")
    arguments = ("convert", tmp_path / "siglip.pt", tmp_path / "siglip.npz")
    to = ("--to", "big_vision-siglip")
    refused = cli(*arguments, *to, "--json")
    assert (refused.code, refused.codes) == (2, ["FC415"])
    assert not (tmp_path / "siglip.npz").exists()
    tower = {"hidden_size": 64, "num_attention_heads": model.heads}
    content = {"model_type": "siglip", "vision_config": tower, "text_config": tower}
    config = write_config(tmp_path / "config.json", content)
    cli_ok(*arguments, *to, "--config", config)
    zoo.save_npz(model.npz(stacked=True, prefix="params/"), tmp_path / "wanted.npz")
    cli_ok("diff", tmp_path / "siglip.npz", tmp_path / "wanted.npz", "--level", "bits")


@pytest.mark.parametrize(
    "key",
    ["perceiver.norm.bias", "lang_encoder.model.layers.3.gated_cross_attn_layer.attn_gate"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_hole_is_not_converted_where_the_model_is_known(
    tmp_path: Path, key: str, whole: bool
) -> None:
    partial, clip, language, config = flamingo(tmp_path, drop=key)
    bases = ("--base-vision", clip, "--base-language", language) if whole else ()
    outcome = cli(
        "convert",
        partial,
        tmp_path / "hf",
        *("--to", "hf-flamingo", "--config", config, "--json"),
        *bases,
    )
    assert (outcome.code, outcome.codes) == (2, ["FC203"])
    assert key in outcome.document["findings"][0]["key"]
    assert not (tmp_path / "hf").exists()


def test_towers_may_be_absent_from_a_partial_result(tmp_path: Path) -> None:
    partial, clip, _, config = flamingo(tmp_path)
    arguments = ("convert", partial, "--to", "hf-flamingo", "--config", config, "--json")
    without = cli_ok(*arguments, tmp_path / "none").document
    assert without["partial"]
    vision = cli_ok(*arguments, tmp_path / "vision", "--base-vision", clip).document
    assert vision["partial"]
    assert 0 < vision["summary"]["expected_absent"] < without["summary"]["expected_absent"]
    for name in ("none", "vision"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["flamingo_ckpt"]["partial"]


def test_a_config_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    partial, _, _, _ = flamingo(tmp_path)
    text = write_config(tmp_path / "text.json", zoo.openflamingo("llama").text_config)
    outcome = cli(
        "convert", partial, tmp_path / "x", "--to", "hf-flamingo", "--config", text, "--json"
    )
    assert (outcome.code, outcome.codes) == (2, ["FC416"])


def test_a_base_of_another_width_is_refused(tmp_path: Path) -> None:
    import torch

    partial, _, language, _ = flamingo(tmp_path)
    other = zoo.openflamingo("llama").language
    wide = {name: torch.cat([one, one], -1) for name, one in other.items()}
    zoo.save_torch(wide, tmp_path / "wide.pt")
    short = {name: one for name, one in other.items() if ".layers.3." not in name}
    zoo.save_torch(short, tmp_path / "short.pt")
    for base, told in ((tmp_path / "wide.pt", "width 48"), (tmp_path / "short.pt", "layer 3")):
        outcome = cli(
            *("convert", partial, tmp_path / "x.safetensors", "--to", "hf-flamingo", "--json"),
            *("--base-language", base),
        )
        assert (outcome.code, outcome.codes) == (2, ["FC420"])
        assert told in outcome.document["findings"][0]["detail"]
    assert language.exists()


def test_options_that_need_a_target_are_not_swallowed(tmp_path: Path) -> None:
    partial, clip, _, config = flamingo(tmp_path)
    for option in (("--config", config), ("--vocab-rows", 99), ("--base-vision", clip)):
        outcome = cli("convert", partial, tmp_path / "x", *option, "--json")
        assert (outcome.code, outcome.codes) == (2, ["FC006"])


def test_the_head_keeps_the_spelling_of_the_whole_state_dict(tmp_path: Path) -> None:
    model = zoo.openflamingo("gpt_neox")
    assert "lang_encoder.lm_head.weight" in model.full
    zoo.save_torch(model.full, tmp_path / "full.pt")
    zoo.save_torch(model.clip, tmp_path / "clip.pt")
    config = write_config(tmp_path / "config.json", model.config)
    cli_ok(
        *("convert", tmp_path / "full.pt", tmp_path / "hf"),
        *("--to", "hf-flamingo", "--config", config),
    )
    cli_ok(
        *("convert", tmp_path / "hf", tmp_path / "back.pt"),
        *("--to", "openflamingo-full", "--base-vision", tmp_path / "clip.pt"),
    )
    import torch

    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == model.full.keys()
    assert all(torch.equal(back[name], one) for name, one in model.full.items())


def test_a_config_of_another_kind_beside_the_source_is_not_taken(tmp_path: Path) -> None:
    """A checkpoint in a folder with CLIP's config does not become a Flamingo with that config."""
    model = zoo.openflamingo("llama")
    zoo.save_folder(dict(model.partial), zoo.clip().config, tmp_path / "mixed")
    document = cli_ok(
        "convert", tmp_path / "mixed", tmp_path / "hf", "--to", "hf-flamingo", "--json"
    ).document
    assert document["partial"]
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["model_type"] == "flamingo"
    assert written["flamingo_ckpt"]["partial"]


def test_a_config_beside_the_source_that_contradicts_it_is_refused(tmp_path: Path) -> None:
    """It would be written beside the result; what is written is checked."""
    model = zoo.paligemma()
    config = json.loads(json.dumps(model.config))
    zoo.save_folder(model.layout("L2"), config, tmp_path / "good")
    cli_ok("convert", tmp_path / "good", tmp_path / "hub", "--to", "paligemma")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["model_type"] == "paligemma"
    config["text_config"]["intermediate_size"] *= 2
    zoo.save_folder(model.layout("L2"), config, tmp_path / "bad")
    outcome = cli("convert", tmp_path / "bad", tmp_path / "not", "--to", "paligemma", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC205"])
    assert not (tmp_path / "not").exists()


def test_a_folder_may_be_called_like_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.paligemma()
    zoo.save_folder(model.layout("L2"), model.config, tmp_path / "paligemma-3b-pt-224")
    monkeypatch.chdir(tmp_path)
    cli_ok("convert", "paligemma-3b-pt-224", "hub", "--to", "paligemma")
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert written["text_config"]["hidden_size"] == model.config["text_config"]["hidden_size"]
