"""What no tensor shows: told by `inspect`, compared by `diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flamingo_ckpt.models.config import parse_config, read_config
from flamingo_ckpt.models.settings import settings_of
from tests import zoo
from tests.support import cli, cli_ok

PRESET = "model:openflamingo-3b-vitl-mpt1b"


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return dict(settings_of(parse_config(config, "a test")))


def changed(config: dict[str, Any], section: str, **fields: Any) -> dict[str, Any]:
    return config | {section: config[section] | fields}


def folder(path: Path, **vision: Any) -> Path:
    made = zoo.hf_flamingo("llama")
    return zoo.save_folder(made.state, changed(made.config, "vision_config", **vision), path)


def test_a_flamingo_says_which_tokens_and_which_activation() -> None:
    found = dict(settings_of(read_config(PRESET)))
    assert found["vision.hidden_act"] == "quick_gelu"
    assert found["vision.tokens"] == "before_ln_post"
    assert found["vision.num_attention_heads"] == 16


def test_what_a_config_leaves_out_is_the_default_of_the_class() -> None:
    config = zoo.openflamingo("llama").config
    bare = {k: v for k, v in config["vision_config"].items() if k not in ("hidden_act",)}
    assert settings(config | {"vision_config": bare})["vision.hidden_act"] == "quick_gelu"


def test_rope_is_one_setting_in_both_spellings() -> None:
    config = zoo.openflamingo("llama").config
    text = {k: v for k, v in config["text_config"].items() if not k.startswith("rope")}
    before = config | {"text_config": text | {"rope_theta": 5e5}}
    after = config | {
        "text_config": text | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    }
    assert settings(before)["language.rope_theta"] == settings(after)["language.rope_theta"] == 5e5


@pytest.mark.parametrize(
    "names",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": "relu", "hidden_activation": "gelu"},
    ],
)
def test_the_first_gemma_has_one_activation_in_all_its_spellings(names: dict[str, str]) -> None:
    config = dict(read_config("model:paligemma-3b-pt-224").data)
    text = {
        name: value
        for name, value in config["text_config"].items()
        if name not in ("hidden_act", "hidden_activation")
    }
    found = settings(config | {"text_config": text | names})
    assert found["language.hidden_act"] == "gelu_pytorch_tanh"
    assert "language.hidden_activation" not in found


def test_inspect_tells_them() -> None:
    assert "settings   vision: hidden_act quick_gelu" in cli_ok("inspect", PRESET).out
    told = cli_ok("inspect", PRESET, "--json").document["details"]["settings"]
    assert told["vision.tokens"] == "before_ln_post"


def test_inspect_tells_those_of_a_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", hidden_act="gelu")
    assert "hidden_act gelu" in cli_ok("inspect", str(path)).out
    (path / "config.json").unlink()
    assert "settings" not in cli_ok("inspect", str(path)).out


def test_diff_compares_two_models() -> None:
    ended = cli("diff", "model:vit-l-14", "model:vit-l-14-quickgelu", "--json")
    assert ended.code == 1
    assert {(one["code"], one["data"]["setting"]) for one in ended.document["findings"]} == {
        ("FC407", "vision.hidden_act"),
        ("FC407", "text.hidden_act"),
    }
    assert cli("diff", "model:vit-l-14", "model:vit-l-14-quickgelu", "--level", "keys").code == 0


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_act", "gelu"), ("layer_norm_eps", 1e-6), ("image_size", 32)]
)
def test_diff_compares_two_folders(tmp_path: Path, field: str, value: Any) -> None:
    a = folder(tmp_path / "a")
    b = folder(tmp_path / "b", **{field: value})
    theirs = json.loads((a / "config.json").read_text())["vision_config"]
    ended = cli("diff", str(a), str(b), "--level", "bits", "--json")
    differs = theirs.get(field) != value
    assert ended.code == int(differs)
    assert ended.document["summary"]["changed"] == 0
    assert ("FC407" in ended.codes) is differs


def test_a_side_without_a_config_is_not_blamed(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", hidden_act="gelu")
    zoo.save_safetensors(zoo.hf_flamingo("llama").state, tmp_path / "b.safetensors")
    assert cli("diff", str(a), str(tmp_path / "b.safetensors")).code == 0
