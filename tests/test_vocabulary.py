"""Rows of the vocabulary: whose they are, how many, and the way back to what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.formats import open_checkpoint
from tests import zoo
from tests.support import Facts, Outcome, cli, cli_ok, facts_at, names_in, torch_facts

EMBED, HEAD = "lang_encoder.model.embed_tokens.weight", "lang_encoder.lm_head.weight"
ROWS, BASE_ROWS = 96, 93


class Llama:
    """A checkpoint whose tokenizer grew by three, and the releases under it."""

    def __init__(self, folder: Path) -> None:
        model = zoo.openflamingo("llama")
        self.partial = zoo.save_torch(model.partial, folder / "partial.pt")
        self.full = zoo.save_torch(model.full, folder / "full.pt")
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(model.config))
        clip = zoo.save_torch(model.clip, folder / "clip.pt")
        language = zoo.save_torch(model.language, folder / "lm.pt")
        self.bases: list[Any] = ["--base-vision", clip, "--base-language", language]

    def convert(self, src: Path, dst: Path, *options: Any) -> Outcome:
        return cli_ok("convert", src, dst, "--to", "hf-flamingo", *options, "--json")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(tmp_path_factory.mktemp("llama"))


def metadata(path: Path) -> Any:
    return open_checkpoint(str(path)).metadata


def rows(facts: Facts, start: int, stop: int) -> bytes:
    size = len(facts.data) // facts.shape[0]
    return facts.data[start * size : stop * size]


def findings(outcome: Outcome, code: str) -> dict[Any, Any]:
    return {f["key"]: f for f in outcome.document["findings"] if f["code"] == code}


def test_the_checkpoints_rows_win_and_a_head_of_its_own_grows_by_zeros(
    llama: Llama, tmp_path: Path
) -> None:
    dst = tmp_path / "hf"
    outcome = llama.convert(llama.partial, dst, "--config", llama.config, *llama.bases)
    found, model = facts_at(dst), zoo.openflamingo("llama")
    assert found[EMBED] == torch_facts(model.partial)[EMBED]
    base = torch_facts(model.language)["lm_head.weight"]
    assert found[HEAD].shape == (ROWS, 48)
    assert rows(found[HEAD], 0, BASE_ROWS) == base.data
    assert rows(found[HEAD], BASE_ROWS, ROWS) == bytes(3 * 48 * 4)
    told = findings(outcome, "FC418")
    assert told.keys() == {HEAD}
    assert told[HEAD]["severity"] == "warning"
    assert "3 rows of zeros follow its 93" in told[HEAD]["detail"]
    assert metadata(dst)["flamingo_ckpt.zero_rows"] == f"{HEAD}:93-95"
    assert json.loads((dst / "config.json").read_text())["text_config"]["vocab_size"] == ROWS


def test_a_head_of_two_tensors_names_both(tmp_path: Path) -> None:
    model = zoo.openflamingo("gptj")
    state = {n: t[:90] if n.startswith("lm_head") else t for n, t in model.language.items()}
    src = zoo.save_torch(model.partial, tmp_path / "partial.pt")
    base = zoo.save_torch(state, tmp_path / "lm.pt")
    dst = tmp_path / "out.safetensors"
    cli_ok("convert", src, dst, "--to", "hf-flamingo", "--base-language", base)
    found, zero = facts_at(dst), metadata(dst)["flamingo_ckpt.zero_rows"]
    for name in ("lang_encoder.lm_head.weight", "lang_encoder.lm_head.bias"):
        assert found[name].shape[0] == ROWS
        assert rows(found[name], 90, 96).strip(b"\0") == b""
        assert f"{name}:90-95" in zero.split(",")


def test_a_longer_head_of_a_base_is_cut(tmp_path: Path) -> None:
    model = zoo.openflamingo("gpt_neox")
    src = zoo.save_torch(model.partial, tmp_path / "partial.pt")
    base = zoo.save_torch(model.language, tmp_path / "lm.pt")
    dst = tmp_path / "out.safetensors"
    outcome = cli_ok("convert", src, dst, "--to", "hf-flamingo", "--base-language", base, "--json")
    head = "lang_encoder.embed_out.weight"
    told = findings(outcome, "FC418")[head]
    assert "the last 32 of 128 rows are cut off" in told["detail"]
    assert told["severity"] == "info"
    found = facts_at(dst)[head]
    assert found.data == rows(torch_facts(model.language)["lm_head.weight"], 0, ROWS)
    assert "flamingo_ckpt.zero_rows" not in metadata(dst)


def test_rows_are_padded_and_the_way_back_cuts_them(llama: Llama, tmp_path: Path) -> None:
    dst, back = tmp_path / "hf", tmp_path / "back.pt"
    outcome = llama.convert(llama.partial, dst, "--vocab-rows", 128)
    assert "32 rows of zeros follow its 96" in findings(outcome, "FC418")[EMBED]["detail"]
    before, found = facts_at(llama.partial)[EMBED], facts_at(dst)[EMBED]
    assert found.shape == (128, 48)
    assert found.data == before.data + bytes(32 * 48 * 4)
    assert metadata(dst)["flamingo_ckpt.vocab_rows"] == "96"
    assert json.loads((dst / "config.json").read_text())["text_config"]["vocab_size"] == 128
    cli_ok("verify", llama.partial, dst, "--vocab-rows", 128)
    outcome = cli("verify", llama.partial, dst, "--json")
    assert (outcome.code, outcome.codes) == (1, ["FC205"])
    cli_ok("convert", dst, back, "--to", "openflamingo")
    assert facts_at(back) == facts_at(llama.partial)


def test_rows_of_both_sides_and_of_the_config(llama: Llama, tmp_path: Path) -> None:
    dst, back = tmp_path / "hf", tmp_path / "back.safetensors"
    more = ["--config", llama.config, *llama.bases]
    llama.convert(llama.partial, dst, *more, "--vocab-rows", 128)
    found = facts_at(dst)
    assert found[EMBED].shape == found[HEAD].shape == (128, 48)
    assert rows(found[HEAD], BASE_ROWS, 128).strip(b"\0") == b""
    assert metadata(dst)["flamingo_ckpt.zero_rows"] == f"{HEAD}:93-127"
    assert json.loads((dst / "config.json").read_text())["text_config"]["vocab_size"] == 128
    cli_ok("verify", llama.partial, dst, *more, "--vocab-rows", 128)
    cli_ok("convert", dst, back, "--to", "openflamingo")
    assert facts_at(back) == facts_at(llama.partial)


def test_rows_are_cut_and_the_way_back_pads_them(llama: Llama, tmp_path: Path) -> None:
    dst, back = tmp_path / "hf.safetensors", tmp_path / "back.pt"
    outcome = llama.convert(llama.full, dst, "--vocab-rows", 90)
    told = findings(outcome, "FC418")
    assert told.keys() == {EMBED, HEAD}
    assert {f["severity"] for f in told.values()} == {"warning"}
    assert "the last 6 of 96 rows are cut off" in told[EMBED]["detail"]
    before, found = facts_at(llama.full), facts_at(dst)
    assert all(found[name].data == rows(before[name], 0, 90) for name in (EMBED, HEAD))
    assert metadata(dst)["flamingo_ckpt.vocab_rows"] == "96"
    cli_ok("convert", dst, back, "--to", "openflamingo-full")
    again = facts_at(back)
    for name in (EMBED, HEAD):
        assert again[name].data == found[name].data + bytes(6 * 48 * 4)


def test_what_was_remembered_says_nothing_to_a_copy(llama: Llama, tmp_path: Path) -> None:
    dst, copy, same = (tmp_path / name for name in ("hf", "copy", "same"))
    llama.convert(llama.partial, dst, "--vocab-rows", 128)
    cli_ok("convert", dst, copy)
    cli_ok("verify", dst, copy)
    llama.convert(dst, same)
    cli_ok("verify", dst, same)
    assert facts_at(dst) == facts_at(copy) == facts_at(same)
    for one in (copy, same):
        assert metadata(one)["flamingo_ckpt.vocab_rows"] == "96"
        cli_ok("convert", one, tmp_path / f"{one.name}.pt", "--to", "openflamingo")
        assert facts_at(tmp_path / f"{one.name}.pt") == facts_at(llama.partial)


def test_rows_of_a_file_that_stays_in_its_layout(llama: Llama, tmp_path: Path) -> None:
    """The config beside it says the same as the weights."""
    dst, longer = tmp_path / "hf", tmp_path / "longer"
    llama.convert(llama.partial, dst, "--config", llama.config, *llama.bases)
    llama.convert(dst, longer, "--vocab-rows", 100)
    found = facts_at(longer)
    assert found[EMBED].shape == found[HEAD].shape == (100, 48)
    assert json.loads((longer / "config.json").read_text())["text_config"]["vocab_size"] == 100


def test_rows_that_were_used_in_between_are_not_thrown_away(llama: Llama, tmp_path: Path) -> None:
    """Padding that somebody trained is no padding: the way back is refused, or asked for."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    dst, trained, back = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.pt"))
    llama.convert(llama.partial, dst, "--vocab-rows", 128)
    with safe_open(dst, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = file.metadata()
    state[EMBED][127, 47] = -0.0
    save_file(state, trained, metadata=told)
    outcome = cli("convert", trained, back, "--to", "openflamingo", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC419"])
    finding = outcome.document["findings"][0]
    assert EMBED in finding["detail"]
    assert "--vocab-rows" in finding["hint"]
    assert not back.exists()
    cli_ok("convert", trained, back, "--to", "openflamingo", "--vocab-rows", 96)
    assert facts_at(back) == facts_at(llama.partial)


@pytest.mark.parametrize("told", ["-1", "1e3", "", "٩٦", "999999999999", "0x10", "96 "])
def test_a_note_that_is_no_number_is_not_followed(llama: Llama, told: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"perceiver.latents": torch.randn(4, 64), EMBED: torch.randn(96, 48)}
    src = tmp_path / "src.safetensors"
    state["perceiver.layers.0.to_q.weight"] = torch.randn(8, 64)
    save_file(state, src, metadata={"flamingo_ckpt.vocab_rows": told})
    cli_ok("convert", src, tmp_path / "out.pt", "--to", "openflamingo")
    assert facts_at(tmp_path / "out.pt")[EMBED].shape == (96, 48)


def test_rows_without_a_vocabulary(tmp_path: Path) -> None:
    state = zoo.openflamingo("llama").partial
    del state[EMBED]
    src = zoo.save_torch(state, tmp_path / "src.pt")
    outcome = cli(
        "convert", src, tmp_path / "out", "--to", "hf-flamingo", "--vocab-rows", 9, "--json"
    )
    assert (outcome.code, outcome.codes) == (2, ["FC418"])
    assert names_in(tmp_path) == ["src.pt"]


def test_two_sides_that_disagree_are_refused(tmp_path: Path) -> None:
    state = zoo.openflamingo("llama").full
    state[HEAD] = state[HEAD][:93].clone()
    src = zoo.save_torch(state, tmp_path / "src.pt")
    for more in ([], ["--vocab-rows", "96"]):
        outcome = cli(
            "convert", src, tmp_path / "o.safetensors", "--to", "hf-flamingo", *more, "--json"
        )
        assert (outcome.code, outcome.codes) == (2, ["FC418"])
        detail = outcome.document["findings"][0]["detail"]
        assert f"`{EMBED}` has 96 rows" in detail
        assert f"`{HEAD}` has 93 rows" in detail


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    model = zoo.openflamingo("mpt7b")
    src, dst = zoo.save_torch(model.full, tmp_path / "full.pt"), tmp_path / "out.pt"
    outcome = cli_ok("convert", src, dst, "--to", "hf-flamingo", "--vocab-rows", 128, "--json")
    wte, head = "lang_encoder.transformer.wte.weight", "lang_encoder.lm_head.weight"
    manifest = open_checkpoint(str(dst))
    assert [sorted(group) for group in manifest.tied_groups()] == [sorted([wte, head])]
    assert facts_at(dst)[head].shape == (128, 48)
    assert outcome.document["summary"]["num_tensors"] == len(manifest.tensors)
