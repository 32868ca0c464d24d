"""What a load into a module accepts, refuses and leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flamingo_ckpt.errors import CkptError, LoadError
from flamingo_ckpt.loading import LoadOptions, load_into, rebuild_buffers
from tests.loading.engine_support import assert_same, bits, on_meta, saved, scrambled
from tests.zoo_lms import randomise, seeded


class Net(nn.Module):
    """Two layers, a norm with running statistics, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def net(seed: int = 0) -> Net:
    with seeded(seed):
        model = Net()
        randomise(model)
    return model


FORMATS = [".pt", ".safetensors", ".npz"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_equal_names_give_what_torch_gives(suffix: str, tmp_path: Path) -> None:
    source, model, theirs = net(), net(1), net(1)
    state: dict[str, Any] = dict(source.state_dict())
    theirs.load_state_dict(state)
    if suffix == ".npz":
        state = {name: tensor.numpy() for name, tensor in state.items()}
    report = load_into(model, saved(state, tmp_path, suffix))
    assert_same(model, theirs)
    assert (report.num_loaded, report.num_bytes) == (8, 11 * 6 * 4 + 36 * 4 + 5 * 6 * 4 + 8)
    assert report.layout is report.model_layout is None


def test_in_place_means_in_place(tmp_path: Path) -> None:
    model = net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    model.first.bias.requires_grad_(False)
    load_into(model, saved(net().state_dict(), tmp_path))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert model.head.weight is model.embed.weight
    assert not model.first.bias.requires_grad
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in model.parameters()}


def test_autograd_notices_that_a_saved_tensor_was_filled(tmp_path: Path) -> None:
    model = net(1)
    loss = model.first.weight.pow(2).sum()
    load_into(model, saved(net().state_dict(), tmp_path))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_module_on_meta_is_mapped_and_the_file_stays_as_it_is(
    suffix: str, tmp_path: Path
) -> None:
    source = net()
    state: dict[str, Any] = dict(source.state_dict())
    if suffix == ".npz":
        state = {name: tensor.numpy() for name, tensor in state.items()}
    path = saved(state, tmp_path, suffix)
    content = path.read_bytes()
    model = on_meta(net(1))
    model.first.weight.requires_grad_(False)
    report = load_into(model, path)
    assert_same(model, source)
    # the records of numpy's archives begin anywhere, and an unaligned tensor is copied
    assert report.num_mapped == 8 or suffix == ".npz"
    assert model.head.weight is model.embed.weight
    assert not model.first.weight.requires_grad
    assert model.first.bias.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == content


def test_assign_replaces_and_keeps_ties(tmp_path: Path) -> None:
    source, model = net(), net(1)
    before = model.first.weight
    load_into(model, saved(source.state_dict(), tmp_path), LoadOptions(assign=True))
    assert_same(model, source)
    assert model.first.weight is not before
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_are_torchs_own_and_counted(dtype: torch.dtype, tmp_path: Path) -> None:
    source, model, theirs = net(), net(1).to(dtype), net(1).to(dtype)
    theirs.load_state_dict(source.state_dict())
    report = load_into(model, saved(source.state_dict(), tmp_path))
    assert_same(model, theirs)
    assert len(report.cast) == 7
    assert next(iter(report.cast.values()))[0] == "F32"
    meta = on_meta(net(1))
    load_into(meta, tmp_path / "checkpoint.pt", LoadOptions(dtype=dtype))
    assert_same(meta, theirs)
    meta = on_meta(net(1).to(dtype))
    load_into(meta, tmp_path / "checkpoint.pt", LoadOptions(dtype="keep"))
    assert_same(meta, source)


def test_a_file_that_ties_less_than_the_module(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    model = net(1)
    del state["head.weight"]
    load_into(model, saved(state, tmp_path))
    assert_same(model, net())
    state["head.weight"] = state["embed.weight"].clone()
    report = load_into(model, saved(state, tmp_path))
    assert report.aliases == {"head.weight": "embed.weight"}
    state["head.weight"][0, 0] += 1
    before = bits(model)
    for policy in ("strict", "lenient"):
        with pytest.raises(LoadError, match="two names of one tensor") as caught:
            load_into(model, saved(state, tmp_path), LoadOptions(policy=policy))
        assert caught.value.code == "FC202"
    assert bits(model) == before


def _broken(change: str) -> dict[str, Any]:
    state = dict(net().state_dict())
    if change == "missing":
        del state["first.weight"]
    elif change == "unexpected":
        state["third.weight"] = torch.ones(2)
    elif change == "shape":
        state["first.weight"] = torch.ones(6, 5)
    elif change == "transposed":
        state["embed.weight"] = state["head.weight"] = torch.ones(6, 11)
    elif change == "integers":
        state["first.weight"] = torch.ones(6, 6, dtype=torch.int8)
    elif change == "nothing":
        state = {f"other.{name}": tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ("missing", "FC430", "1 missing from the file:\n    first.weight"),
        ("unexpected", "FC430", "1 unexpected in the file:\n    third.weight"),
        ("shape", "FC430", "first.weight: 6x5 in the file, 6x6 in the model"),
        ("transposed", "FC430", "embed.weight: 6x11 in the file, 11x6 in the model"),
        ("integers", "FC437", "`first.weight` is I8"),
        ("nothing", "FC431", "0 of 8 tensors of Net have a counterpart among the 9 of the file"),
    ],
)
@pytest.mark.parametrize("policy", ["strict", "lenient", "partial"])
def test_a_refused_load_changes_nothing(
    change: str, code: str, told: str, policy: str, tmp_path: Path
) -> None:
    model = net(1)
    before = bits(model)
    path = saved(_broken(change), tmp_path)
    options = LoadOptions(policy=policy)
    if policy == "lenient" and change in ("missing", "unexpected"):
        report = load_into(model, path, options)
        assert [*report.missing_keys, *report.unexpected_keys] == [told.split()[-1]]
        return
    with pytest.raises(LoadError, match=told) as caught:
        load_into(model, path, options)
    assert caught.value.code == code
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, CkptError)
    assert caught.value.report.uri == str(path)
    assert bits(model) == before


def test_the_message_of_a_missing_level_tells_which(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as caught:
        load_into(net(1), saved(_broken("nothing"), tmp_path))
    assert "`other.`" in str(caught.value.hint)


def test_a_head_that_was_replaced_is_no_lost_tower(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    state["second.weight"] = state.pop("first.weight")
    report = load_into(net(1), saved(state, tmp_path), LoadOptions(policy="lenient"))
    assert report.missing_keys == ("first.weight",)
    assert report.unexpected_keys == ("second.weight",)


@pytest.mark.parametrize("assign", [True, False])
def test_a_damaged_torch_file_is_refused(assign: bool, tmp_path: Path) -> None:
    path = saved(net().state_dict(), tmp_path)
    content = bytearray(path.read_bytes())
    wanted = net().first.weight.detach().numpy().tobytes()
    content[bytes(content).index(wanted) + 5] ^= 1
    path.write_bytes(bytes(content))
    model = on_meta(net(1)) if assign else net(1)
    with pytest.raises(CkptError, match="CRC-32"):
        load_into(model, path)
    if assign:
        assert all(parameter.is_meta for parameter in model.parameters())


def test_a_shared_storage_is_checked_although_no_tensor_covers_it(tmp_path: Path) -> None:
    whole = torch.arange(72.0)
    path = saved({"a": whole[:36].view(6, 6), "b": whole[36:].view(6, 6)}, tmp_path)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(6, 6))
            self.b = nn.Parameter(torch.zeros(6, 6))

    model = Pair()
    load_into(model, path)
    assert torch.equal(model.b.detach().reshape(-1), whole[36:])
    content = bytearray(path.read_bytes())
    content[bytes(content).index(whole.numpy().tobytes()) + 9] ^= 1
    path.write_bytes(bytes(content))
    for one in (Pair(), on_meta(Pair())):
        with pytest.raises(CkptError, match="CRC-32"):
            load_into(one, path)


def test_views_and_other_strides(tmp_path: Path) -> None:
    model, reference = nn.Linear(6, 5), nn.Linear(6, 5)
    state = {"weight": torch.randn(6, 5).t(), "bias": torch.randn(1).expand(5)}
    reference.load_state_dict(state)
    path = saved(state, tmp_path)
    load_into(model, path)
    assert_same(model, reference)
    # the module's own tensor may lie otherwise as well
    model.weight = nn.Parameter(torch.zeros(6, 5).t())
    load_into(model, path)
    assert model.weight.stride() == (1, 5)
    assert_same(model, reference)


@pytest.mark.parametrize("wrapped", ["ddp", "compile", "checkpoint", "file"])
def test_wrappers_on_either_side(wrapped: str, tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    source, model = net(), net(1)
    state = dict(source.state_dict())
    outer: Any = model
    if wrapped == "ddp":
        outer = nn.DataParallel(model)
    elif wrapped == "compile":
        outer = torch.compile(model, backend="eager")
    elif wrapped == "checkpoint":
        model.first = checkpoint_wrapper(model.first)  # type: ignore[assignment,no-untyped-call]
    else:
        state = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    load_into(outer, saved(state, tmp_path))
    want = bits(source)
    assert {n.replace("._checkpoint_wrapped_module", ""): b for n, b in bits(model).items()} == want
    # what such a module saves is loaded again
    load_into(outer, saved(outer.state_dict(), tmp_path, ".pt"))


def test_a_real_submodule_named_module(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(2, 2)
            self.module = nn.ModuleDict({"x": nn.Linear(2, 2)})

    source, model = Odd(), Odd()
    load_into(model, saved(source.state_dict(), tmp_path))
    assert_same(model, source)


def test_old_buffers_may_be_in_the_file_and_computed_ones_missing(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    state |= {
        "layers.0.attention.rotary_emb.inv_freq": torch.ones(3),
        "layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4)[None],
    }
    del state["norm.num_batches_tracked"]
    report = load_into(net(1), saved(state, tmp_path))
    assert len(report.ignored) == 3
    assert report.missing_keys == report.unexpected_keys == ()
    assert any(finding.code == "FC434" for finding in report.findings)


def test_may_miss_and_globs(tmp_path: Path) -> None:
    state = dict(net().state_dict())
    del state["first.bias"]
    path = saved(state, tmp_path)
    model = net(1)
    kept = model.first.bias.detach().clone()
    report = load_into(model, path, LoadOptions(may_miss=frozenset({"first.bias"})))
    assert report.missing_keys == ()
    assert torch.equal(model.first.bias, kept)
    meta = on_meta(net(1))
    with pytest.raises(LoadError, match="left without bytes"):
        load_into(meta, path, LoadOptions(may_miss=frozenset({"first.bias"})))
    report = load_into(net(1), path, LoadOptions(policy="lenient", exclude=("norm.*",)))
    assert len(report.missing_keys) == 5
    with pytest.raises(CkptError, match="there is no loading policy `loose`"):
        LoadOptions(policy="loose")


def test_nothing_is_left_on_meta_unsaid(tmp_path: Path) -> None:
    class Secret(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("table", torch.ones(2), persistent=False)

    path = saved(Secret().state_dict(), tmp_path)
    model = on_meta(Secret())
    for policy in ("strict", "lenient"):
        with pytest.raises(LoadError, match="table") as caught:
            load_into(model, path, LoadOptions(policy=policy))
        assert caught.value.code == "FC433"
    with pytest.raises(LoadError, match="`table`"):
        rebuild_buffers(model)
    model.table = torch.zeros(2)
    load_into(model, path)
    assert not model.weight.is_meta
    loose = on_meta(nn.Linear(2, 2))
    loose.scale = torch.ones(2, device="meta")
    with pytest.raises(LoadError, match="scale"):
        load_into(loose, path)


def test_a_module_that_no_file_can_fill(tmp_path: Path) -> None:
    path = saved(nn.Linear(2, 2).state_dict(), tmp_path)
    with pytest.raises(CkptError, match="UninitializedParameter"):
        load_into(nn.LazyLinear(2), path)


def test_scalars_meet_vectors_of_one(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(shape))

    for src, dst in (((), (1,)), ((1,), ())):
        path = saved({"gate": torch.full(src, 3.0)}, tmp_path)
        for model in (Scale(dst), on_meta(Scale(dst))):
            load_into(model, path)
            assert torch.equal(model.gate.detach(), torch.full(dst, 3.0))


def test_tensors_of_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    reference = nn.Linear(3, 2)
    load_into(model, saved(reference.state_dict(), tmp_path))
    assert_same(model, reference)


def test_a_copy_of_a_loaded_module_is_its_own(tmp_path: Path) -> None:
    model = on_meta(net(1))
    load_into(model, saved(net().state_dict(), tmp_path, ".safetensors"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.weight.zero_()
    assert_same(model, net())
    assert_same(scrambled(model), scrambled(net()))


def test_hooks_that_change_a_state_dict_are_told(tmp_path: Path) -> None:
    def double(module: Any, state: Any, prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2

    path = saved(net().state_dict(), tmp_path)
    model = net(1)
    assert load_into(model, path).findings == ()
    model.first.register_load_state_dict_pre_hook(double)
    (finding,) = load_into(model, path).findings
    assert finding.code == "FC438"
    assert "`first`" in finding.detail
