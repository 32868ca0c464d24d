"""Settings that no tensor shows: compared for themselves, also where no input reaches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.parity.sides import Sides, parity
from tests.zoo_lms import POSITIONS


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type"),
        ({"rms_norm_eps": 1e-3}, "language.rms_norm_eps"),
    ],
)
def test_of_a_language_model(sides: Sides, change: dict[str, Any], name: str) -> None:
    """The first acts beyond the positions that the inputs have."""
    answer = sides.flamingo("llama").alike(None, lambda c: c["text_config"].update(change))
    assert answer.code == 1
    assert name in answer.detail("FC407")


def test_a_window_of_attention(sides: Sides) -> None:
    pair = sides.paligemma(2)
    answer = pair.answer(None, lambda c: c["text_config"].update(sliding_window=4))
    assert answer.code == 1
    assert "`language.sliding_window` is 4096 in A and 4 in B" in answer.detail("FC407")
    # and the answers of the generated inputs are longer than the window
    assert str(answer.diverges_at["as-is"]).startswith("lm.layers.")
    assert answer.blame[0].confirmed
    assert "sliding_window" in str(answer.blame[0].suspect)


def test_a_cap_that_only_one_config_spells_out(sides: Sides) -> None:
    """The fused kernel leaves it out, and A takes the default of its class."""
    pair = sides.paligemma(2)
    answer = pair.answer(None, lambda c: c["text_config"].update(attn_logit_softcapping=3.0))
    assert answer.code == 1
    assert "attn_logit_softcapping` is 50.0 in A and 3.0 in B" in answer.detail("FC407")


def untold(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({name: 90})


@pytest.mark.parametrize("name", ["media_token_id", "eoc_token_id"])
def test_a_token_that_one_config_alone_tells(sides: Sides, name: str) -> None:
    answer = sides.flamingo("llama").alike(None, untold(name))
    assert answer.code == 0
    assert answer.detail("FC407").startswith(f"`{name}` is in B's config and not in A's")


def test_a_folder_without_a_config(sides: Sides) -> None:
    """Nothing loads it as it is, whatever --config says."""
    pair = sides.flamingo("llama")
    bare = pair.planted()
    (bare / "config.json").unlink()
    options = ("--gates", "as-is", "--greedy", "0")
    for more in ((), ("--config", pair.b / "config.json")):
        answer = parity(pair.b, bare, *options, *more)
        assert answer.code == 0
        told = [one["detail"] for one in answer.findings if one["code"] == "FC485"]
        assert any(one.startswith("B's folder has no config.json") for one in told)


def test_a_continuation_beyond_the_positions_is_not_run(sides: Sides) -> None:
    pair = sides.flamingo("opt")
    answer = parity(pair.b, pair.b, "--gates", "as-is", "--greedy", str(POSITIONS))
    assert answer.code == 0
    assert answer.document["greedy"]["equal"] is None
    assert answer.document["greedy"]["note"].startswith("not run: IndexError")


def test_some_gates_closed_and_no_pass_that_opens_them(sides: Sides) -> None:
    def close_one(state: dict[str, Any]) -> None:
        key = next(key for key in state if key.endswith("attn_gate"))
        state[key] = state[key] * 0

    pair = sides.flamingo("llama")
    closed = pair.planted(close_one)
    answer = parity(closed, closed, "--gates", "as-is", "--greedy", "0")
    assert (answer.code, answer.codes) == (3, ["FC482"])
    assert parity(closed, closed, "--greedy", "0").code == 0
