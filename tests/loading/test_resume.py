"""A run that was interrupted goes on as if it had not been, whoever saved it."""

from __future__ import annotations

import copy
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fixtures.make_training_checkpoint import make_training_checkpoint
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.loading.resume import load_training_state
from flamingo_ckpt.loading.save import save_checkpoint
from flamingo_ckpt.models import build, load_config
from tests import training_support as support
from tests.support import load_torch, torch_facts

FAMILIES = ("llama", "opt", "gpt_neox", "mpt7b")


def spoil(model: nn.Module) -> None:
    """Other values for everything that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_and_two_steps_are_four(family: str, tmp_path: Path) -> None:
    whole = support.flamingo(family)
    run = support.optimizer(whole)
    support.steps(whole, run, range(2))
    save_checkpoint(whole, tmp_path / "run.pt", optimizer=run[0], lr_scheduler=run[1], epoch=7)
    expected = support.steps(whole, run, range(2, 4))

    again = support.flamingo(family)
    spoil(again)
    fresh = support.optimizer(again, lr=0.7)
    state = load_training_state(tmp_path / "run.pt", again, *fresh)
    assert (state.epoch, state.next_epoch) == (7, 8)
    assert (state.has_optimizer, state.has_lr_scheduler) == (True, True)
    assert state.findings == ()
    assert fresh[0].param_groups[0]["lr"] == run[0].param_groups[0]["initial_lr"] * 1.0
    assert support.steps(again, fresh, range(2, 4)) == expected
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert str(fresh[0].state_dict()) == str(run[0].state_dict())
    assert fresh[1].state_dict() == run[1].state_dict()


def test_the_file_is_a_training_checkpoint_as_upstream_writes_it(tmp_path: Path) -> None:
    model = support.flamingo()
    run = support.optimizer(model)
    support.steps(model, run, range(1))
    report = save_checkpoint(
        model, tmp_path / "run.pt", optimizer=run[0], lr_scheduler=run[1], epoch=0
    )
    saved = load_torch(tmp_path / "run.pt")
    assert list(saved)[:4] == [
        "epoch",
        "model_state_dict",
        "optimizer_state_dict",
        "lr_scheduler_state_dict",
    ]
    assert saved["epoch"] == 0
    assert str(saved["optimizer_state_dict"]) == str(run[0].state_dict())
    assert saved["lr_scheduler_state_dict"] == run[1].state_dict()
    save_checkpoint(model, tmp_path / "weights.pt")
    weights = load_torch(tmp_path / "weights.pt")
    assert torch_facts(saved["model_state_dict"]) == torch_facts(weights)
    assert report.num_names == len(weights)
    manifest = open_checkpoint(str(tmp_path / "run.pt"))
    assert manifest.wrapper == "model_state_dict"
    assert {one.name for one in manifest.tensors} == set(weights)
    # And upstream's own way to take it up.
    other = support.flamingo()
    fresh = support.optimizer(other)
    missing = other.load_state_dict(saved["model_state_dict"], strict=False)
    assert missing.unexpected_keys == []
    fresh[0].load_state_dict(saved["optimizer_state_dict"])
    fresh[1].load_state_dict(saved["lr_scheduler_state_dict"])
    assert support.steps(other, fresh, range(1, 2)) == support.steps(model, run, range(1, 2))


@pytest.mark.parametrize("family", ["opt", "neox", "llama"])
def test_upstreams_own_files_are_taken_up(family: str, tmp_path: Path) -> None:
    path = make_training_checkpoint(tmp_path, family=family)
    saved = load_torch(path)
    config = load_config(tmp_path / "config.json")
    model: Any = build(config)
    support.freeze(model)
    from transformers import get_constant_schedule_with_warmup

    from flamingo_ckpt.training import parameter_groups

    optimizer = torch.optim.AdamW(parameter_groups(model, 0.3), lr=0.5)
    scheduler = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=10)
    state = load_training_state(path, model, optimizer, scheduler)
    assert (state.epoch, state.next_epoch) == (0, 1)
    own = model.state_dict()
    for name, tensor in saved["model_state_dict"].items():
        plain = name.removeprefix("module.")
        assert torch.equal(own[plain], tensor), name
    assert str(optimizer.state_dict()) == str(saved["optimizer_state_dict"])
    assert scheduler.state_dict() == saved["lr_scheduler_state_dict"]
    assert set(state.report.missing_keys) <= set(own) - {
        name.removeprefix("module.") for name in saved["model_state_dict"]
    }


def test_old_schedules_leave_what_is_gone_and_keep_what_is_new(tmp_path: Path) -> None:
    """torch 2.0 wrote `verbose` and did not know `_is_initial`."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    saved = scheduler.state_dict() | {"verbose": False, "last_epoch": 4, "step": "no method"}
    del saved["_is_initial"]
    old = optimizer.state_dict()
    del old["param_groups"][0]["fused"]
    torch.save(
        {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": old,
            "lr_scheduler_state_dict": saved,
        },
        tmp_path / "run.pt",
    )
    state = load_training_state(tmp_path / "run.pt", model, optimizer, scheduler)
    assert scheduler.last_epoch == 4
    assert state.epoch is None
    assert state.next_epoch == 0
    assert [finding.key for finding in state.findings] == [
        "lr_scheduler_state_dict.verbose",
        "lr_scheduler_state_dict.step",
    ]
    assert isinstance(scheduler.step, types.MethodType)
    assert not hasattr(scheduler, "verbose")
    assert optimizer.param_groups[0]["fused"] is None


SCHEDULES: dict[str, Any] = {
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 5]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.5, 3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [2],
    ),
}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=2),
}


def drive(model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()


def small(optimizer: str, schedule: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    found = OPTIMIZERS[optimizer](model.parameters())
    return model, found, SCHEDULES[schedule](found)


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(one, "cosine") for one in OPTIMIZERS] + [("SGD", one) for one in SCHEDULES],
)
def test_any_optimizer_and_schedule(optimizer: str, schedule: str, tmp_path: Path) -> None:
    model, found, scheduler = small(optimizer, schedule)
    drive(model, found, scheduler, range(3))
    save_checkpoint(model, tmp_path / "a.pt", optimizer=found, lr_scheduler=scheduler, epoch=1)
    drive(model, found, scheduler, range(3, 6))
    again, fresh, fresh_scheduler = small(optimizer, schedule)
    spoil(again)
    state = load_training_state(tmp_path / "a.pt", again, fresh, fresh_scheduler)
    assert state.findings == ()
    drive(again, fresh, fresh_scheduler, range(3, 6))
    assert torch_facts(again.state_dict()) == torch_facts(model.state_dict())
    assert str(fresh.state_dict()) == str(found.state_dict())


def saved_run(path: Path, **options: Any) -> tuple[Any, Any, Any]:
    model, optimizer, scheduler = small("AdamW", "cosine")
    drive(model, optimizer, scheduler, range(2))
    parts = {"optimizer": optimizer, "lr_scheduler": scheduler, "epoch": 1} | options
    save_checkpoint(model, path, **parts)
    return model, optimizer, scheduler


def test_weights_alone_are_taken_up_from_any_checkpoint(tmp_path: Path) -> None:
    model, optimizer, _ = saved_run(tmp_path / "run.pt")
    save_checkpoint(model, tmp_path / "w.safetensors")
    save_checkpoint(model, tmp_path / "folder")
    for name in ("run.pt", "w.safetensors", "folder"):
        again, _, _ = small("AdamW", "cosine")
        spoil(again)
        state = load_training_state(tmp_path / name, again)
        assert torch_facts(again.state_dict()) == torch_facts(model.state_dict())
        unused = [finding.key for finding in state.findings]
        both = ["optimizer_state_dict", "lr_scheduler_state_dict"]
        assert unused == (both if name == "run.pt" else [])
    with pytest.raises(CkptError, match="this is none") as caught:
        load_training_state(tmp_path / "w.safetensors", model, optimizer)
    assert caught.value.code == "FC112"


def changed(saved: dict[str, Any], what: str) -> Any:
    """A file with one thing wrong, and a word of the refusal."""
    groups = saved["optimizer_state_dict"]["param_groups"]
    state = saved["optimizer_state_dict"]["state"]
    if what == "no optimizer":
        del saved["optimizer_state_dict"]
        return "has no `optimizer_state_dict`"
    if what == "no scheduler":
        del saved["lr_scheduler_state_dict"]
        return "has no `lr_scheduler_state_dict`"
    if what == "fewer parameters":
        groups[0]["params"].pop()
        return r"groups of \[5\] parameters, the optimizer of \[6\]"
    if what == "other names":
        saved["optimizer_parameter_names"][0][1] = "elsewhere"
        return "parameter 1 of group 0 is `elsewhere` in the file and `0.bias` in the optimizer"
    if what == "other shape":
        del saved["optimizer_parameter_names"]
        state[0]["exp_avg"], state[4]["exp_avg"] = state[4]["exp_avg"], state[0]["exp_avg"]
        return "`state.0.exp_avg` is 3x4, its parameter 4x4"
    if what == "other optimizer":
        groups[0]["momentum"] = 0.9
        return "has `momentum`, which a AdamW has not"
    if what == "other decay":
        groups[0]["decoupled_weight_decay"] = False
        return "decoupled_weight_decay"
    if what == "kind without amsgrad":  # RAdam, whose state has the same names
        del groups[0]["amsgrad"]
        return "has no `amsgrad`, which a AdamW has"
    if what == "kind of another state":  # Adamax
        state[0]["exp_inf"] = state[0].pop("exp_avg_sq")
        return "`state.0` in the file is not what a AdamW keeps"
    if what == "unknown parameter":
        state[77] = state[0]
        return "knows no"
    if what == "twice":
        groups[0]["params"] = [0, 0, 1, 2, 3, 4]
        return "names a parameter twice"
    if what == "bad epoch":
        saved["epoch"] = "seven"
        return "the epoch in the file is 'seven'"
    if what == "bad groups":
        saved["optimizer_state_dict"]["param_groups"] = {"a": 1}
        return "not what an optimizer writes"
    if what == "other schedule":
        saved["lr_scheduler_state_dict"]["last_epoch"] = "late"
        return "`lr_scheduler_state_dict.last_epoch` is of the type `str`"
    saved["lr_scheduler_state_dict"].pop("last_epoch")
    return "has no `last_epoch`"


WRONG = """no optimizer|no scheduler|fewer parameters|other names|other shape|other optimizer
other decay|kind without amsgrad|kind of another state
unknown parameter|twice|bad epoch|bad groups|other schedule|no position"""


@pytest.mark.parametrize("what", WRONG.replace("\n", "|").split("|"))
def test_a_state_that_does_not_fit_changes_nothing(what: str, tmp_path: Path) -> None:
    saved_run(tmp_path / "good.pt")
    saved = load_torch(tmp_path / "good.pt")
    message = changed(saved, what)
    torch.save(saved, tmp_path / "bad.pt")
    model, optimizer, scheduler = small("AdamW", "cosine")
    before = torch_facts(copy.deepcopy(model.state_dict()))
    states = str(optimizer.state_dict()), scheduler.state_dict()
    with pytest.raises(CkptError, match=message) as caught:
        load_training_state(tmp_path / "bad.pt", model, optimizer, scheduler)
    assert caught.value.code == "FC463"
    assert torch_facts(model.state_dict()) == before
    assert (str(optimizer.state_dict()), scheduler.state_dict()) == states


def test_weights_that_do_not_fit_leave_the_optimizer(tmp_path: Path) -> None:
    _, optimizer, scheduler = saved_run(tmp_path / "run.pt")
    saved = load_torch(tmp_path / "run.pt")
    del saved["model_state_dict"]["2.bias"]
    torch.save(saved, tmp_path / "bad.pt")
    model, optimizer, scheduler = small("AdamW", "cosine")
    with pytest.raises(CkptError, match=r"2\.bias"):
        load_training_state(tmp_path / "bad.pt", model, optimizer, scheduler)
    assert optimizer.state_dict()["state"] == {}


def test_a_value_that_is_not_plain_is_refused_by_its_name(tmp_path: Path) -> None:
    model, optimizer, scheduler = saved_run(tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=False)
    saved["optimizer_state_dict"]["param_groups"][0]["extra"] = {1, 2}
    torch.save(saved, tmp_path / "bad.pt")
    with pytest.raises(CkptError, match=r"`optimizer_state_dict.param_groups.0.extra`") as caught:
        load_training_state(tmp_path / "bad.pt", model, optimizer, scheduler)
    assert caught.value.code == "FC460"
    scheduler.callback = print
    with pytest.raises(CkptError, match=r"`lr_scheduler_state_dict.callback` is of the type"):
        save_checkpoint(model, tmp_path / "new.pt", lr_scheduler=scheduler)
    assert not os.path.exists(tmp_path / "new.pt")


def test_parameters_that_the_model_does_not_have_are_told_by_their_place(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    extra = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1, momentum=0.9)
    for one in (*model.parameters(), extra):
        one.grad = torch.ones_like(one)
    optimizer.step()
    save_checkpoint(model, tmp_path / "a.pt", optimizer=optimizer)
    assert load_torch(tmp_path / "a.pt")["optimizer_parameter_names"] == [["weight", "bias", None]]
    other = torch.optim.SGD(
        [*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9
    )
    load_training_state(tmp_path / "a.pt", model, other)
    assert str(other.state_dict()) == str(optimizer.state_dict())


def test_numbers_of_numpy_in_a_schedule_are_numbers(tmp_path: Path) -> None:
    import numpy

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(numpy.float64(0.1)))
    optimizer.param_groups[0]["lr"] = numpy.float64(0.3)
    save_checkpoint(model, tmp_path / "a.pt", optimizer=optimizer)
    load_training_state(tmp_path / "a.pt", model, optimizer)
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert optimizer.param_groups[0]["lr"] == numpy.float64(0.3)


def test_a_fat_file_of_upstream_is_taken_up(tmp_path: Path) -> None:
    """FSDP1 without `use_orig_params`: nothing is left out, not even the alias trees."""
    model = support.flamingo()
    run = support.optimizer(model)
    support.steps(model, run, range(1))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 2, "model_state_dict": state}, tmp_path / "fat.pt")
    again = support.flamingo()
    spoil(again)
    found = load_training_state(tmp_path / "fat.pt", again)
    assert found.epoch == 2
    assert torch_facts(again.state_dict()) == torch_facts(model.state_dict())


def test_what_is_trained_and_not_in_the_file_is_refused(tmp_path: Path) -> None:
    """Frozen parts may be missing; a block that is to be trained on may not."""
    model = support.flamingo()
    save_checkpoint(model, tmp_path / "run.pt", epoch=0)
    saved = load_torch(tmp_path / "run.pt")
    gate = next(name for name in saved["model_state_dict"] if name.endswith("attn_gate"))
    del saved["model_state_dict"][gate]
    torch.save(saved, tmp_path / "bad.pt")
    with pytest.raises(CkptError, match="attn_gate"):
        load_training_state(tmp_path / "bad.pt", model)
