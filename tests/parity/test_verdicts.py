"""Sides that cannot be judged: other bits the second time, and a reference that is no number."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from flamingo_ckpt.parity import Options, ParityResult, check_parity, open_pair
from flamingo_ckpt.parity.result import Greedy, Measure, Pass
from flamingo_ckpt.parity.verdicts import divergence_findings, verdict_of
from tests.parity.sides import Pair, Sides


def checked(pair: Pair, **options: Any) -> ParityResult:
    return check_parity(*open_pair(str(pair.b), str(pair.b)), Options(num_greedy=0, **options))


def errors(result: ParityResult) -> list[str]:
    return [one.code for one in result.findings if one.severity == "error"]


class Drawing(torch.nn.Module):
    """Adds noise of its own to what a module gives, as dropout that was left on does."""

    count = itertools.count(1)

    def forward(self, x: Any) -> Any:
        return x * (1 + 1e-4 * next(self.count))


def with_noise_in(module_name: str, sides_named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module of one side or of both compute otherwise each time."""
    from flamingo_ckpt.parity import check

    make = check.make_shell

    def noisy(side: Any, *args: Any, **kwargs: Any) -> Any:
        shell = make(side, *args, **kwargs)
        if side.name in sides_named:
            parent_name, _, leaf = module_name.rpartition(".")
            parent = shell.module.get_submodule(parent_name)
            module = getattr(parent, leaf)
            first, draw = module.forward, Drawing()
            monkeypatch.setattr(module, "forward", lambda *a, **k: draw(first(*a, **k)))
        return shell

    monkeypatch.setattr(check, "make_shell", noisy)


LAYER = "text_model.encoder.layers.1.mlp"


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_side_that_gives_other_bits_the_second_time(
    side: str, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_noise_in(LAYER, side, monkeypatch)
    result = checked(sides.clip())
    assert result.verdict == "fail"
    (finding,) = [one for one in result.findings if one.code == "FC481"]
    assert finding.detail.startswith(f"{side} gives other bits when it is run again")
    assert "`text.layers.1`" in finding.detail
    judged = [one["deterministic"] for one in result.details["sides"]]
    assert judged == [side != "A", side != "B"]


def test_both_sides_give_other_bits(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    with_noise_in(LAYER, "AB", monkeypatch)
    found = [one.detail[0] for one in checked(sides.clip()).findings if one.code == "FC481"]
    assert found == ["A", "B"]


def breaking(side_name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from flamingo_ckpt.parity import check

    make = check.make_shell

    def broken(side: Any, *args: Any, **kwargs: Any) -> Any:
        shell = make(side, *args, **kwargs)
        if side.name == side_name:
            module = shell.module.get_submodule(LAYER)
            first = module.forward

            def forward(*a: Any, **k: Any) -> Any:
                found = first(*a, **k).clone()
                found[0, 0, 0] = value
                return found

            monkeypatch.setattr(module, "forward", forward)
        return shell

    monkeypatch.setattr(check, "make_shell", broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reference_that_is_no_number_cannot_be_compared_with(
    value: float, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking("A", value, monkeypatch)
    result = checked(sides.clip())
    (finding,) = [one for one in result.findings if one.code == "FC487"]
    assert finding.severity == "error"
    assert "`text.layers.1`" in finding.detail
    assert result.verdict != "pass"
    assert result.blame == ()  # there is nothing to compare trials with


def test_a_reference_and_a_copy_that_are_the_same_and_no_numbers(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in both places alike is no agreement: nothing behind it was compared."""
    pair = sides.clip()
    planted = pair.planted(
        lambda state: state.update(
            {"text_model.final_layer_norm.bias": torch.full((36,), float("nan"))}
        )
    )
    result = check_parity(*open_pair(str(planted), str(planted)), Options(num_greedy=0))
    assert errors(result) == ["FC487"]
    assert result.verdict == "incomplete"
    assert all(one.first_divergence is None for one in result.passes)


def test_a_second_side_that_is_no_number_is_a_divergence(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking("B", float("nan"), monkeypatch)
    result = checked(sides.clip())
    assert result.verdict == "fail"
    assert "FC480" in errors(result)
    assert "FC487" not in errors(result)
    assert [one.first_divergence for one in result.passes] == ["text.layers.1"]
    assert result.passes[0].stages["text.layers.1"].num_bad == 1


def test_a_second_side_that_raises(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    from flamingo_ckpt.parity import check

    make = check.make_shell

    def raising(side: Any, *args: Any, **kwargs: Any) -> Any:
        shell = make(side, *args, **kwargs)
        if side.name == "B":

            def forward(*_: Any, **__: Any) -> Any:
                raise ValueError("no, thank you\nsecond line")

            monkeypatch.setattr(shell.module.get_submodule(LAYER), "forward", forward)
        return shell

    monkeypatch.setattr(check, "make_shell", raising)
    result = checked(sides.clip())
    assert result.verdict == "fail"
    told = [one.detail for one in result.findings if one.code == "FC480"]
    assert "B cannot compute the inputs: ValueError: no, thank you" in told
    # what was computed before it was compared
    stages = result.passes[0].stages
    assert stages["text.layers.0"].agrees
    assert stages["text.layers.1"].only_in == "a"


def test_a_continuation_that_differs_alone(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forwards agree; what is written with them does not, as with a broken cache."""
    from flamingo_ckpt.parity.running import Runner

    greedy = Runner.greedy

    def wrong(self: Runner, *args: Any) -> Any:
        tokens, leads = greedy(self, *args)
        if self.shell.side.name == "B":
            tokens[1] += 1
        return tokens, leads

    monkeypatch.setattr(Runner, "greedy", wrong)
    pair = sides.paligemma(1)
    opened = open_pair(str(pair.a), str(pair.b))
    result = check_parity(*opened, Options(num_greedy=3))
    assert (result.verdict, errors(result)) == ("fail", ["FC486"])
    assert result.greedy is not None
    assert result.greedy.equal is False

    def tied(self: Runner, *args: Any) -> Any:
        tokens, _ = wrong(self, *args)
        return tokens, [1.0, 1e-7, 1.0]

    monkeypatch.setattr(Runner, "greedy", tied)
    result = check_parity(*opened, Options(num_greedy=3))
    assert (result.verdict, errors(result)) == ("pass", [])
    assert isinstance(result.greedy, Greedy)
    assert "token 2 is a tie" in result.greedy.note


# --- the words of a verdict -----------------------------------------------------------------------


def made(gates: str, dtype: str, relative: float, tolerance: float | None) -> Pass:
    one = Measure(max_abs=1, relative=relative, cosine=1, tolerance=tolerance)
    return Pass(gates=gates, dtype=dtype, device="cpu", stages={"lm.layers.0": one})


def codes(*passes: Pass) -> list[str]:
    return [one.code for one in divergence_findings(passes)]


def test_which_passes_make_which_finding() -> None:
    good = {gates: made(gates, "float32", 1e-7, 1e-6) for gates in ("as-is", "forced")}
    bad = {gates: made(gates, "float32", 1e-5, 1e-6) for gates in ("as-is", "forced")}
    assert codes(good["as-is"], good["forced"]) == []
    assert codes(bad["as-is"], bad["forced"]) == ["FC480"]
    assert codes(bad["as-is"], good["forced"]) == ["FC480"]
    assert codes(good["as-is"], bad["forced"]) == ["FC402"]
    assert codes(bad["forced"]) == ["FC480"]
    assert codes(made("as-is", "bfloat16", 9.0, None)) == []
    other = made("as-is", "float64", 1e-5, 1e-6)
    assert codes(good["as-is"], good["forced"], other) == ["FC480"]
    assert verdict_of(()) == "pass"


def test_what_is_exactly_as_far_as_rounding_goes_agrees() -> None:
    assert made("as-is", "float32", 1e-6, 1e-6).first_divergence is None
    assert made("as-is", "float32", 1.0000001e-6, 1e-6).first_divergence == "lm.layers.0"
    assert made("as-is", "float32", float("nan"), 1e-6).first_divergence == "lm.layers.0"
