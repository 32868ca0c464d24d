"""Weights that come and go: the same bits and the same words, in as much memory as is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from flamingo_ckpt.bases import Base
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.parity import Side, open_pair, running
from flamingo_ckpt.parity.inputs import Inputs, generate, set_media_token
from flamingo_ckpt.parity.numerics import exact_numerics
from flamingo_ckpt.parity.running import Runner, StreamedWeights
from flamingo_ckpt.parity.shell import make_shell
from tests import zoo
from tests.parity.planting import gated, scale, square, transpose
from tests.parity.sides import SMALL, Pair, Sides, assert_blamed, fault, parity
from tests.support import cli

#: The largest tensor of each kind, in float32: of the zoo, and not of any budget.
LARGEST = {"flamingo": 1024 * 64 * 4, "clip": 256 * 64 * 4, "paligemma": 256 * 40 * 4}
Stages = dict[str, torch.Tensor]


@dataclasses.dataclass(slots=True)
class Watched:
    """What was held while weights were streamed."""

    most: int = 0
    read: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched()
    weight = StreamedWeights.weight
    read = Runner.weight

    def counted(self: StreamedWeights, value: Any) -> torch.Tensor:
        given = weight(self, value)
        assert any(one is given for one in self._kept.values())
        held = sum(one.nbytes for one in self._kept.values())
        assert held == self._bytes <= (self._runner.budget or 0)
        found.most = max(found.most, held)
        return given

    def listed(self: Runner, key: str) -> torch.Tensor:
        found.read.append(key)
        return read(self, key)

    monkeypatch.setattr(StreamedWeights, "weight", counted)
    monkeypatch.setattr(Runner, "weight", listed)
    return found


def opened(pair: Pair) -> tuple[Side, Side]:
    """As the command line opens them."""
    named = dict(zip(pair.options[::2], pair.options[1::2], strict=True))
    bases = [
        Base(kind=kind, manifest=open_checkpoint(str(named[f"--base-{kind}"])))
        for kind in ("vision", "language")
        if f"--base-{kind}" in named
    ]
    config = named.get("--config")
    return open_pair(str(pair.a), str(pair.b), bases=bases, config=str(config) if config else None)


def run_all(
    side: Side, inputs: Inputs, budget: int | None, gates: tuple[float | None, ...], dtype: str
) -> list[Stages]:
    """The stages of one forward for each value of the gates, by one runner."""
    shell = make_shell(side, dtype)
    set_media_token(shell.module, inputs)
    runner = Runner(shell=shell, dtype=dtype, device="cpu", budget=budget).open()
    passes: list[Stages] = []
    for gate in gates:
        found: Stages = {}
        runner.run(inputs, lambda name, tensor, to=found: to.update({name: tensor}), gate=gate)
        passes.append(found)
    runner.close()
    return passes


def assert_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("family", ["mpt1b", "gpt_neox", "opt"])
def test_flamingos_compute_the_same_bits(family: str, sides: Sides, watched: Watched) -> None:
    """Both classes; and gates that were forced once are not met again."""
    gates = (None, 0.5, None)
    first, second = opened(sides.flamingo(family))
    inputs = generate("flamingo", first.model, second.model, 0)
    budget = LARGEST["flamingo"] + 10_000
    with exact_numerics():
        for side in (first, second):
            whole = run_all(side, inputs, None, gates, "float32")
            streamed = run_all(side, inputs, budget, gates, "float32")
            for ours, theirs in zip(whole, streamed, strict=True):
                assert_equal(ours, theirs)
            assert_equal(streamed[0], streamed[2])
            assert not torch.equal(streamed[0]["logits"], streamed[1]["logits"])
    assert LARGEST["flamingo"] <= watched.most <= budget


@pytest.mark.parametrize(("kind", "dtype"), [("clip", "float64"), ("paligemma", "float32")])
def test_other_models_compute_the_same_bits(
    kind: str, dtype: str, sides: Sides, watched: Watched
) -> None:
    pair = sides.clip() if kind == "clip" else sides.paligemma(2)
    budget = LARGEST[kind] * (2 if dtype == "float64" else 1)
    first, second = opened(pair)
    inputs = generate(kind, first.model, second.model, 0)
    with exact_numerics():
        for side in (first, second):
            (whole,) = run_all(side, inputs, None, (None,), dtype)
            (streamed,) = run_all(side, inputs, budget, (None,), dtype)
            assert_equal(whole, streamed)
    assert watched.most == budget  # the largest alone fills it
    assert len(watched.read) > len(set(watched.read))  # what was dropped was read again


@pytest.mark.parametrize(
    ("kind", "size"), [("flamingo", "270KB"), ("clip", "66KB"), ("paligemma", "42KB")]
)
def test_the_report_is_the_same_but_for_how_it_was_made(
    kind: str, size: str, sides: Sides, watched: Watched
) -> None:
    pair = {
        "flamingo": lambda: sides.flamingo("gpt_neox"),
        "clip": sides.clip,
        "paligemma": lambda: sides.paligemma(1),
    }[kind]()
    whole = parity(pair.a, pair.b, *pair.options, "--greedy", "0")
    assert watched.most == 0
    streamed = parity(pair.a, pair.b, *pair.options, "--max-memory", size, "--greedy", "0")
    assert 0 < watched.most <= int(size.removesuffix("KB")) * 1000
    assert (streamed.code, streamed.findings) == (0, whole.findings)
    for name in ("summary", "parameters", "blame", "data", "judgement"):
        assert streamed.document[name] == whole.document[name], name
    for one, other in zip(streamed.document["sides"], whole.document["sides"], strict=True):
        assert (one["streamed"], other["streamed"]) == (True, False)
        assert one["deterministic"] is True
        assert {**one, "streamed": False} == other


def test_nothing_is_written_where_each_token_would_read_everything(sides: Sides) -> None:
    pair = sides.flamingo("llama")
    answer = parity(pair.a, pair.b, *pair.options, "--max-memory", "270KB")
    assert answer.code == 0
    greedy = answer.document["greedy"]
    assert (greedy["a"], greedy["b"], greedy["equal"]) == ([], [], None)
    assert "streamed" in greedy["note"]


def test_faults_are_found_and_blamed(sides: Sides, watched: Watched) -> None:
    pair = sides.flamingo("gptj")
    tower, turned = "vision_encoder.vision_model.encoder.layers.0.mlp.fc2.bias", square("gptj", 1)

    def plant(state: dict[str, Any]) -> None:
        scale(state, tower, -1)
        transpose(state, turned)

    answer = pair.answer(plant, None, "--max-memory", "270KB")
    assert_blamed(
        answer,
        ("FC301", "FC480"),
        fault("vision.layers.0", tower, "other sign"),
        fault("lm.layers.1", turned, "is transposed"),
    )
    assert 0 < watched.most <= 270_000


def test_gates_are_forced_while_streaming(sides: Sides, watched: Watched) -> None:
    """A fault behind closed gates, which only gates that are really forced let through."""
    pair = sides.flamingo("llama")
    state = zoo.openflamingo("llama", **SMALL).partial

    def close(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_gate")]:
            tensors[name] = torch.zeros_like(tensors[name])

    close(state)
    a = zoo.save_torch(state, sides.folder / "closed.pt")
    key = gated("llama", 0, "attn.to_out.weight")

    def plant(tensors: dict[str, Any]) -> None:
        close(tensors)
        scale(tensors, key, -1)

    b = pair.planted(plant)
    answer = parity(a, b, *pair.options, "--max-memory", "270KB", "--greedy", "0")
    wanted = fault("xattn.0", key, "other sign", gates="forced")
    assert_blamed(answer, ("FC301", "FC402"), wanted)
    assert answer.diverges_at == {"as-is": None, "forced": "xattn.0"}


def test_a_setting_is_found_while_streaming(sides: Sides) -> None:
    answer = sides.paligemma(1).answer(
        None, lambda config: config["text_config"].update(rms_norm_eps=1e-4), "--max-memory", "42KB"
    )
    assert_blamed(answer, ("FC407", "FC480"), fault("lm.layers.0", (), "`language.rms_norm_eps`"))


@pytest.mark.parametrize(
    ("size", "dtype", "key"),
    [("200KB", "float32", "to_kv.weight"), ("300KB", "float64", "to_q.weight")],
)
def test_a_tensor_that_is_larger_than_the_budget(
    size: str, dtype: str, key: str, sides: Sides
) -> None:
    pair = sides.flamingo("llama")
    asked = ("--max-memory", size, "--dtype", dtype)
    outcome = cli("parity", pair.a, pair.b, *pair.options, *asked, "--json")
    document = outcome.document
    assert (outcome.code, document["verdict"], outcome.codes) == (2, "error", ["FC489"])
    (finding,) = document["findings"]
    named = finding["key"]
    assert named is not None
    assert f"`{named}` takes " in finding["detail"]
    width = 8 if dtype == "float64" else 4
    state = zoo.openflamingo("llama", **SMALL).full
    assert f"takes {state[named].numel() * width} bytes by itself" in finding["detail"]
    assert state[named].numel() * width > int(size.removesuffix("KB")) * 1000
    assert f"--max-memory has to be {state[named].numel() * width} at least" in finding["hint"]
    assert document["where"] == str(pair.a)


def test_a_budget_that_is_large_enough_streams_nothing(sides: Sides, watched: Watched) -> None:
    pair = sides.clip()
    answer = parity(pair.a, pair.b, *pair.options, "--max-memory", "1GB")
    assert (answer.code, watched.most) == (0, 0)
    assert [one["streamed"] for one in answer.document["sides"]] == [False, False]


def test_memory_that_is_not_there_is_streamed_through(
    sides: Sides, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word from the user, by what is free."""
    from flamingo_ckpt.parity import memory

    monkeypatch.setattr(memory, "free_bytes", lambda _: 2 * LARGEST["clip"])
    pair = sides.clip()
    answer = parity(pair.a, pair.b, *pair.options)
    assert (answer.code, watched.most) == (0, LARGEST["clip"])
    assert [one["streamed"] for one in answer.document["sides"]] == [True, True]


def test_what_runs_out_of_memory_is_told_what_to_do(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = sides.clip()

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(running, "forward", full)
    outcome = cli("parity", pair.a, pair.b, *pair.options, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC489"])
    assert "--max-memory" in outcome.document["findings"][0]["hint"]


def test_an_error_within_a_forward_lets_go_of_the_interception(sides: Sides) -> None:
    """A budget that does not suffice leaves torch as it was."""
    first, second = opened(sides.clip())
    inputs = generate("clip", first.model, second.model, 0)
    with exact_numerics():
        shell = make_shell(first, "float32")
        runner = Runner(shell=shell, dtype="float32", device="cpu", budget=10_000).open()
        with pytest.raises(CkptError, match="takes 49152 bytes by itself"):
            runner.run(inputs, lambda *_: None)
        placeholder = next(iter(shell.module.parameters()))
        assert (placeholder + 1).is_meta
        assert runner._stream._mode is None


def test_a_module_keeps_its_placeholders(sides: Sides) -> None:
    first, second = opened(sides.paligemma(1))
    inputs = generate("paligemma", first.model, second.model, 0)
    with exact_numerics():
        shell = make_shell(second, "float32")
        runner = Runner(shell=shell, dtype="float32", device="cpu", budget=50_000).open()
        runner.run(inputs, lambda *_: None)
        assert all(one.is_meta for one in shell.module.parameters())
