"""What `from_pretrained` of the Hugging Face twin refuses, and what it never runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flamingo_ckpt.errors import CkptError, LoadError
from flamingo_ckpt.models import FlamingoConfig, FlamingoForConditionalGeneration
from tests.layout_support import Files
from tests.models.hf_support import (
    SHALLOW,
    changed,
    load,
    quiet_transformers,
)
from tests.support import cli_ok, facts_at

_quiet = pytest.fixture(autouse=True)(quiet_transformers)
HEAD = "lang_encoder.lm_head.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Folders of `convert --to hf-flamingo`, each made when it is first asked for."""
    return Files(tmp_path_factory.mktemp("hf"), **SHALLOW)


def test_what_does_not_fit_raises(files: Files, tmp_path: Path) -> None:
    folder = files.whole("llama")
    gate = "lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate"
    lacking = changed(folder, tmp_path / "lacking", **{gate: None})
    with pytest.raises(LoadError, match="1 missing") as caught:
        load(lacking)
    assert (caught.value.code, caught.value.where) == ("FC430", str(lacking))
    assert gate in str(caught.value)
    more = changed(folder, tmp_path / "more", more=torch.zeros(1))
    with pytest.raises(LoadError, match="1 unexpected: `more`"):
        load(more)
    model, info = load(more, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"more"}
    assert isinstance(model, FlamingoForConditionalGeneration)
    other = changed(folder, tmp_path / "other", **{"perceiver.latents": torch.zeros(3, 5)})
    with pytest.raises(LoadError, match=r"another shape: `perceiver.latents is \[3, 5\], not "):
        load(other)
    with pytest.raises(LoadError, match="another shape"):
        load(other, output_loading_info=True)
    assert load(other, ignore_mismatched_sizes=True).perceiver.latents.std() > 0.5
    with pytest.raises(LoadError, match="1 missing"):
        load(lacking, ignore_mismatched_sizes=True)


def test_a_partial_folder_names_what_completes_it(files: Files, tmp_path: Path) -> None:
    cli_ok(
        *("convert", files.write("partial", "opt"), tmp_path / "partial"),
        *("--to", "hf-flamingo", "--config", files.config("opt")),
    )
    with pytest.raises(LoadError, match="missing: `lang_encoder") as caught:
        load(tmp_path / "partial")
    assert "--base-vision" in str(caught.value.hint)


def test_a_head_of_its_own_under_a_config_that_ties_it(files: Files, tmp_path: Path) -> None:
    folder = files.whole("opt")
    name = "lang_encoder.model.decoder.embed_tokens.weight"
    rows = load_file(folder / "model.safetensors")[name]
    untied = changed(folder, tmp_path / "untied", **{HEAD: rows + 1})
    with pytest.raises(CkptError, match="ties") as caught:
        load(untied)
    assert caught.value.code == "FC469"
    config = json.loads((untied / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (untied / "config.json").write_text(json.dumps(config))
    model = load(untied)
    assert torch.equal(model.get_output_embeddings().weight, rows + 1)
    model.save_pretrained(tmp_path / "saved")
    assert facts_at(tmp_path / "saved") == facts_at(untied)


@pytest.mark.parametrize("form", ["bin", "index", "shards", "argument", "file"])
def test_nothing_is_unpickled(
    files: Files, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    folder, options = tmp_path / "folder", {}
    shutil.copytree(files.whole("opt"), folder)
    if form != "argument":
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    if form == "index":
        (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
        index = {"weight_map": dict.fromkeys(state, "pytorch_model-00001-of-00001.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif form == "shards":  # an index by the name of safetensors
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, "pytorch_model.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif form == "argument":
        options = {"use_safetensors": False}
    elif form == "file":
        config = FlamingoConfig.from_pretrained(folder)
        folder, options = folder / "pytorch_model.bin", {"config": config}
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CkptError, match="nothing is unpickled") as caught:
        FlamingoForConditionalGeneration.from_pretrained(folder, **options)
    assert caught.value.code == "FC467"
    assert f"flamingo-ckpt convert {folder}" in str(caught.value.hint)


def test_weights_that_the_config_names_are_no_pickle_either(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(files.whole("opt"), folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "adapter_model.bin"})
    )
    with pytest.raises(CkptError) as caught:
        load(folder)
    assert caught.value.code == "FC467"
    (folder / "adapter_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(CkptError, match=r"adapter_model.bin") as caught:
        load(folder)
    assert caught.value.code == "FC467"


def test_code_of_a_repository_is_not_run(files: Files) -> None:
    with pytest.raises(CkptError, match="not run"):
        load(files.whole("opt"), trust_remote_code=True)
