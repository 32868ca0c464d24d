"""verify through the map: every bit is accounted for, also those that a base supplied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import zoo
from tests.support import Outcome, cli, cli_ok, tree


class Case:
    """A self-contained folder, what it was made of, and the options that made it."""

    def __init__(self, folder: Path) -> None:
        model = zoo.openflamingo("llama")
        self.src = zoo.save_torch(model.partial, folder / "partial.pt")
        config = folder / "config.json"
        config.write_text(json.dumps(model.config))
        self.clip = ["--base-vision", zoo.save_torch(model.clip, folder / "clip.pt")]
        self.language = ["--base-language", zoo.save_torch(model.language, folder / "lm.pt")]
        self.config: list[Any] = ["--config", config]
        self.bases = [*self.clip, *self.language]
        self.dst = folder / "hf"
        cli_ok("convert", self.src, self.dst, "--to", "hf-flamingo", *self.config, *self.bases)
        with safe_open(self.dst / "model.safetensors", "pt") as file:
            self.state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()

    def changed(self, folder: Path, **changes: Any) -> Path:
        """The folder with some tensors replaced, or removed where the change is None."""
        state = {n: t.clone() for n, t in self.state.items()} | changes
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        folder.mkdir()
        save_file(kept, folder / "model.safetensors", metadata=self.metadata)
        return folder

    def verify(self, dst: Path, *options: Any) -> Outcome:
        return cli("verify", self.src, dst, *options, "--json")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


GATE = "lang_encoder.model.layers.3.gated_cross_attn_layer.attn_gate"
TOWER = "vision_encoder.vision_model.encoder.layers.1.self_attn."
DECODER = "lang_encoder.model.layers.2.decoder_layer.self_attn."


@pytest.mark.parametrize("told", ["layout, config", "layout", "config", "neither"])
def test_the_image_is_faithful_with_its_bases(case: Case, told: str) -> None:
    """DST's own layout is taken where --to is not given; a config is not needed for it."""
    options = [*(["--to", "hf-flamingo"] if "layout" in told else [])]
    options += case.config if "config" in told else []
    outcome = case.verify(case.dst, *case.bases, *options)
    assert outcome.code == 0, outcome
    document = outcome.document
    assert document["verdict"] == "pass"
    assert document["summary"] == {
        "bit_exact": len(case.state),
        "cast": 0,
        "different": 0,
        "missing": 0,
        "unexpected": 0,
    }
    assert [one["layout"] for one in document["inputs"]] == [
        "openflamingo",
        "open_clip",
        "language-model",
        "hf-flamingo",
    ]


def test_what_only_a_base_can_prove_is_incomplete_without_it(case: Case) -> None:
    tower = {name for name in case.state if name.startswith("vision_encoder.")}
    words = {n for n in case.state if ".decoder_layer." in n or "model.norm" in n or "lm_head" in n}
    for options, unproven in (
        ([], tower | words),
        (case.clip, words),
        (case.language, tower),
    ):
        outcome = case.verify(case.dst, *options)
        document = outcome.document
        assert (outcome.code, document["verdict"]) == (3, "incomplete")
        assert {*document["unverified"]} == unproven
        assert document["summary"]["bit_exact"] == len(case.state) - len(unproven)
        assert {f["code"] for f in document["findings"]} == {"FC215"}
        hints = {f["key"]: f["hint"] for f in document["findings"]}
        assert all("--base-vision" in hints[name] for name in unproven & tower)
        assert all("--base-language" in hints[name] for name in unproven & words)


def test_people_are_told_what_to_give(case: Case) -> None:
    outcome = cli("verify", case.src, case.dst)
    assert outcome.code == 3
    assert "--base-vision" in outcome.out + outcome.err
    assert "incomplete" in outcome.out + outcome.err


@pytest.mark.parametrize(
    "name",
    [
        "perceiver.latents",
        "perceiver.layers.5.feed_forward.3.weight",
        GATE,
        "lang_encoder.model.embed_tokens.weight",
        DECODER + "v_proj.weight",
        "lang_encoder.model.norm.weight",
        "lang_encoder.lm_head.weight",
        "vision_encoder.vision_model.embeddings.class_embedding",
        "vision_encoder.vision_model.post_layernorm.bias",
        TOWER + "k_proj.bias",
    ],
)
def test_one_flipped_bit_anywhere(case: Case, name: str, tmp_path: Path) -> None:
    tensor = case.state[name].clone()
    at = tensor.numel() // 2
    tensor.flatten().view(torch.int32)[at] ^= 1
    assert not torch.equal(tensor, case.state[name])
    dst = case.changed(tmp_path / "hf", **{name: tensor})
    outcome = case.verify(dst, *case.bases)
    assert (outcome.code, outcome.document["verdict"]) == (1, "fail")
    (finding,) = outcome.document["findings"]
    assert (finding["code"], finding["key"]) == ("FC301", name)
    assert finding["data"]["num_elements_different"] == 1
    place = torch.unravel_index(torch.tensor(at), tensor.shape)
    assert finding["data"]["first_index"] == [int(index) for index in place]
    assert outcome.document["summary"]["different"] == 1


def test_a_zero_row_that_is_no_longer_zero(case: Case, tmp_path: Path) -> None:
    """Rows that no source has are proven too: to be zeros."""
    name = "lang_encoder.lm_head.weight"
    tensor = case.state[name].clone()
    tensor[95, 0] = 1e-30
    outcome = case.verify(case.changed(tmp_path / "hf", **{name: tensor}), *case.bases)
    assert outcome.code == 1
    (finding,) = outcome.document["findings"]
    assert finding["data"]["first_index"] == [95, 0]
    assert "0.0 (0x00000000) expected" in finding["detail"]


@pytest.mark.parametrize("place", [TOWER, DECODER])
def test_swapped_queries_and_keys(case: Case, place: str, tmp_path: Path) -> None:
    q, k = f"{place}q_proj.weight", f"{place}k_proj.weight"
    dst = case.changed(tmp_path / "hf", **{q: case.state[k], k: case.state[q]})
    outcome = case.verify(dst, *case.bases)
    assert outcome.code == 1
    assert {f["key"]: f["code"] for f in outcome.document["findings"]} == {q: "FC301", k: "FC301"}


def test_a_transposed_square(case: Case, tmp_path: Path) -> None:
    name = f"{TOWER}out_proj.weight"
    dst = case.changed(tmp_path / "hf", **{name: case.state[name].T.contiguous()})
    outcome = case.verify(dst, *case.bases)
    assert [(f["code"], f["key"]) for f in outcome.document["findings"]] == [("FC301", name)]
    assert outcome.code == 1


def test_a_difference_outweighs_what_could_not_be_compared(case: Case, tmp_path: Path) -> None:
    dst = case.changed(tmp_path / "hf", **{GATE: case.state[GATE] + 1})
    outcome = case.verify(dst)
    assert (outcome.code, outcome.document["verdict"]) == (1, "fail")
    assert {"FC301", "FC215"} == {*outcome.codes}


def test_missing_unexpected_and_misshapen(case: Case, tmp_path: Path) -> None:
    latents = "perceiver.latents"
    changes = {
        GATE: None,
        f"{TOWER}q_proj.bias": None,
        "perceiver.extra": torch.ones(1),
        "vision_encoder.extra": torch.ones(1),
        latents: case.state[latents][:32].clone(),
        "perceiver.norm.bias": case.state["perceiver.norm.bias"].bfloat16(),
    }
    outcome = case.verify(case.changed(tmp_path / "hf", **changes), *case.bases)
    assert outcome.code == 1
    assert {(f["code"], f["key"]) for f in outcome.document["findings"]} == {
        ("FC203", GATE),
        ("FC203", f"{TOWER}q_proj.bias"),
        ("FC204", "perceiver.extra"),
        ("FC204", "vision_encoder.extra"),
        ("FC205", latents),
        ("FC206", "perceiver.norm.bias"),
    }
    summary = outcome.document["summary"]
    assert (summary["missing"], summary["unexpected"], summary["different"]) == (2, 2, 2)


def test_other_bases_than_those_it_was_made_of(case: Case, tmp_path: Path) -> None:
    other = zoo.openflamingo("llama", seed=5)
    clip = zoo.save_torch(other.clip, tmp_path / "clip.pt")
    outcome = case.verify(case.dst, "--base-vision", clip, *case.language)
    assert outcome.code == 1
    keys = {f["key"] for f in outcome.document["findings"]}
    assert keys == {name for name in case.state if name.startswith("vision_encoder.")}


def test_the_way_back_is_verified_too(case: Case, tmp_path: Path) -> None:
    back = tmp_path / "back.pt"
    cli_ok("convert", case.dst, back, "--to", "openflamingo")
    cli_ok("verify", case.dst, back)
    cli_ok("verify", case.src, back)
    state = zoo.openflamingo("llama").partial
    name = "perceiver.layers.0.0.to_kv.weight"
    state[name] = state[name].flip(0)
    zoo.save_torch(state, tmp_path / "wrong.pt")
    outcome = cli("verify", case.dst, tmp_path / "wrong.pt", "--json")
    assert (outcome.code, outcome.codes) == (1, ["FC301"])


def test_fused_and_stacked_tensors_are_verified_bit_by_bit(tmp_path: Path) -> None:
    """The place of a flipped bit is told in the destination's own shape."""
    import numpy as np

    gemma = zoo.paligemma()
    src = zoo.save_folder(gemma.layout("L1"), gemma.config, tmp_path / "src")
    dst = tmp_path / "out.npz"
    cli_ok("convert", src, dst, "--to", "paligemma-npz")
    cli_ok("verify", src, dst)
    arrays = dict(np.load(dst))
    name = "params/llm/layers/attn/kv_einsum/w"
    arrays[name].view(np.int32)[2, 1, 0, 7, 3] ^= 1 << 20
    outcome = cli("verify", src, zoo.save_npz(arrays, tmp_path / "bad.npz"), "--json")
    assert outcome.code == 1
    (finding,) = outcome.document["findings"]
    assert finding["key"] == name
    assert finding["data"]["first_index"] == [2, 1, 0, 7, 3]
    assert finding["data"]["num_elements_different"] == 1


@pytest.mark.parametrize("state", ["idefics", "lucidrains", "flamingo_mini"])
def test_a_plain_copy_of_any_layout_is_verified(state: str, tmp_path: Path) -> None:
    """Without --to nothing is mapped, whatever the layout is good for."""
    src = zoo.save_torch(getattr(zoo, state)(), tmp_path / "a.pt")
    for name in ("b.pt", "c.safetensors"):
        cli_ok("convert", src, tmp_path / name)
        outcome = cli("verify", src, tmp_path / name, "--json")
        assert outcome.code == 0, outcome


def test_a_copy_with_a_key_that_no_rule_knows_is_verified(tmp_path: Path) -> None:
    state = zoo.openflamingo("opt").partial | {"ema.decay": torch.tensor(0.5)}
    src = zoo.save_torch(state, tmp_path / "a.pt")
    cli_ok("convert", src, tmp_path / "b.pt")
    cli_ok("verify", src, tmp_path / "b.pt")
    state["ema.decay"] = torch.tensor(0.25)
    zoo.save_torch(state, tmp_path / "c.pt")
    assert cli("verify", src, tmp_path / "c.pt").code == 1


def test_nothing_is_written(case: Case, tmp_path: Path) -> None:
    before = tree(case.dst)
    case.verify(case.dst, *case.bases)
    assert tree(case.dst) == before
