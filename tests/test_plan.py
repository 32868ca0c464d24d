"""Every source name is mapped, dropped with a reason, or refused."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.layouts.prefixes import strip_wrappers
from flamingo_ckpt.plan import make_plan
from flamingo_ckpt.selection import PlanOptions
from flamingo_ckpt.tensors import DTYPES, Manifest, Storage, TensorInfo
from tests.support import MemorySource, cli, cli_ok, facts_at, load_torch, torch_facts


def manifest(*tensors: TensorInfo) -> Manifest:
    return Manifest(uri="memory", format="test", tensors=tensors, files=())


def tensor(
    name: str, storage: Storage | None = None, dtype: str = "F32", size: int = 4
) -> TensorInfo:
    source = MemorySource(bytes(size * 16))
    storage = storage or Storage(key=name, num_bytes=size * 4, locate=lambda: (source, 0))
    return TensorInfo(name=name, dtype=DTYPES[dtype], shape=(size,), storage=storage)


_names = st.lists(
    st.sampled_from(["module", "a", "b", "w", "_orig_mod", "0"]), min_size=1, max_size=4
).map(".".join)


def spellings(name: str) -> tuple[str, str]:
    return name, strip_wrappers(name)[0]


@given(names=st.lists(_names, min_size=1, max_size=8, unique=True), keep=st.booleans())
def test_every_name_is_accounted_for(names: list[str], keep: bool) -> None:
    source = manifest(*map(tensor, names))
    globs = ("b*", "*.b.*")
    options = PlanOptions(keep_prefix=keep, exclude=globs)
    kept = [n for n in names if not any(fnmatchcase(s, g) for s in spellings(n) for g in globs)]
    targets = kept if keep else [strip_wrappers(name)[0] for name in kept]
    if len(set(targets)) < len(targets) or not targets:
        with pytest.raises(CkptError) as refused:
            make_plan(source, options)
        assert refused.value.code == ("FC202" if targets else "FC201")
        return
    plan = make_plan(source, options)
    assert [step.name for step in plan.steps] == targets
    mapped = [step.source.name for step in plan.steps]
    dropped = [item.name for item in plan.dropped]
    assert sorted(mapped + dropped) == sorted(names)
    assert all(item.reason for item in plan.dropped)
    assert plan.num_names == len(targets)


def test_include_and_exclude_match_both_spellings() -> None:
    source = manifest(tensor("module.a.w"), tensor("module.b.w"), tensor("module.b.v"))
    for options in (
        PlanOptions(include=("module.b.*",), exclude=("*.v",)),
        PlanOptions(include=("b.*",), exclude=("b.v",)),
    ):
        plan = make_plan(source, options)
        assert [step.name for step in plan.steps] == ["b.w"]
        assert {item.name: item.reason for item in plan.dropped} == {
            "module.a.w": "not in --include",
            "module.b.v": "in --exclude",
        }


def test_globs_are_case_sensitive_and_whole() -> None:
    source = manifest(tensor("Weight"), tensor("weight"), tensor("weights"))
    plan = make_plan(source, PlanOptions(include=("weight",)))
    assert [step.name for step in plan.steps] == ["weight"]


def test_nothing_left() -> None:
    with pytest.raises(CkptError) as refused:
        make_plan(manifest(tensor("a")), PlanOptions(exclude=("*",)))
    assert refused.value.code == "FC201"
    with pytest.raises(CkptError) as refused:
        make_plan(manifest(), PlanOptions())
    assert refused.value.code == "FC201"


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00", "\x1b[31mred", "x\x85y", "\x7f"])
def test_names_that_no_tensor_has(name: str) -> None:
    with pytest.raises(CkptError) as refused:
        make_plan(manifest(tensor(name)), PlanOptions())
    assert refused.value.code == "FC505"


@pytest.mark.parametrize("name", ["层.0", "a b", "quote'", "🦩", "a\u202eb"])
def test_odd_names_are_kept(name: str) -> None:
    assert make_plan(manifest(tensor(name)), PlanOptions()).steps[0].name == name


def test_tied_names_become_aliases() -> None:
    shared = tensor("a").storage
    source = manifest(tensor("x.a", shared), tensor("b"), tensor("module.c", shared))
    plan = make_plan(source, PlanOptions())
    assert [(step.name, step.aliases) for step in plan.steps] == [("x.a", ("c",)), ("b", ())]
    assert (plan.num_names, plan.num_bytes, plan.renamed) == (3, 32, 1)
    # One of three names lost a `module`: that may have been a submodule.
    assert [finding.code for finding in plan.findings] == ["FC212"]


def test_a_pattern_that_fits_no_name_is_said() -> None:
    source = manifest(tensor("module.a"), tensor("module.b"))
    plan = make_plan(source, PlanOptions(include=("a", "*.b", "c"), exclude=("z*",)))
    assert [(f.code, f.detail) for f in plan.findings] == [
        ("FC213", "--include `c` fits no name"),
        ("FC213", "--exclude `z*` fits no name"),
    ]


def test_untied_names_are_steps_of_their_own() -> None:
    shared = tensor("a").storage
    source = manifest(tensor("a", shared), tensor("b", shared))
    plan = make_plan(source, PlanOptions(untie=True))
    assert [(step.name, step.aliases) for step in plan.steps] == [("a", ()), ("b", ())]
    assert plan.num_bytes == 32


def test_untie_writes_a_copy_for_every_name(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"embed": weight, "head": weight}, tmp_path / "src.pt")
    for target in ("a.safetensors", "a.pt"):
        cli_ok("convert", tmp_path / "src.pt", tmp_path / target, "--untie")
        cli_ok("verify", tmp_path / "src.pt", tmp_path / target)
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch_facts(stored) == torch_facts({"embed": weight, "head": weight})
    loaded = load_torch(tmp_path / "a.pt")
    assert loaded["embed"].data_ptr() != loaded["head"].data_ptr()


def test_overlapping_views_are_said_to_be_written_in_full(tmp_path: Path) -> None:
    base = torch.randn(10)
    tensors = {"left": base[:6], "right": base[4:], "apart": torch.ones(3)}
    torch.save(tensors, tmp_path / "src.pt")
    outcome = cli("convert", tmp_path / "src.pt", tmp_path / "a.safetensors", "--json")
    assert outcome.code == 0
    (finding,) = [f for f in outcome.document["findings"] if f["code"] == "FC211"]
    assert (finding["key"], finding["severity"]) == ("right", "info")
    apart = {"left": base[:5], "right": base[5:]}
    torch.save(apart, tmp_path / "apart.pt")
    outcome = cli("convert", tmp_path / "apart.pt", tmp_path / "b.safetensors", "--json")
    assert (outcome.code, outcome.codes) == (0, [])


def test_excluding_the_first_of_a_tied_pair_keeps_the_second(tmp_path: Path) -> None:
    weight = torch.randn(3)
    torch.save({"embed": weight, "head": weight}, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "a.safetensors", "--exclude", "embed")
    assert list(facts_at(tmp_path / "a.safetensors")) == ["head"]


@pytest.mark.parametrize(
    ("dtype", "wanted", "result"),
    [
        ("F32", "bfloat16", "BF16"),
        ("F64", "float16", "F16"),
        ("F8_E4M3", "float32", "F32"),
        ("BF16", "bfloat16", "BF16"),
        ("I64", "float16", "I64"),
        ("BOOL", "float32", "BOOL"),
        ("C64", "float16", "C64"),
        ("F32", "keep", "F32"),
    ],
)
def test_dtypes(dtype: str, wanted: str, result: str) -> None:
    width = DTYPES[dtype].bits // 8
    source = MemorySource(bytes(4 * width))
    storage = Storage(key="0", num_bytes=4 * width, locate=lambda: (source, 0))
    (step,) = make_plan(manifest(tensor("w", storage, dtype)), PlanOptions(dtype=wanted)).steps
    assert step.dtype.name == result
    assert step.is_cast == (dtype != result)


def test_many_views_of_one_storage_are_bounded(tmp_path: Path) -> None:
    """Each is no larger than the storage; all together they would be."""
    base = torch.randn(1000)
    views = {f"v{i}": base[i : 900 + i] for i in range(20)}
    torch.save(views, tmp_path / "src.pt")
    outcome = cli("convert", tmp_path / "src.pt", tmp_path / "a.safetensors", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC307"])
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "a.safetensors", "--max-expansion", 20)
    few = {name: views[name] for name in ("v0", "v1", "v2")}
    torch.save(few, tmp_path / "few.pt")
    cli_ok("convert", tmp_path / "few.pt", tmp_path / "few.safetensors")


def test_plans_are_made_without_reading_tensor_data(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(100_000), "b": torch.randn(3)}, tmp_path / "src.pt")
    opened = open_checkpoint(str(tmp_path / "src.pt"))
    asked: list[int] = []
    for source in opened.sources:
        read = source.read_into
        source.read_into = lambda offset, buffer, read=read: (  # type: ignore[method-assign]
            asked.append(len(buffer)),
            read(offset, buffer),
        )
    make_plan(opened, PlanOptions(dtype="bfloat16"))
    assert asked == []
