"""Conversions that once ended well and were wrong, or ended in a way that told nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import zoo
from tests.support import cli, cli_ok, facts_at, load_torch, torch_facts

EMBED, HEAD = "lang_encoder.model.decoder.embed_tokens.weight", "lang_encoder.lm_head.weight"


def opt(tmp_path: Path, drop: str = "") -> tuple[Path, list[Any]]:
    """A partial OPT checkpoint, and its bases as options."""
    model = zoo.openflamingo("opt")
    partial = {name: one for name, one in model.partial.items() if name != drop}
    zoo.save_torch(partial, tmp_path / "opt.pt")
    zoo.save_torch(model.clip, tmp_path / "clip.pt")
    zoo.save_torch(model.language, tmp_path / "lm.pt")
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    bases = ["--base-vision", tmp_path / "clip.pt", "--base-language", tmp_path / "lm.pt"]
    return tmp_path / "opt.pt", bases


@pytest.mark.parametrize("config", [True, False])
def test_a_frozen_embedding_under_its_second_name_keeps_its_new_rows(
    tmp_path: Path, config: bool
) -> None:
    src, bases = opt(tmp_path, drop=EMBED)
    more = ["--config", tmp_path / "config.json"] if config else []
    dst = tmp_path / "out.safetensors"
    cli_ok("convert", src, dst, "--to", "hf-flamingo", *bases, *more)
    wanted = zoo.openflamingo("opt").partial[HEAD]
    found = facts_at(dst)
    assert found[EMBED].shape == tuple(wanted.shape)
    assert found[EMBED] == found[HEAD]
    assert found[EMBED].data == wanted.numpy().tobytes()


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_tied_base_that_someone_untied(tmp_path: Path, is_copy: bool) -> None:
    """Its head is the embedding of the checkpoint, if it is a copy at all."""
    src, bases = opt(tmp_path, drop=HEAD)
    language = {name: one.clone() for name, one in zoo.openflamingo("opt").language.items()}
    if not is_copy:
        language["lm_head.weight"][0, 0] += 1
    save_file(language, tmp_path / "lm.safetensors")
    bases[-1] = tmp_path / "lm.safetensors"
    dst = tmp_path / "out.safetensors"
    outcome = cli("convert", src, dst, "--to", "hf-flamingo", "--json", *bases)
    if is_copy:
        assert outcome.code == 0
        assert HEAD not in facts_at(dst) or facts_at(dst)[HEAD] == facts_at(dst)[EMBED]
    else:
        assert (outcome.code, outcome.codes) == (2, ["FC202"])
        assert not dst.exists()


def test_a_stack_wants_every_layer_of_the_tower(tmp_path: Path) -> None:
    model = zoo.paligemma()
    state = model.layout("L1")
    last = max(name for name in state if name.endswith("layer_norm1.bias"))
    del state[last]
    zoo.save_folder(state, model.config, tmp_path / "pg")
    outcome = cli("convert", tmp_path / "pg", tmp_path / "x.npz", "--to", "paligemma-npz", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC415"])
    assert "parts are there" in outcome.document["findings"][0]["detail"]
    zoo.save_npz(model.npz(), tmp_path / "whole.npz")
    for level in ("keys", "headers", "bits"):
        for pair in (("pg", "whole.npz"), ("whole.npz", "pg")):
            there = [tmp_path / name for name in pair]
            assert cli("diff", *there, "--level", level, "-q").code == 1


def test_padding_rows_need_no_config(tmp_path: Path) -> None:
    model = zoo.paligemma()
    zoo.save_npz(model.npz(), tmp_path / "pg.npz")
    hf, embed = tmp_path / "hf.safetensors", "language_model.model.embed_tokens.weight"
    document = cli_ok("convert", tmp_path / "pg.npz", hf, "--to", "paligemma", "--json").document
    (told,) = [one for one in document["findings"] if one["code"] == "FC418"]
    assert (told["key"], told["data"]["zero_rows"]) == (embed, 64)
    assert facts_at(hf)[embed] == facts_at_layout(model)[embed]
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    back = tmp_path / "back.npz"
    cli_ok(*("convert", hf, back, "--to", "paligemma-npz", "--config", tmp_path / "config.json"))
    cli_ok("diff", back, tmp_path / "pg.npz", "--level", "bits")


def test_heads_that_contradict_each_other(tmp_path: Path) -> None:
    arrays = zoo.siglip().npz(stacked=False, prefix="")
    name = next(n for n in arrays if n.endswith("MultiHeadDotProductAttention_0/query/kernel"))
    width, heads, size = arrays[name].shape
    assert heads != size
    arrays[name] = arrays[name].reshape(width, size, heads)
    zoo.save_npz(arrays, tmp_path / "odd.npz")
    outcome = cli(
        *("convert", tmp_path / "odd.npz", tmp_path / "x.safetensors"),
        *("--to", "open_clip-siglip", "--json"),
    )
    assert (outcome.code, outcome.codes) == (2, ["FC415"])
    assert "heads here" in outcome.document["findings"][0]["detail"]


def test_a_wrong_from_does_not_pass_for_being_there_already(tmp_path: Path) -> None:
    src, _ = opt(tmp_path)
    outcome = cli(
        *("convert", src, tmp_path / "x.safetensors", "--json"),
        *("--from", "hf-flamingo", "--to", "hf-flamingo"),
    )
    assert outcome.code == 2
    assert not (tmp_path / "x.safetensors").exists()


def test_rows_that_were_cut_come_back_with_a_warning(tmp_path: Path) -> None:
    src, _ = opt(tmp_path)
    hf = tmp_path / "hf.safetensors"
    cli_ok("convert", src, hf, "--to", "hf-flamingo", "--vocab-rows", 80)
    document = cli_ok(
        "convert", hf, tmp_path / "back.pt", "--to", "openflamingo", "--json"
    ).document
    told = [f for f in document["findings"] if f["code"] == "FC418"]
    assert {one["severity"] for one in told} == {"warning"}
    assert "lost" in told[0]["detail"]
    rows = load_torch(tmp_path / "back.pt")[EMBED]
    assert len(rows) == zoo.flamingo_rows("opt")
    assert not rows[80:].any()


@pytest.mark.parametrize("rows", ["0", "999999999"])
def test_rows_in_metadata_are_not_believed_at_any_price(tmp_path: Path, rows: str) -> None:
    src, _ = opt(tmp_path)
    cli_ok("convert", src, tmp_path / "hf.safetensors", "--to", "hf-flamingo")
    state = {name: one.clone() for name, one in _tensors(tmp_path / "hf.safetensors").items()}
    save_file(state, tmp_path / "odd.safetensors", {"flamingo_ckpt.vocab_rows": rows})
    outcome = cli(
        *("convert", tmp_path / "odd.safetensors", tmp_path / "x.pt"),
        *("--to", "openflamingo", "--dry-run", "--json"),
    )
    assert (outcome.code, outcome.codes) == (2, ["FC418"])


def test_deep_metadata_is_no_internal_error(tmp_path: Path) -> None:
    src, _ = opt(tmp_path)
    cli_ok("convert", src, tmp_path / "hf.safetensors", "--to", "hf-flamingo")
    state = {name: one.clone() for name, one in _tensors(tmp_path / "hf.safetensors").items()}
    save_file(state, tmp_path / "odd.safetensors", {"flamingo_ckpt.base": "[" * 100_000})
    cli_ok("convert", tmp_path / "odd.safetensors", tmp_path / "x.pt", "--to", "openflamingo")


@pytest.mark.parametrize("name", ["hf-hub:a/b", "HF_HUB:a/b", "local-dir:/etc", "../x"])
def test_a_config_names_no_place(tmp_path: Path, name: str) -> None:
    content = {**zoo.siglip().config}
    content["vision_cfg"] = {**content["vision_cfg"], "timm_model_name": name}
    (tmp_path / "config.json").write_text(json.dumps(content))
    outcome = cli("inspect", f"model:{tmp_path / 'config.json'}", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC405"])


@pytest.mark.parametrize("format", ["safetensors", "torch", "npz"])
def test_a_partial_folder_is_partial_in_every_format(tmp_path: Path, format: str) -> None:
    src, _ = opt(tmp_path)
    cli_ok("convert", src, tmp_path / "hf", "--to", "hf-flamingo", "--format", format)
    model = f"model:{tmp_path / 'config.json'}"
    document = cli_ok("diff", tmp_path / "hf", model, "--json").document
    assert document["summary"]["expected_absent"] > 0


def facts_at_layout(model: Any) -> dict[str, Any]:
    return torch_facts(model.layout("L1"))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
