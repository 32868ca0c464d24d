"""parity: faults in the language model of each family that a Flamingo may have."""

from __future__ import annotations

import pytest

from tests import zoo
from tests.parity.planting import (
    ACTIVATIONS,
    EPSILONS,
    FINAL_NORMS,
    State,
    embedding,
    flip,
    layer,
    square,
    swap,
    swap_query_and_key,
    transpose,
    unload,
    zero_rows,
)
from tests.parity.sides import Sides, assert_blamed, fault
from tests.zoo_lms import WORDS

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
SEEN = ("FC301", "FC480")
SETTING = ("FC407", "FC480")
#: Families whose head is the embedding: there is one tensor under both names.
TIED = ("mpt1b", "mpt7b", "opt")


def head(family: str) -> list[str]:
    """The key of the output layer in the folder, where it has one of its own."""
    if family in TIED:
        return []
    return ["lang_encoder." + ("embed_out" if "gpt_neox" in embedding(family) else "lm_head")]


@each_family
def test_four_faults_in_order(family: str, sides: Sides) -> None:
    """New tokens, query and key, a transposed matrix, and a norm that was not loaded."""
    pair, rows = sides.flamingo(family), zoo.flamingo_rows(family)
    state = pair.state
    table, turned = embedding(family), square(family, 1)
    zero_rows(state, table, WORDS)
    attention = swap_query_and_key(state, family, 0)
    transpose(state, turned)
    norm = unload(state, f"lang_encoder.{FINAL_NORMS[family]}")
    answer = pair.answer(lambda _: state, None, "--gates", "as-is")
    told = f"rows {WORDS} to {rows - 1} of {rows} differ (zero in B)"
    assert_blamed(
        answer,
        SEEN,
        fault("lm.embed_tokens", table, told),
        fault("lm.layers.0", attention.keys, attention.words),
        fault("lm.layers.1", turned, "is transposed"),
        fault("lm.final_norm", norm, "was not loaded"),
    )
    assert answer.diverges_at == {"as-is": "lm.embed_tokens"}
    assert set(answer.told("FC301")) == {table, *attention.keys, turned, *norm}


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_two_layers_in_each_others_place(family: str, sides: Sides) -> None:
    keys: list[list[str]] = [[], []]

    def plant(state: State) -> None:
        keys[0] = [key for key in state if key.startswith(layer(family, 0, ""))]
        keys[1] = [swap(state, key, key.replace(".0.deco", ".1.deco"))[1] for key in keys[0]]

    answer = sides.flamingo(family).alike(plant)
    # the bias of a key moves every score of a query alike: no forward sees it
    told = "another tensor's content"
    assert_blamed(
        answer, SEEN, fault("lm.layers.0", keys[0], told), fault("lm.layers.1", keys[1], told)
    )
    assert set(answer.told("FC301")) == {*keys[0], *keys[1]}


@pytest.mark.parametrize("family", ["mpt1b", "gptj"])
def test_one_bit_of_one_element(family: str, sides: Sides) -> None:
    """The lowest is seen by the bits alone, and a high one by the forward."""
    pair, key = sides.flamingo(family), square(family, 1)
    low = pair.alike(lambda state: flip(state, key, 0))
    assert (low.code, low.codes, low.told("FC301")) == (1, ["FC301"], [key])
    assert all(one["agrees"] for one in low.passes)
    assert low.blame == []
    high = pair.alike(lambda state: flip(state, key, 29))
    assert_blamed(high, SEEN, fault("lm.layers.1", key, "a bit is flipped"))


@pytest.mark.parametrize("family", ACTIVATIONS)
def test_another_activation(family: str, sides: Sides) -> None:
    field, right, wrong = ACTIVATIONS[family]
    answer = sides.flamingo(family).alike(
        None, lambda config: config["text_config"].update({field: wrong})
    )
    words = f"`language.{field}` is {wrong!r} in B's config and {right!r} in A's"
    assert_blamed(answer, SETTING, fault("lm.layers.0", (), words))


@pytest.mark.parametrize("family", EPSILONS)
def test_another_epsilon(family: str, sides: Sides) -> None:
    field, right, wrong = EPSILONS[family]
    answer = sides.flamingo(family).alike(
        None, lambda config: config["text_config"].update({field: wrong})
    )
    words = f"`language.{field}` is {wrong!r} in B's config and {right!r} in A's"
    assert_blamed(answer, SETTING, fault("lm.layers.0", (), words))


@pytest.mark.parametrize("family", ["mpt7b", "gpt_neox", "opt", "gptj"])
def test_a_vocabulary_that_was_not_resized(family: str, sides: Sides) -> None:
    keys = [embedding(family), *(f"{one}.weight" for one in head(family))]

    def plant(state: State) -> None:
        for key in [*keys, *(f"{one}.bias" for one in head(family))]:
            if key in state:
                state[key] = state[key][:WORDS].clone()

    pair = sides.flamingo(family)
    bias = [f"{one}.bias" for one in head(family) if f"{one}.bias" in pair.state]
    answer = pair.alike(plant)
    wanted = fault("logits", [*keys, *bias], "not resized")
    assert_blamed(answer, ("FC205", "FC301", "FC418"), wanted)
    assert set(answer.told("FC301")) == {*keys, *bias}
    rows = zoo.flamingo_rows(family)
    assert f"A's vocabulary has {rows} rows and B's {WORDS}" in answer.detail("FC418")
    assert f"B's vocabulary has {WORDS} rows, and {rows} by its config" in answer.detail("FC205")
    assert answer.told("FC418") == answer.told("FC205") == [embedding(family)]


def test_a_vocabulary_that_its_config_calls_right(sides: Sides) -> None:
    def plant(state: State) -> None:
        for key in (embedding("llama"), "lang_encoder.lm_head.weight"):
            state[key] = state[key][:WORDS].clone()

    answer = sides.flamingo("llama").alike(
        plant, lambda config: config["text_config"].update(vocab_size=WORDS)
    )
    keys = [embedding("llama"), "lang_encoder.lm_head.weight"]
    assert_blamed(answer, ("FC301", "FC418"), fault("logits", keys, "not resized"))
