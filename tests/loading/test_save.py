"""What is saved of a model: upstream's filter as the oracle, torch and safetensors as readers."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fixtures.make_training_checkpoint import _process_group as one_process
from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.loading.save import save_checkpoint
from flamingo_ckpt.models import build, shard_model
from flamingo_ckpt.models.config import parse_config
from tests import zoo
from tests.support import cli_ok, facts_at, load_torch, torch_facts

NEOX = ("gpt_neox", "pythia")
HEAD, RELEASED_HEAD = "lang_encoder.lm_head.weight", "lang_encoder.embed_out.weight"


def ours(family: str) -> Any:
    """Our class, with the zoo's weights, frozen as upstream freezes."""
    source = zoo.openflamingo(family)
    model = build(parse_config(source.config, "the zoo"))
    model.load_state_dict(source.full)
    trained = {name for name, one in source.model.named_parameters() if one.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def upstream_file(family: str) -> dict[str, torch.Tensor]:
    """What upstream writes, the head of GPT-NeoX under its released name, which it then keeps."""
    source = zoo.openflamingo(family)
    state = source.partial
    if family in NEOX:
        assert HEAD not in state
        state[RELEASED_HEAD] = source.full[HEAD]
    return state


@pytest.mark.parametrize("make", [ours, lambda family: zoo.openflamingo(family).model])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_it_is_what_upstream_saves(family: str, make: Callable[[str], Any], tmp_path: Path) -> None:
    expected = torch_facts(upstream_file(family))
    model = make(family)
    report = save_checkpoint(model, tmp_path / "a.pt")
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert torch_facts(load_torch(tmp_path / "a.pt")) == expected
    assert facts_at(tmp_path / "a.safetensors") == expected
    assert report.num_names == len(expected)
    names = {item.name.replace(HEAD, RELEASED_HEAD) for item in report.dropped}
    state = {name.replace(HEAD, RELEASED_HEAD) for name in model.state_dict()}
    if family not in NEOX:
        state = set(model.state_dict())
        names = {item.name for item in report.dropped}
    assert names | expected.keys() == state
    assert not names & expected.keys()


def test_frozen_embeddings_are_kept(tmp_path: Path) -> None:
    """Upstream's own purpose; its test of names misses `wte`, and then takes the head's alias."""
    for family in zoo.FAMILIES:
        source = zoo.openflamingo(family)
        model = copy.deepcopy(source.model)
        model.lang_encoder.get_input_embeddings().requires_grad_(False)
        save_checkpoint(model, tmp_path / f"{family}.pt")
        assert torch_facts(load_torch(tmp_path / f"{family}.pt")) == torch_facts(
            upstream_file(family)
        ), family


def test_a_trained_tower_is_kept(tmp_path: Path) -> None:
    """Upstream leaves out whatever has `vision_encoder` in its name."""
    model = copy.deepcopy(zoo.openflamingo("llama").model)
    model.vision_encoder.conv1.weight.requires_grad_(True)
    save_checkpoint(model, tmp_path / "a.pt")
    saved = load_torch(tmp_path / "a.pt")
    extra = saved.keys() - upstream_file("llama").keys()
    assert extra == {"vision_encoder.conv1.weight"}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_whole_model_has_every_tensor_once(family: str, tmp_path: Path) -> None:
    source = zoo.openflamingo(family)
    trees = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
    expected = {
        RELEASED_HEAD if family in NEOX and name == HEAD else name: tensor
        for name, tensor in source.full.items()
        if not name.startswith(trees)
    }
    report = save_checkpoint(source.model, tmp_path / "a.pt", trainable_only=False)
    save_checkpoint(source.model, tmp_path / "a.safetensors", trainable_only=False)
    loaded = load_torch(tmp_path / "a.pt")
    assert torch_facts(loaded) == torch_facts(expected)
    assert facts_at(tmp_path / "a.safetensors") == torch_facts(expected)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        stored = set(file.keys())
    tied = {"mpt7b": HEAD, "opt": HEAD}.get(family)
    assert expected.keys() - stored == ({tied} if tied else set())
    if tied:
        embedding = f"lang_encoder.{zoo.FAMILIES[family][1]}.weight"
        assert loaded[tied].data_ptr() == loaded[embedding].data_ptr()
    assert all("second name" in item.reason for item in report.dropped)
    assert (tmp_path / "a.pt").stat().st_size == report.files[0][1]


class Plain(nn.Module):
    """A module of no known kind: a norm with statistics, a tied weight, a part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        self.frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight
        self.module = nn.Linear(4, 2)
        self.register_buffer("computed", torch.ones(2), persistent=False)
        self.frozen.requires_grad_(False)
        self.embed = nn.Embedding(3, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.module(self.tied(self.head(self.frozen(self.body(x)))))
        return y


def test_of_any_module_what_training_changes(tmp_path: Path) -> None:
    model = Plain()
    model(torch.randn(8, 4))
    report = save_checkpoint(model, tmp_path / "a.pt")
    saved = load_torch(tmp_path / "a.pt")
    state = model.state_dict()
    kept = {name for name in state if not name.startswith(("frozen", "embed"))}
    assert torch_facts(saved) == torch_facts({name: state[name] for name in kept})
    assert "body.1.running_mean" in kept
    assert "module.weight" in kept
    assert {item.reason for item in report.dropped} == {"not trained"}
    model.requires_grad_(False)
    with pytest.raises(CkptError, match="nothing in the model is trained") as caught:
        save_checkpoint(model, tmp_path / "b.pt")
    assert caught.value.code == "FC462"
    save_checkpoint(model, tmp_path / "b.pt", trainable_only=False)
    assert torch_facts(load_torch(tmp_path / "b.pt")) == torch_facts(state)


@pytest.mark.filterwarnings("ignore")
def test_wrappers_leave_no_trace_in_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Plain()
    expected = torch_facts(
        {name: one for name, one in model.state_dict().items() if "frozen" not in name}
    )
    del expected["embed.weight"]
    model.body = checkpoint_wrapper(model.body)
    for number, wrapped in enumerate((nn.DataParallel(model), torch.compile(model))):
        save_checkpoint(wrapped, tmp_path / f"{number}.pt")
        assert torch_facts(load_torch(tmp_path / f"{number}.pt")) == expected
    model.head = torch.compile(model.head)
    save_checkpoint(model, tmp_path / "inner.pt")
    assert torch_facts(load_torch(tmp_path / "inner.pt")) == expected


def test_any_tensor_in_memory_arrives_as_its_value(tmp_path: Path) -> None:
    model = nn.Module()
    base = torch.arange(24.0).reshape(4, 6)
    values = {
        "transposed": base.t(),
        "column": base[:, 1],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "rounded": torch.randn(3).to(torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "whole": torch.arange(3),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "wide": torch.randn(2, dtype=torch.float64),
    }
    for name, tensor in values.items():
        model.register_buffer(name, tensor)
    save_checkpoint(model, tmp_path / "a.pt", trainable_only=False)
    expected = torch_facts({name: one.resolve_conj().contiguous() for name, one in values.items()})
    assert torch_facts(load_torch(tmp_path / "a.pt")) == expected


def test_views_of_one_memory_are_tensors_of_their_own(tmp_path: Path) -> None:
    model = nn.Module()
    base = torch.arange(6.0)
    model.register_buffer("first", base[:3])
    model.register_buffer("second", base[3:])
    model.register_buffer("same", base[:3])
    save_checkpoint(model, tmp_path / "a.safetensors", trainable_only=False)
    assert open_checkpoint(str(tmp_path / "a.safetensors")).tied_groups() == [["first", "same"]]
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded["second"].tolist() == [3, 4, 5]


def test_a_cast_says_what_it_lost(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(1e9)
    report = save_checkpoint(model, tmp_path / "a.safetensors", dtype=torch.float16)
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["weight"], model.weight.detach().half())
    assert "FC303" in {finding.code for finding in report.findings}
    with pytest.raises(CkptError, match="`int8` is no dtype"):
        save_checkpoint(model, tmp_path / "b.safetensors", dtype=torch.int8)


def test_metadata_and_shards(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    save_checkpoint(model, tmp_path / "a.safetensors", metadata={"run": "7"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "run": "7"}
    report = save_checkpoint(model, tmp_path / "folder", max_shard_bytes=300)
    assert len(report.files) == 5
    assert facts_at(tmp_path / "folder") == torch_facts(model.state_dict())


def test_what_lies_there_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "a.pt"
    save_checkpoint(model, path)
    before = path.read_bytes()
    with pytest.raises(CkptError) as caught:
        save_checkpoint(nn.Linear(3, 3), path)
    assert caught.value.code == "FC003"
    assert path.read_bytes() == before
    save_checkpoint(nn.Linear(3, 3), path, overwrite=True)
    assert load_torch(path)["weight"].shape == (3, 3)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flamingo_ckpt.convert.write_all", fail)
    with pytest.raises(CkptError, match="No space left"):
        save_checkpoint(nn.Linear(3, 3), path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> Any:
        return {"counter": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    cases: list[tuple[Any, str, dict[str, Any], str]] = [
        (Odd(), "FC306", {}, "`_extra_state` in the model's state dict"),
        (nn.Linear(2, 2, device="meta"), "FC306", {}, "`weight` is on the meta device"),
        (sparse, "FC306", {"trainable_only": False}, "`table` is not dense"),
        (nn.Linear(2, 2), "FC006", {"epoch": 1, "path": "b.safetensors"}, "cannot hold the state"),
        (nn.Linear(2, 2), "FC006", {"epoch": 1, "dtype": "bfloat16"}, "not with bfloat16"),
        (nn.Linear(2, 2), "FC006", {"metadata": {"a": "b"}}, "torch files hold no metadata"),
        (nn.Linear(2, 2), "FC460", {"epoch": "7"}, "the epoch is '7'"),
        (nn.Linear(2, 2), "FC006", {"path": "a.ckpt"}, "ends in `.ckpt`"),
    ]
    for model, code, options, message in cases:
        path = tmp_path / options.pop("path", "a.pt")
        with pytest.raises(CkptError, match=message) as caught:
            save_checkpoint(model, path, **options)
        assert caught.value.code == code
    assert os.listdir(tmp_path) == []


def test_an_alias_tree_that_strayed_is_refused(tmp_path: Path) -> None:
    """A decoder layer replaced in the tree that computes and not in the other, or the reverse."""
    model = copy.deepcopy(zoo.openflamingo("llama").model)
    blocks = model.lang_encoder.old_decoder_blocks
    blocks[0] = copy.deepcopy(blocks[0])
    with pytest.raises(CkptError, match=r"`lang_encoder.old_decoder_blocks.0.*of its own"):
        save_checkpoint(model, tmp_path / "a.pt")


def test_what_is_saved_converts_and_verifies(tmp_path: Path) -> None:
    save_checkpoint(ours("opt"), tmp_path / "a.safetensors")
    cli_ok("convert", tmp_path / "a.safetensors", tmp_path / "b.pt")
    cli_ok("verify", tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert torch_facts(load_torch(tmp_path / "b.pt")) == torch_facts(upstream_file("opt"))


def test_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    model = ours("llama")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_checkpoint(model, tmp_path / name / "x.pt")
    first, second = ((tmp_path / name / "x.pt").read_bytes() for name in ("a", "b"))
    assert first == second
    assert torch.load(io.BytesIO(first), weights_only=True).keys() == upstream_file("llama").keys()


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    with one_process():
        yield


@pytest.mark.usefixtures("group")
def test_ddp_leaves_no_trace_in_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    save_checkpoint(nn.parallel.DistributedDataParallel(model), tmp_path / "a.pt")
    assert torch_facts(load_torch(tmp_path / "a.pt")) == torch_facts(model.state_dict())


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")
def test_flat_parameters_are_refused(tmp_path: Path) -> None:
    """With `use_orig_params` their names look right, and the tensors are pieces."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for use_orig_params in (False, True):
        inner = FullyShardedDataParallel(
            nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        with pytest.raises(CkptError, match="wrapped by FSDP1") as caught:
            save_checkpoint(nn.Sequential(inner), tmp_path / "a.pt")
        assert caught.value.code == "FC461"
        assert "shard_model" in (caught.value.hint or "")


@pytest.mark.usefixtures("group")
def test_a_model_is_split_once(tmp_path: Path) -> None:
    model = ours("llama")
    expected = torch_facts(upstream_file("llama"))
    save_checkpoint(shard_model(model), tmp_path / "a.pt")
    assert torch_facts(load_torch(tmp_path / "a.pt")) == expected
    with pytest.raises(CkptError, match="split already") as caught:
        shard_model(model)
    assert caught.value.code == "FC461"


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_the_twin_of_hugging_face_is_saved_under_its_names(family: str, tmp_path: Path) -> None:
    source = zoo.openflamingo(family)
    model = build(parse_config(source.config, "the zoo"), layout="hf-flamingo")
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("perceiver" in name or "gated_cross_attn_layer" in name)
    save_checkpoint(model, tmp_path / "part.safetensors")
    save_checkpoint(model, tmp_path / "whole.safetensors", trainable_only=False)
    for name in ("part", "whole"):
        document = cli_ok("inspect", tmp_path / f"{name}.safetensors", "--json").document
        assert document["layout"]["name"] == "hf-flamingo"
    cli_ok("convert", tmp_path / "part.safetensors", tmp_path / "of.pt", "--to", "openflamingo")
    assert set(load_torch(tmp_path / "of.pt")) == set(upstream_file(family))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_single_element_of_a_larger_table(suffix: str, tmp_path: Path) -> None:
    """Contiguous by torch's word, and with a step that no view of its bytes can have."""
    single: Any = nn.Module()
    single.one = nn.Parameter(torch.arange(4.0).reshape(1, 4)[:, 1])
    assert single.one.stride() == (4,)
    path = tmp_path / f"a{suffix}"
    save_checkpoint(single, path)
    assert facts_at(path) == torch_facts({"one": torch.tensor([1.0])})
