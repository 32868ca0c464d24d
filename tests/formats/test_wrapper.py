"""Which part of a pickle is the weights: stated, never guessed between equals."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import handmade as hm
from tests.support import Outcome, cli, facts_at, torch_facts


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}


def inspect(tmp_path: Path, content: Any, *options: str) -> Outcome:
    torch.save(content, tmp_path / "src.pt")
    return cli("inspect", tmp_path / "src.pt", "--json", *options)


@pytest.mark.parametrize(
    ("content", "wrapper"),
    [
        (lambda w, o: w, None),
        (lambda w, o: {"state_dict": w}, "state_dict"),
        (lambda w, o: {"model_state_dict": w, "epoch": 1}, "model_state_dict"),
        (lambda w, o: {"model": w, "iter": 2}, "model"),
        (lambda w, o: {"module": w}, "module"),
        (lambda w, o: {"model": {"state_dict": w}}, "model.state_dict"),
        (lambda w, o: {"module": o, "model": o, "state_dict": w}, "state_dict"),
        (lambda w, o: {"model": o, "model_state_dict": w}, "model_state_dict"),
        (lambda w, o: {"model_ema": o, "model": w}, "model"),
        (lambda w, o: {"ema": o, "state_dict": w}, "state_dict"),
        (lambda w, o: {"model_ema": w}, "model_ema"),
        (lambda w, o: {"optimizer": {"x": torch.ones(1)}, "weights": w}, "weights"),
        (lambda w, o: {"optimizer_state_dict": o, "state_dict": w}, "state_dict"),
        (lambda w, o: {"config": {"dim": 3}, "net": w, "step": 1}, "net"),
    ],
)
def test_the_choice(content: Any, wrapper: str | None, tmp_path: Path) -> None:
    chosen = weights()
    document = inspect(tmp_path, content(chosen, weights(1))).document
    assert document["inputs"][0]["wrapper"] == wrapper
    assert facts_at(tmp_path / "src.pt") == torch_facts(chosen)


def test_equally_good_candidates_are_an_error(tmp_path: Path) -> None:
    content = {"generator": weights(), "discriminator": weights(1)}
    outcome = inspect(tmp_path, content)
    finding = outcome.document["findings"][0]
    assert (outcome.code, finding["code"]) == (2, "FC207")
    assert "`generator` (2 tensors)" in finding["detail"]
    assert "--wrapper-key" in finding["hint"]
    outcome = inspect(tmp_path, content, "--wrapper-key", "discriminator")
    assert outcome.document["inputs"][0]["wrapper"] == "discriminator"


@pytest.mark.parametrize("key", ["model_ema", "state.model", "state"])
def test_wrapper_key_names_any_part(key: str, tmp_path: Path) -> None:
    chosen = weights(3)
    content: dict[str, Any] = {"model": weights(), "model_ema": weights(1)}
    content |= {"model_ema": chosen} if key == "model_ema" else {"state": weights(1)}
    if key == "state.model":
        content["state"] = {"model": chosen}
    if key == "state":
        content["state"] = chosen
    document = inspect(tmp_path, content, "--wrapper-key", key).document
    assert document["inputs"][0]["wrapper"] == key
    assert facts_at(tmp_path / "src.pt", wrapper_key=key) == torch_facts(chosen)


def test_a_wrapper_key_that_is_not_there(tmp_path: Path) -> None:
    outcome = inspect(tmp_path, {"model": weights(), "epoch": 3}, "--wrapper-key", "ema")
    finding = outcome.document["findings"][0]
    assert (outcome.code, finding["code"]) == (2, "FC207")
    assert "`model`" in finding["hint"]
    outcome = inspect(tmp_path, {"model": weights(), "epoch": 3}, "--wrapper-key", "epoch")
    assert (outcome.code, outcome.codes) == (2, ["FC201"])


def test_inert_objects_beside_the_weights_are_reported(tmp_path: Path) -> None:
    content = {"model": weights(), "args": argparse.Namespace(lr=0.1)}
    document = inspect(tmp_path, content).document
    assert [(f["code"], f["key"]) for f in document["findings"]] == [
        ("FC506", "argparse.Namespace")
    ]
    assert document["pickle_globals"]["argparse.Namespace"] == "inert"
    assert document["pickle_globals"]["torch._utils._rebuild_tensor_v2"] == "table"


class Holder:
    """An unknown class that holds tensors."""

    def __init__(self) -> None:
        self.weight = torch.ones(2)


def test_tensors_below_an_unknown_class_refuse_the_file(tmp_path: Path) -> None:
    for content in (Holder(), {"model": Holder()}, {"model": Holder(), "model_ema": weights()}):
        outcome = inspect(tmp_path, content)
        assert (outcome.code, outcome.codes) == (2, ["FC502"])
        assert "Holder" in outcome.document["findings"][0]["detail"]


@pytest.mark.parametrize("content", [{"epoch": 3}, [], {}, 7, None])
def test_no_tensors(content: Any, tmp_path: Path) -> None:
    outcome = inspect(tmp_path, content)
    assert (outcome.code, outcome.codes) == (2, ["FC201"])


def test_entries_of_a_state_dict_that_are_no_tensors(tmp_path: Path) -> None:
    content = {**weights(), "num_updates": 3, "name": "tiny"}
    document = inspect(tmp_path, content).document
    assert {one["path"] for one in document["beside"]} == {"num_updates", "name"}
    assert document["summary"]["num_tensors"] == 2


def test_a_state_dict_that_is_not_flat_is_not_guessed(tmp_path: Path) -> None:
    outcome = inspect(tmp_path, {"encoder": weights(), "scale": torch.ones(1)})
    assert (outcome.code, outcome.codes) == (2, ["FC207"])


def test_a_lone_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(3)
    assert inspect(tmp_path, tensor).code == 0
    assert [one.data for one in facts_at(tmp_path / "src.pt").values()] == [
        tensor.numpy().tobytes()
    ]


@pytest.mark.parametrize("second", [hm.mapping([("w", hm.tensor())]), hm.number(5)])
@pytest.mark.parametrize("options", [[], ["--wrapper-key", "state_dict"]])
def test_two_entries_of_one_name_above_the_weights(
    second: bytes, options: list[str], tmp_path: Path
) -> None:
    first = hm.mapping([("w", hm.tensor())])
    found = []
    for pairs in ((first, second), (second, first)):
        body = hm.mapping([("state_dict", pair) for pair in pairs])
        (tmp_path / "src.pt").write_bytes(hm.torch_zip(body))
        outcome = cli("inspect", tmp_path / "src.pt", "--json", *options)
        assert outcome.code == 2
        found += outcome.codes
    # Two candidates are ambiguous before anything else, and so is a number where weights belong.
    assert set(found) <= {"FC104", "FC201", "FC207"}
    assert "FC104" in found or not options
