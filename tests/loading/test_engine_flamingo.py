"""Checkpoints of what was trained, into a whole Flamingo: exactly what a base supplies may miss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt.errors import LoadError
from flamingo_ckpt.loading import LoadOptions, load_into
from tests import zoo
from tests.loading.engine_support import bits, on_meta, saved, scrambled

PARTIAL = LoadOptions(policy="partial")


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("era", ["now", "2023"])
def test_a_partial_checkpoint_fills_what_was_trained(family: str, era: str, tmp_path: Path) -> None:
    flamingo = zoo.openflamingo(family, era=era)
    path = saved(flamingo.partial, tmp_path, wrapper="model_state_dict", prefix="module.")
    model = scrambled(flamingo.model)
    before, wanted = bits(model), bits(flamingo.model)
    report = load_into(model, path, PARTIAL)
    after = bits(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= {name for name in after if after[name] == wanted[name]}
    assert set(report.absent_by_design.values()) == {"vision", "language"}
    for name in report.absent_by_design:
        assert after[name] == before[name]
    assert report.missing_keys == report.unexpected_keys == ()


def test_upstreams_way_hides_what_this_one_tells(tmp_path: Path) -> None:
    """A prefix in the middle of the released 3B's history: upstream's `strict=False` loads none."""
    flamingo = zoo.openflamingo("mpt7b")
    path = saved(flamingo.partial, tmp_path, prefix="module.")
    theirs, ours = scrambled(flamingo.model), scrambled(flamingo.model)
    before = bits(theirs)
    theirs.load_state_dict(torch.load(path), strict=False)
    assert bits(theirs) == before
    load_into(ours, path, PARTIAL)
    assert bits(ours) != before


def _without(state: dict[str, Any], part: str) -> dict[str, Any]:
    left = {name: tensor for name, tensor in state.items() if part not in name}
    assert len(left) < len(state)
    return left


@pytest.mark.parametrize(
    "part",
    [
        "perceiver.",
        "perceiver.latents",
        "gated_cross_attn_layer.",
        "layers.3.gated_cross_attn_layer.attn_gate",
        "embed_tokens",
    ],
)
def test_what_was_trained_must_be_there(part: str, tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")
    model = scrambled(flamingo.model)
    before = bits(model)
    path = saved(_without(flamingo.partial, part), tmp_path)
    with pytest.raises(LoadError, match="missing from the file") as caught:
        load_into(model, path, PARTIAL)
    assert part.rpartition(".")[2] in str(caught.value) or part in str(caught.value)
    assert bits(model) == before


def test_a_frozen_embedding_may_stay_the_bases(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")
    model = scrambled(flamingo.model)
    model.lang_encoder.get_input_embeddings().requires_grad_(False)
    path = saved(_without(flamingo.partial, "embed_tokens"), tmp_path)
    report = load_into(model, path, PARTIAL)
    assert report.absent_by_design["lang_encoder.model.embed_tokens.weight"] == "language"


def test_half_a_tower_is_not_absent_by_design(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")
    state = flamingo.full
    for part in ("vision_encoder.conv1.weight", "layers.1.decoder_layer.mlp.up_proj"):
        left = _without(state, part)
        left = {name: t for name, t in left.items() if "old_decoder_blocks" not in name}
        with pytest.raises(LoadError, match=r"[12] missing from the file"):
            load_into(scrambled(flamingo.model), saved(left, tmp_path), PARTIAL)


@pytest.mark.parametrize(("of_file", "of_model"), [(4, 1), (1, 4), (2, 1), (1, 2)])
def test_a_wrong_interval_is_told(of_file: int, of_model: int, tmp_path: Path) -> None:
    path = saved(zoo.openflamingo("opt", every_n=of_file).partial, tmp_path)
    model = scrambled(zoo.openflamingo("opt", every_n=of_model).model)
    before = bits(model)
    with pytest.raises(LoadError) as caught:
        load_into(model, path, PARTIAL)
    assert "cross_attn_every_n_layers" in str(caught.value.hint)
    assert bits(model) == before


def test_other_rows_are_refused_and_never_cut(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("mpt7b")
    state = dict(flamingo.partial)
    key = "lang_encoder.transformer.wte.weight"
    rows = len(state[key])
    state[key] = torch.cat([state[key], torch.ones(3, state[key].shape[1])])
    state.pop("lang_encoder.lm_head.weight", None)
    model = scrambled(flamingo.model)
    for policy in ("partial", "lenient"):
        with pytest.raises(LoadError, match=f"{rows + 3}x.* in the file, {rows}x") as caught:
            load_into(model, saved(state, tmp_path), LoadOptions(policy=policy))
        assert f"--vocab-rows {rows}" in str(caught.value.hint)


def test_another_language_model_is_refused(tmp_path: Path) -> None:
    """Of one width and one vocabulary, so that shapes would not tell."""
    llama = zoo.openflamingo("llama")
    model = scrambled(zoo.openflamingo("opt").model)
    for policy in ("partial", "lenient"):
        with pytest.raises(LoadError, match="language model is llama, the model's is opt"):
            load_into(model, saved(llama.partial, tmp_path), LoadOptions(policy=policy))


def test_strict_names_the_way_for_partial_files(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")
    with pytest.raises(LoadError) as caught:
        load_into(scrambled(flamingo.model), saved(flamingo.partial, tmp_path))
    assert "partial" in str(caught.value.hint)


def test_a_base_that_was_never_filled_is_told(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")
    model = on_meta(flamingo.model)
    with pytest.raises(LoadError, match="left without bytes"):
        load_into(model, saved(flamingo.partial, tmp_path), PARTIAL)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_alias_trees_must_hold_the_same_bits(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")
    state = dict(flamingo.full)
    key = "lang_encoder.old_decoder_blocks.1.mlp.up_proj.weight"
    path = saved(state, tmp_path, ".safetensors")  # every name with bytes of its own
    model = scrambled(flamingo.model)
    report = load_into(model, path)
    assert report.aliases[key].endswith("layers.1.decoder_layer.mlp.up_proj.weight")
    assert bits(model) == bits(flamingo.model)
    state[key] = state[key].clone()
    state[key][0, 0] += 1
    with pytest.raises(LoadError, match="two names of one tensor"):
        load_into(model, saved(state, tmp_path, ".safetensors"))


def test_the_new_tokens_layout_into_upstreams_module(tmp_path: Path) -> None:
    """Its trained rows stand apart, and which they are only a tokenizer tells."""
    flamingo = zoo.openflamingo("llama")
    path = saved(zoo.vlm("llama"), tmp_path)
    with pytest.raises(LoadError):
        load_into(scrambled(flamingo.model), path, PARTIAL)


def test_v1_with_its_whole_clip_inside(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")
    state = zoo.openflamingo_v1()
    model = copy.deepcopy(scrambled(flamingo.model))
    report = load_into(model, saved(state, tmp_path, prefix="module."), PARTIAL)
    assert report.layout == "openflamingo-v1"
    name = "perceiver.layers.0.0.to_kv.weight"
    assert torch.equal(model.state_dict()[name], state[name])


def test_a_language_model_that_no_table_knows(tmp_path: Path) -> None:
    flamingo = zoo.openflamingo("llama")

    def renamed(module: Any) -> Any:
        inner = module.lang_encoder.model
        inner.stack = inner.layers
        del inner.layers
        return module

    reference = renamed(copy.deepcopy(flamingo.model))
    model = scrambled(reference)
    state = {
        name.replace("lang_encoder.model.layers.", "lang_encoder.model.stack."): tensor
        for name, tensor in flamingo.partial.items()
    }
    report = load_into(model, saved(state, tmp_path), PARTIAL)
    after, wanted = bits(model), bits(reference)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= {name for name in after if after[name] == wanted[name]}
    assert report.missing_keys == ()
    path = saved(_without(state, "stack.1.gated_cross_attn_layer"), tmp_path)
    with pytest.raises(LoadError, match="missing"):
        load_into(model, path, PARTIAL)
