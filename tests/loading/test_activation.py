"""QuickGELU or GELU: no key and no shape tells, and a path told upstream nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.loading import load_checkpoint
from flamingo_ckpt.models import build
from flamingo_ckpt.models.config import parse_config
from tests import zoo
from tests.zoo_clip import open_clip_cfg


def folder_of(form: str, quick: bool, folder: Path) -> Path:
    """Weights with their config, as open_clip, as transformers, or as a Flamingo's port."""
    made = zoo.clip(layers=3, quick_gelu=quick)
    if form == "open_clip":
        zoo.save_safetensors(made.open_clip, folder / "open_clip_model.safetensors")
        config = {"model_cfg": open_clip_cfg(3, quick_gelu=quick)}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    else:
        zoo.save_folder(made.hf, made.config, folder)
    return folder


def model_of(layout: str, quick: bool) -> Any:
    return build(parse_config(open_clip_cfg(3, quick_gelu=quick), ""), layout, dtype="float32")


@pytest.mark.parametrize("layout", ["open_clip", "hf-clip"])
@pytest.mark.parametrize("form", ["open_clip", "hf"])
@pytest.mark.parametrize("quick", [True, False])
def test_another_activation_is_told(
    form: str, layout: str, quick: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(form, quick, tmp_path)
    report = load_checkpoint(model_of(layout, quick), folder).report
    assert not caplog.records
    assert "FC407" not in {finding.code for finding in report.findings}
    wrapped = torch.nn.DataParallel(model_of(layout, not quick))
    report = load_checkpoint(wrapped, folder).report
    (finding,) = [one for one in report.findings if one.code == "FC407"]
    assert finding.severity == "warning"
    theirs, ours = ("quick_gelu", "gelu") if quick else ("gelu", "quick_gelu")
    assert f"is `{theirs}` in the config" in finding.detail
    assert f"`{ours}` in the model" in finding.detail
    assert f"the model computes `{ours}`" in caplog.text
    assert finding.detail in str(report)


def test_a_flamingos_tower(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its resampler and its blocks have GELU in any case."""
    made = zoo.hf_flamingo("llama")
    folder = zoo.save_folder(made.state, made.config, tmp_path)
    model = build(parse_config(made.config, ""), "openflamingo")
    assert load_checkpoint(model, folder, strict=False).missing_keys == ["vision_encoder.proj"]
    assert not caplog.records
    vision = made.config["vision_config"] | {"hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(made.config | {"vision_config": vision}))
    load_checkpoint(model, folder, strict=False)
    assert "says `gelu` for the vision tower" in caplog.text


def test_a_file_alone_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of("open_clip", True, tmp_path)
    (folder / "open_clip_config.json").unlink()
    load_checkpoint(model_of("open_clip", False), folder)
    load_checkpoint(model_of("open_clip", False), folder / "open_clip_model.safetensors")
    (folder / "config.json").write_text("{}")
    load_checkpoint(model_of("open_clip", False), folder)
    assert not caplog.records


def test_a_folder_with_the_name_of_a_preset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own config counts, not that of the preset, which has GELU."""
    (tmp_path / "vit-b-32").mkdir()
    folder_of("open_clip", True, tmp_path / "vit-b-32")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint(model_of("open_clip", True), "vit-b-32").missing_keys == []
    assert not caplog.records
    load_checkpoint(model_of("open_clip", False), "vit-b-32")
    assert "`quick_gelu`" in caplog.text
