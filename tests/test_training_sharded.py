"""Two processes with FSDP2 over the loopback interface: train, save, take up, generate, convert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_ckpt import save_checkpoint
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.models import shard_model
from flamingo_ckpt.training import train_step
from tests import training_support as support
from tests.support import load_torch, torch_facts
from tests.test_training_end_to_end import finish

SIZE = 2


def together(folder: Path) -> list[dict[str, Any]]:
    """Run `fsdp_process` in all processes; what each of them found."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fsdp_process", str(rank), str(SIZE), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        outputs = [process.communicate(timeout=250)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return together(folder)


@pytest.fixture
def ranks(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one["train"] for one in found]


@pytest.fixture(scope="module")
def alone() -> tuple[Any, list[Any]]:
    """The same three steps in this process, over the whole batches."""
    model = support.flamingo()
    run = support.optimizer(model)
    results = [train_step(model, run[0], support.sources(0), lr_scheduler=run[1]) for _ in range(3)]
    return model, results


def test_the_loss_goes_down_as_in_one_process(
    ranks: list[dict[str, Any]], alone: tuple[Any, list[Any]]
) -> None:
    """Each process sees half of the rows; labels are as many, so the mean of means is the mean."""
    _, results = alone
    losses = []
    for number, result in enumerate(results):
        steps = [rank["steps"][number] for rank in ranks]
        for name, whole in result.losses.items():
            mean = sum(step["losses"][name] for step in steps) / SIZE
            assert mean == pytest.approx(whole, rel=2e-4)
        assert steps[0]["norm"] == steps[1]["norm"]
        assert steps[0]["norm"] == pytest.approx(result.grad_norm, rel=2e-3)
        losses.append(sum(step["losses"]["pages"] for step in steps))
    assert losses[2] < losses[1] < losses[0]


def test_each_process_holds_half(ranks: list[dict[str, Any]]) -> None:
    whole = ranks[0]["total"]
    assert sum(rank["local"] for rank in ranks) == whole
    assert all(abs(rank["local"] - whole / 2) < whole / 100 for rank in ranks)


def test_the_alias_trees_name_the_same_modules(ranks: list[dict[str, Any]]) -> None:
    assert [rank["aliases"] for rank in ranks] == [True, True]


def test_the_file_is_that_of_one_process(
    ranks: list[dict[str, Any]], folder: Path, alone: tuple[Any, list[Any]]
) -> None:
    model, _ = alone
    state = model.state_dict()
    trees = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
    saved = load_torch(folder / "whole.pt")
    assert set(saved) == {name for name in state if not name.startswith(trees)}
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    for name, tensor in saved.items():
        # AdamW makes steps of one size of the smallest gradients, whose rounding decides.
        assert torch.allclose(tensor, state[name], atol=3e-4), name
        if name in frozen:
            assert torch.equal(tensor, state[name]), name
    assert ranks[0]["files"] == ranks[1]["files"]
    trained = torch_facts(load_torch(folder / "run.pt")["model_state_dict"])
    assert trained == torch_facts({name: saved[name] for name in trained})
    assert len(trained) < len(saved)


def test_what_stops_the_writer_reaches_all(ranks: list[dict[str, Any]], folder: Path) -> None:
    refused = ["FC003", f"`{folder / 'run.pt'}` exists"]
    assert [rank["refused"] for rank in ranks] == [refused, refused]


def test_a_run_that_is_taken_up_goes_on_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["epoch"] == 4
        assert rank["resumed"] == rank["on"]


def test_a_run_of_two_is_taken_up_by_one(ranks: list[dict[str, Any]], folder: Path) -> None:
    from flamingo_ckpt import load_training_state

    model = support.flamingo()
    run = support.optimizer(model)
    assert load_training_state(folder / "run.pt", model, *run).epoch == 4
    for number, seed in enumerate((1, 2)):
        result = train_step(model, run[0], support.sources(seed), lr_scheduler=run[1])
        for name, whole in result.losses.items():
            mean = sum(rank["on"][number]["losses"][name] for rank in ranks) / SIZE
            assert mean == pytest.approx(whole, rel=5e-4)


def test_generate_goes_on_until_all_have_finished(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    """One process is asked for four tokens and the other for five; then training goes on."""
    rows = [rank["tokens"] for rank in ranks]
    assert [len(row) for row in rows[0]] == [12, 12]
    assert [len(row) for row in rows[1]] == [13, 13]
    assert [row[:12] for row in rows[1]] == rows[0]
    for rank in ranks:
        assert rank["after"]["norm"] > 0
        for name, loss in rank["after"]["losses"].items():
            assert rank["bf16"]["losses"][name] == pytest.approx(loss, abs=0.05)
            assert rank["bf16"]["losses"][name] != loss


def test_the_result_converts_and_verifies(
    ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    finish(folder / "trained.safetensors", "llama", tmp_path)


@pytest.mark.parametrize("family", ["opt", "mpt1b", "gpt_neox"])
def test_heads_of_every_kind(found: list[dict[str, Any]], folder: Path, family: str) -> None:
    ranks = [one["families"][family] for one in found]
    model = support.flamingo(family)
    run = support.optimizer(model)
    result = train_step(model, run[0], support.sources(0))
    for name, whole in result.losses.items():
        mean = sum(rank["losses"][name] for rank in ranks) / SIZE
        assert mean == pytest.approx(whole, rel=2e-4)
    assert ranks[0]["norm"] == ranks[1]["norm"] == pytest.approx(result.grad_norm, rel=2e-3)
    saved = load_torch(folder / f"{family}.pt")
    save_checkpoint(model, folder / f"{family}-alone.pt")
    alone = load_torch(folder / f"{family}-alone.pt")
    assert list(saved) == list(alone)
    assert ranks[0]["num_names"] == len(saved)
    assert all(torch.allclose(saved[name], one, atol=3e-4) for name, one in alone.items())


def test_a_model_on_meta_is_split_and_then_filled(
    found: list[dict[str, Any]], folder: Path
) -> None:
    model = support.flamingo()
    state = torch_facts(load_torch(folder / "from_meta.pt"))
    assert state == {
        name: one for name, one in torch_facts(model.state_dict()).items() if name in state
    }
    batch = {name: one for name, one in support.captions().items() if name != "labels"}
    with torch.no_grad():
        logits = model(**batch).logits
    for one in found:
        assert torch.allclose(torch.tensor(one["meta"]["logits"]), logits, atol=1e-5)


def test_a_writer_that_fails_leaves_nobody_waiting(
    found: list[dict[str, Any]], folder: Path
) -> None:
    writer, other = (one["failures"] for one in found)
    assert writer["full"][:2] == ["WriteError", "FC004"]
    assert other["full"][1:] == writer["full"][1:]
    assert writer["bug"] == ["RuntimeError", None, "oops"]
    assert other["bug"][1] == "FC465"
    assert "RuntimeError: oops" in other["bug"][2]
    names = {one.name for one in folder.iterdir()}
    assert "after.pt" in names
    assert not [name for name in names if "never" in name]


def test_a_model_is_not_split_without_processes() -> None:
    with pytest.raises(CkptError, match="no process group") as caught:
        shard_model(support.flamingo())
    assert caught.value.code == "FC461"


def test_any_module_of_which_each_process_has_a_part(found: list[dict[str, Any]]) -> None:
    """Filled without a word between the processes: in place, and from meta."""
    names = ["first.bias", "first.weight", "gate", "second.bias", "second.weight"]
    for one in found:
        for how in ("cpu", "meta"):
            told = one["any_module"][how]
            assert (told["names"], told["wrong"], told["computes"]) == (names, [], True)
        assert one["any_module"]["cpu"]["kept"]
