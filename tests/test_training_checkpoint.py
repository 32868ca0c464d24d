"""The whole way of a checkpoint that the upstream package itself saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.make_training_checkpoint import make_training_checkpoint
from tests.support import cli_ok, facts_at, load_torch, torch_facts

FAMILIES = ("opt", "neox", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_training_checkpoint(tmp_path_factory.mktemp("run"), family=request.param)


def test_it_is_what_a_training_run_leaves(checkpoint: Path) -> None:
    whole = load_torch(checkpoint)
    assert sorted(whole) == [
        "epoch",
        "lr_scheduler_state_dict",
        "model_state_dict",
        "optimizer_state_dict",
    ]
    weights = whole["model_state_dict"]
    assert all(name.startswith("module.") for name in weights)
    assert not any("vision_encoder" in name for name in weights)
    assert any(name.endswith("attn_gate") for name in weights)
    states = whole["optimizer_state_dict"]["state"].values()
    assert all(state["exp_avg"].any() for state in states)


def test_nothing_has_the_value_it_was_initialised_to(checkpoint: Path) -> None:
    weights = load_torch(checkpoint)["model_state_dict"]
    small = [tensor for tensor in weights.values() if tensor.dim() == 1]
    assert len(small) > 20
    assert all(((tensor != 0) & (tensor != 1)).all() for tensor in small)
    assert len({tensor.numpy().tobytes() for tensor in small}) == len(small)


def test_converts_verifies_and_comes_back(checkpoint: Path, tmp_path: Path) -> None:
    expected = {
        name.removeprefix("module."): facts
        for name, facts in torch_facts(load_torch(checkpoint)["model_state_dict"]).items()
    }
    cli_ok("convert", checkpoint, tmp_path / "out")
    cli_ok("verify", checkpoint, tmp_path / "out")
    assert facts_at(tmp_path / "out") == expected
    cli_ok("convert", tmp_path / "out", tmp_path / "back.pt")
    assert torch_facts(load_torch(tmp_path / "back.pt")) == expected


def test_opt_saves_its_tied_head_under_both_names(tmp_path: Path) -> None:
    path = make_training_checkpoint(tmp_path / "run", family="opt")
    inspected = cli_ok("inspect", path, "--json").document
    assert inspected["inputs"][0]["wrapper"] == "model_state_dict"
    assert inspected["inputs"][0]["prefix"] == "module."
    assert inspected["tied"] == [
        [
            "module.lang_encoder.model.decoder.embed_tokens.weight",
            "module.lang_encoder.lm_head.weight",
        ]
    ]


def test_one_seed_gives_one_file_and_another_seed_another(tmp_path: Path) -> None:
    paths = [
        make_training_checkpoint(tmp_path / name, seed=seed)
        for name, seed in (("first", 7), ("second", 7), ("third", 8))
    ]
    first, second, third = (path.read_bytes() for path in paths)
    assert first == second
    assert first != third


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no family 'gpt2'"):
        make_training_checkpoint(tmp_path, family="gpt2")
