"""parity: every fault planted in a Flamingo is found, and blamed on the tensor that it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import zoo
from tests.parity.planting import (
    VISION,
    State,
    embedding,
    flip,
    gated,
    layer,
    scale,
    swap,
    swap_key_and_value,
    swap_query_and_key,
    transpose,
    unload,
)
from tests.parity.sides import SMALL, Sides, assert_blamed, fault, parity

#: A tensor differs, the forward shows it.
SEEN = ("FC301", "FC480")
SETTING = ("FC407", "FC480")
LAYERS = f"{VISION}encoder.layers."
POSITIONS = f"{VISION}embeddings.position_embedding.weight"


def test_query_and_key_of_the_tower(sides: Sides) -> None:
    names = [f"{LAYERS}1.self_attn.{name}_proj.weight" for name in "qk"]
    answer = sides.flamingo("llama").answer(lambda state: swap(state, *names) and None)
    assert_blamed(answer, SEEN, fault("vision.layers.1", names, "are swapped", ".q.", ".k."))
    assert answer.diverges_at == {"as-is": "vision.layers.1", "forced": "vision.layers.1"}
    assert set(answer.told("FC301")) == set(names)


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("perceiver.layers.1", "perceiver.layers.1.to_kv.weight"),
        ("xattn.1", gated("llama", 1, "attn.to_kv.weight")),
    ],
)
def test_key_and_value_of_a_fused_matrix(stage: str, key: str, sides: Sides) -> None:
    answer = sides.flamingo("llama").answer(lambda state: swap_key_and_value(state, key))
    words = ("are swapped", f"`{stage}.attn.k.weight`", f"`{stage}.attn.v.weight`")
    assert_blamed(answer, SEEN, fault(stage, key, *words))
    assert answer.diverges_at == {"as-is": stage, "forced": stage}


def test_a_square_matrix_that_is_transposed(sides: Sides) -> None:
    key = f"{LAYERS}2.self_attn.v_proj.weight"
    answer = sides.flamingo("llama").alike(lambda state: transpose(state, key))
    assert_blamed(answer, SEEN, fault("vision.layers.2", key, "is transposed"))


@pytest.mark.parametrize(
    ("field", "value", "stage"),
    [
        ("hidden_act", "gelu", "vision.layers.0"),
        ("layer_norm_eps", 1e-6, "vision.pre_norm"),
    ],
)
def test_a_wrong_setting_of_the_tower(field: str, value: object, stage: str, sides: Sides) -> None:
    answer = sides.flamingo("llama").alike(
        None, lambda config: config["vision_config"].update({field: value})
    )
    assert_blamed(answer, SETTING, fault(stage, (), f"`vision.{field}` is {value!r} in B's config"))
    assert f"`vision.{field}`" in answer.detail("FC407")


def test_tokens_from_behind_the_last_norm(sides: Sides) -> None:
    answer = sides.flamingo("llama").alike(
        None, lambda config: config.update(vision_tokens="after_ln_post")
    )
    words = "`vision.tokens` is 'after_ln_post' in B's config and 'before_ln_post' in A's"
    assert_blamed(answer, SETTING, fault("vision.tokens", (), words))


def test_the_perceiver_is_given_other_tokens_though_no_config_says_so(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that takes the wrong ones by itself, as a fresh open_clip does for upstream."""
    from flamingo_ckpt.models.modules.hf_flamingo import FlamingoForConditionalGeneration

    made = FlamingoForConditionalGeneration.__init__

    def wrong(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self._normalises_tokens = True

    monkeypatch.setattr(FlamingoForConditionalGeneration, "__init__", wrong)
    pair = sides.flamingo("llama")
    answer = parity(pair.a, pair.b, *pair.options, "--greedy", "0")
    assert_blamed(answer, ("FC480",), fault("vision.tokens", (), "ln_post"))


def test_too_wide_an_interval(sides: Sides) -> None:
    """B's weights are behind every layer, and its config says every second."""
    answer = sides.flamingo("llama").answer(
        None, lambda config: config.update(cross_attn_every_n_layers=2)
    )
    words = "`cross_attn_every_n_layers` is 2 in B's config and 1 in A's"
    assert_blamed(answer, ("FC203", "FC204", "FC407", "FC480"), fault("xattn.0", (), words))
    block = gated("llama", 0, "")
    assert {key for key in answer.told("FC204") if key.startswith(block)} == {
        key for key in sides.flamingo("llama").state if key.startswith(block)
    }


def test_too_narrow_an_interval(sides: Sides) -> None:
    pair = sides.flamingo("llama", every_n=2)
    answer = pair.answer(None, lambda config: config.update(cross_attn_every_n_layers=1))
    words = "`cross_attn_every_n_layers` is 1 in B's config and 2 in A's"
    assert_blamed(answer, ("FC203", "FC407"), fault("logits", (), words, gates="forced"))
    assert len(answer.told("FC203")) == 11
    assert all(key.startswith(gated("llama", 0, "")) for key in answer.told("FC203"))


def test_a_table_of_positions_of_another_grid(sides: Sides) -> None:
    """The table was left as it was at 40x40, and so was the config."""

    def plant(state: State) -> None:
        state[POSITIONS] = torch.cat((state[POSITIONS], torch.randn(9, 64)))

    pair = sides.flamingo("llama")
    both = pair.answer(plant, lambda config: config["vision_config"].update(image_size=40))
    words = "`vision.image_size` is 40 in B's config and 32 in A's"
    assert_blamed(both, ("FC301", *SETTING), fault("vision.embeddings", POSITIONS, words))
    alone = pair.answer(plant)
    wanted = fault("logits", POSITIONS, "17x64 in A, 26x64 in B", "not resized", gates="forced")
    assert_blamed(alone, ("FC205",), wanted)
    assert alone.told("FC205") == [POSITIONS]


def test_the_lowest_bit_of_one_element(sides: Sides) -> None:
    """No forward sees it; the bits do, and nothing is blamed for a difference that is none."""
    key = gated("llama", 1, "feed_forward.3.weight")
    answer = sides.flamingo("llama").answer(lambda state: flip(state, key, 0))
    assert (answer.code, answer.codes) == (1, ["FC301"])
    assert answer.told("FC301") == [key]
    assert "one bit, number 0, at [0, 7]" in answer.detail("FC301")
    assert all(one["agrees"] for one in answer.passes)
    assert answer.blame == []
    assert answer.document["parameters"]["compared"] - answer.document["parameters"]["equal"] == 1


def test_a_high_bit_of_one_element(sides: Sides) -> None:
    key = f"{LAYERS}0.mlp.fc1.weight"
    answer = sides.flamingo("llama").alike(lambda state: flip(state, key, 29))
    assert_blamed(answer, SEEN, fault("vision.layers.0", key, "a bit is flipped"))


def test_a_value_that_is_no_number(sides: Sides) -> None:
    key, value = "perceiver.norm.weight", "inf"

    def plant(state: State) -> None:
        state[key] = state[key].clone()
        state[key][3] = float(value)

    answer = sides.flamingo("llama").alike(plant)
    assert_blamed(answer, SEEN, fault("perceiver.norm", key, "differs"))
    assert answer.passes[0]["max_rel"] == "nan"
    assert f"{value} in B" in answer.detail("FC301")


@pytest.mark.parametrize(
    ("norm", "stage"),
    [
        ("perceiver.layers.1.norm_media", "perceiver.layers.1"),
        (gated("llama", 0, "feed_forward.0"), "xattn.0"),
    ],
)
def test_a_norm_that_was_not_loaded(norm: str, stage: str, sides: Sides) -> None:
    pair = sides.flamingo("llama")
    answer = pair.alike(lambda state: unload(state, norm) and None)
    keys = [f"{norm}.weight", f"{norm}.bias"]
    assert_blamed(answer, SEEN, fault(stage, keys, "was not loaded"))


def test_a_tensor_that_is_scaled(sides: Sides) -> None:
    key = f"{VISION}embeddings.class_embedding"
    answer = sides.flamingo("llama").alike(lambda state: scale(state, key, 1.0009))
    assert_blamed(answer, SEEN, fault("vision.embeddings", key, "is A's times 1.0009"))


def test_a_gate_that_was_not_loaded_is_not_forced_away(sides: Sides) -> None:
    """With forced gates the two agree; as they are they do not."""
    key = gated("llama", 1, "ff_gate")
    answer = sides.flamingo("llama").answer(
        lambda state: state.update({key: torch.zeros_like(state[key])})
    )
    assert_blamed(answer, SEEN, fault("xattn.1", key, "was not loaded"))
    assert answer.diverges_at == {"as-is": "xattn.1", "forced": None}


# --- tensors that are not there, or too much ------------------------------------------------------


@pytest.mark.parametrize(
    "key", [gated("llama", 1, "attn_gate"), f"{LAYERS}1.self_attn.k_proj.weight"]
)
def test_a_missing_tensor(key: str, sides: Sides) -> None:
    pair = sides.flamingo("llama")
    answer = pair.alike(lambda state: state.pop(key) is None or None)
    assert_blamed(answer, ("FC203",), fault("logits", key, "not in B"))
    assert answer.told("FC203") == [key]
    assert answer.passes == []


def test_a_missing_tensor_and_another_that_differs(sides: Sides) -> None:
    """Both are told: who mends the one does not have to run again to hear of the other."""
    missing, negated = "perceiver.norm.bias", f"{LAYERS}0.mlp.fc1.weight"

    def plant(state: State) -> None:
        del state[missing]
        scale(state, negated, -1)

    answer = sides.flamingo("llama").alike(plant)
    assert answer.code == 1
    assert answer.told("FC203") == [missing]
    assert answer.told("FC301") == [negated]
    assert {key for one in answer.blame if one.confirmed for key in one.keys} == {missing, negated}


@pytest.mark.parametrize(
    "key",
    [
        "stray",
        "lang_encoder.lm_head.bias",
        f"{LAYERS}3.layer_norm1.weight",
    ],
)
def test_a_tensor_too_much(key: str, sides: Sides) -> None:
    """All that B computes with is right; what it does not compute with is still no part of it."""
    answer = sides.flamingo("llama").alike(lambda state: state.update({key: torch.ones(5)}))
    assert (answer.code, answer.codes) == (1, ["FC204"])
    assert answer.told("FC204") == [key]
    assert all(one["agrees"] for one in answer.passes)
    assert answer.blame == []


def test_keys_are_told_as_they_are_stored(sides: Sides, tmp_path: Path) -> None:
    """Under a wrapper's key, with the prefix of the class that training wrapped around it."""
    pair = sides.flamingo("llama")
    state = zoo.openflamingo("llama", **SMALL).partial
    scale(state, "perceiver.norm.weight", -1)
    b = zoo.save_torch(state, tmp_path / "ddp.pt", wrapper="model_state_dict", prefix="module.")
    answer = parity(pair.b, b, *pair.options[:4], "--gates", "as-is", "--greedy", "0")
    key = "module.perceiver.norm.weight"
    assert_blamed(answer, SEEN, fault("perceiver.norm", key, "other sign"))
    assert answer.told("FC301") == [key]


def test_a_head_that_the_config_ties_to_the_embedding(sides: Sides) -> None:
    """The file has both, and they differ."""

    def tie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    answer = sides.flamingo("llama").alike(None, tie)
    words = "tie_word_embeddings` is True in B's config and False in A's"
    assert_blamed(answer, ("FC202", "FC301", "FC407"), fault("logits", (), words))


# --- what gates hide, and several at once ---------------------------------------------------------


def closed(state: State) -> State:
    return {
        key: torch.zeros_like(tensor) if key.endswith("_gate") else tensor
        for key, tensor in state.items()
    }


def test_a_fault_behind_closed_gates(sides: Sides) -> None:
    pair = sides.flamingo("llama")
    a = zoo.save_torch(
        closed(zoo.openflamingo("llama", **SMALL).partial),
        sides.folder / "closed.pt",
    )
    key, other = gated("llama", 1, "feed_forward.1.weight"), f"{LAYERS}0.mlp.fc1.weight"

    def behind(state: State) -> State:
        scale(state, key, -1)
        return closed(state)

    hidden = parity(a, pair.planted(behind), *pair.options, "--greedy", "0")
    wanted = fault("xattn.1", key, "other sign", gates="forced")
    assert_blamed(hidden, ("FC301", "FC402"), wanted)
    assert hidden.diverges_at == {"as-is": None, "forced": "xattn.1"}
    assert "xattn.1" in hidden.detail("FC402")

    def before_and_behind(state: State) -> State:
        scale(state, other, -1)
        return behind(state)

    both = parity(a, pair.planted(before_and_behind), *pair.options, "--greedy", "0")
    assert_blamed(both, SEEN, fault("vision.layers.0", other, "other sign"), wanted)


def test_four_faults_are_blamed_one_behind_the_other(sides: Sides) -> None:
    pair = sides.flamingo("mpt7b")
    tower = [f"{LAYERS}1.self_attn.{name}_proj.weight" for name in "qk"]
    latents = "perceiver.layers.1.to_kv.weight"
    cross = gated("mpt7b", 0, "attn.to_kv.weight")
    state = pair.state
    swap(state, *tower)
    swap_key_and_value(state, latents)
    swap_key_and_value(state, cross)
    language = swap_query_and_key(state, "mpt7b", 1)
    answer = pair.answer(lambda _: state)
    assert_blamed(
        answer,
        SEEN,
        fault("vision.layers.1", tower, "are swapped"),
        fault("perceiver.layers.1", latents, "are swapped"),
        fault("xattn.0", cross, "are swapped"),
        fault("lm.layers.1", language.keys, language.words),
    )


def test_a_setting_and_a_tensor(sides: Sides) -> None:
    key = embedding("llama").replace("embed_tokens", "norm")
    answer = sides.flamingo("llama").alike(
        lambda state: scale(state, key, 2),
        lambda config: config["vision_config"].update(hidden_act="gelu"),
    )
    assert_blamed(
        answer,
        ("FC301", *SETTING),
        fault("vision.layers.0", (), "`vision.hidden_act` is 'gelu' in B's config"),
        fault("lm.final_norm", key, "is A's times 2"),
    )


def test_a_setting_and_a_tensor_of_one_stage(sides: Sides) -> None:
    """Neither alone explains it, so both have to be named."""
    key = f"{LAYERS}0.mlp.fc1.weight"
    answer = sides.flamingo("llama").alike(
        lambda state: scale(state, key, -1),
        lambda config: config["vision_config"].update(hidden_act="gelu"),
    )
    words = ("`vision.hidden_act` is 'gelu' in B's config", "other sign")
    assert_blamed(answer, ("FC301", *SETTING), fault("vision.layers.0", key, *words))


def test_faults_in_a_rounded_copy_are_not_taken_for_rounding(sides: Sides, tmp_path: Path) -> None:
    """Each tensor of B is in bfloat16; three of them are not what A's are when they are rounded."""
    tower = [f"{LAYERS}1.self_attn.{name}_proj.weight" for name in "qk"]
    negated = layer("llama", 0, "mlp.up_proj.weight")
    pair = sides.flamingo("llama")
    state = pair.state
    swap(state, *tower)
    scale(state, negated, -1)
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    answer = pair.alike(lambda _: rounded)
    assert answer.code == 1
    assert all(one.confirmed for one in answer.blame)
    told = {one.suspect: set(one.keys) for one in answer.blame}
    by_rounding = [keys for words, keys in told.items() if "rounded" in words]
    assert not any(keys & {*tower, negated} for keys in by_rounding)
    assert [keys for words, keys in told.items() if "swapped" in words] == [set(tower)]
    sign = ("other sign", "times -1")
    assert [keys for words, keys in told.items() if any(one in words for one in sign)] == [
        {negated}
    ]


def test_a_tensor_that_no_forward_sees_is_not_blamed_for_another(sides: Sides) -> None:
    dim, bright = f"{LAYERS}0.mlp.fc1.weight", gated("llama", 1, "attn.to_q.weight")

    def plant(state: State) -> None:
        flip(state, dim, 0)
        scale(state, bright, -1)

    answer = sides.flamingo("llama").answer(plant)
    assert set(answer.told("FC301")) == {dim, bright}
    assert_blamed(answer, SEEN, fault("xattn.1", bright, "other sign"))
