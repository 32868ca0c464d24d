"""convert: what the options do, what the summary says, and round trips over all formats."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ckpt.formats import open_checkpoint
from flamingo_ckpt.plan import make_plan
from flamingo_ckpt.selection import PlanOptions
from flamingo_ckpt.write_plan import split_shards
from tests.support import (
    FIXTURES,
    cli,
    cli_ok,
    facts_at,
    load_torch,
    names_in,
    python,
    torch_facts,
    tree,
)

SOURCES = [
    "torch-bare.pt",
    "torch-wrapped.pt",
    "torch-module-prefix.pt",
    "torch-legacy.pt",
    "torch-deflated.pt",
    "torch-unaligned.pt",
    "torch-big-endian.pt",
    "torch-no-byteorder.pt",
    "torchscript.pt",
    "tiny.safetensors",
    "sharded",
    "arrays.npz",
    "arrays-compressed.npz",
    "fortran.npy",
    "big-endian.npy",
    "hf-bin",
]


def save(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, tmp_path / "src.pt")
    return tmp_path / "src.pt"


@pytest.mark.parametrize("target", ["a.safetensors", "a.pt", "a.npz", "folder", "sharded", "bin"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_fixture_into_every_format(name: str, target: str, tmp_path: Path) -> None:
    src, dst = FIXTURES / name, tmp_path / target
    options: list[Any] = {
        "sharded": ["--max-shard-size", 200],
        "bin": ["--format", "torch", "--max-shard-size", 300],
        "a.npz": ["--npy-bfloat16"],
    }.get(target, [])
    document = cli_ok("convert", src, dst, *options, "--json").document
    numpy_flag = ["--npy-bfloat16"] if target == "a.npz" else []
    cli_ok("verify", src, dst, *numpy_flag)
    before = facts_at(src)
    wanted = {key.removeprefix("module."): facts for key, facts in before.items()}
    assert facts_at(dst, npy_bfloat16=True) == wanted
    assert document["summary"]["verified"] == document["summary"]["num_tensors"] == len(wanted)
    assert document["verdict"] == "pass"


def test_every_output_is_deterministic(tmp_path: Path) -> None:
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        for target in ("a.safetensors", "a.pt", "a.npz", "out"):
            cli_ok(
                *("convert", FIXTURES / "torch-bare.pt", tmp_path / run / target),
                *(["--npy-bfloat16"] if target == "a.npz" else []),
                *(["--max-shard-size", 300] if target == "out" else []),
            )
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_summary_counts(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    torch.save(
        {
            "epoch": 4,
            "state_dict": {"module.a": weight, "module.tied": weight, "b": torch.arange(3)},
        },
        tmp_path / "src.pt",
    )
    document = cli_ok(
        "convert", tmp_path / "src.pt", tmp_path / "dst.pt", "--dtype", "float16", "--json"
    ).document
    size = (tmp_path / "dst.pt").stat().st_size
    assert document["summary"] == {
        "num_tensors": 3,
        "num_bytes": 18 + 24,
        "renamed": 2,
        "transformed": 0,
        "cast": 1,
        "dropped": 1,
        "expected_absent": 0,
        "verified": 3,
        "files": [{"path": "dst.pt", "num_bytes": size}],
    }


def test_dry_run_writes_nothing_and_predicts_everything(tmp_path: Path) -> None:
    src = FIXTURES / "hf-bin"
    for target in ("out", "one.safetensors", "one.pt"):
        options = ["--max-shard-size", 300] if target == "out" else []
        dry = cli_ok("convert", src, tmp_path / target, *options, "--dry-run", "--json").document
        assert names_in(tmp_path) == []
        wet = cli_ok("convert", src, tmp_path / target, *options, "--json").document
        assert dry["summary"] | {"verified": 0} == wet["summary"] | {"verified": 0}
        assert dry["summary"]["verified"] == 0
        assert dry["findings"] == wet["findings"]
        path = tmp_path / target
        sizes = {name: len(data) for name, data in tree(path).items()} if path.is_dir() else {}
        if sizes:
            assert {one["path"]: one["num_bytes"] for one in dry["summary"]["files"]} == sizes
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_dry_run_gives_the_plan(tmp_path: Path) -> None:
    src = save(tmp_path, **{"module.w": torch.ones(2, 3)})
    rows = cli_ok(
        "convert", src, tmp_path / "out", "--dtype", "bfloat16", "--dry-run", "--json"
    ).document["plan"]
    assert rows == [
        {
            "name": "w",
            "source": "module.w",
            "transformed": False,
            "dtype": "BF16",
            "shape": [2, 3],
            "num_bytes": 12,
            "cast": True,
        }
    ]


def test_dry_run_refuses_what_a_run_would_refuse(tmp_path: Path) -> None:
    src = save(tmp_path, w=torch.ones(2))
    (tmp_path / "out.pt").write_text("there")
    outcome = cli("convert", src, tmp_path / "out.pt", "--dry-run", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC003"])


def test_no_verify_says_so(tmp_path: Path) -> None:
    src = save(tmp_path, w=torch.ones(2))
    document = cli_ok("convert", src, tmp_path / "a.pt", "--no-verify", "--json").document
    assert document["summary"]["verified"] == 0
    outcome = cli_ok("convert", src, tmp_path / "b.pt", "--no-verify")
    assert "not run" in outcome.out


@pytest.mark.parametrize(
    ("target", "format", "files"),
    [
        ("out", None, ["model.safetensors"]),
        ("out", "torch", ["pytorch_model.bin"]),
        ("out", "npz", ["model.npz"]),
        ("out/", None, ["model.safetensors"]),
        ("v1.0", None, ["model.safetensors"]),
        ("a.pt", None, None),
        ("a.pth", "torch", None),
        ("a.bin", None, None),
        ("a.SAFETENSORS", None, None),
        ("a.npz", "npz", None),
    ],
)
def test_the_destination_decides_the_format(
    target: str, format: str | None, files: list[str] | None, tmp_path: Path
) -> None:
    src = save(tmp_path, w=torch.ones(2))
    options = [] if format is None else ["--format", format]
    cli_ok("convert", src, f"{tmp_path}/{target}", *options)
    path = tmp_path / target
    assert path.is_dir() == (files is not None)
    if files is not None:
        assert names_in(path) == files
    assert facts_at(path) == facts_at(src)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("a.pt", ["--format", "safetensors"]),
        ("a.safetensors", ["--format", "torch"]),
        ("a.npz", ["--format", "torch"]),
        ("a.bin", ["--format", "npz"]),
        ("a.safetensors", ["--max-shard-size", "1GB"]),
        ("out", ["--format", "npz", "--max-shard-size", "1GB"]),
    ],
)
def test_contradictions(target: str, options: list[str], tmp_path: Path) -> None:
    src = save(tmp_path, w=torch.ones(2))
    outcome = cli("convert", src, tmp_path / target, *options, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC006"])
    assert names_in(tmp_path) == ["src.pt"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("1kB", 1000), ("1KiB", 1024), ("0.5KB", 500), ("1 KB", 1000)],
)
def test_sizes(text: str, size: int, tmp_path: Path) -> None:
    src = save(tmp_path, **{f"w{i}": torch.randn(25) for i in range(30)})
    cli_ok("convert", src, tmp_path / "out", "--max-shard-size", text)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    counts: dict[str, int] = {}
    for shard in index["weight_map"].values():
        counts[shard] = counts.get(shard, 0) + 1
    assert max(counts.values()) == size // 100


@pytest.mark.parametrize("text", ["0", "-1", "5XB", "much", "", "1e3"])
def test_sizes_that_are_none(text: str, tmp_path: Path) -> None:
    src = save(tmp_path, w=torch.ones(2))
    outcome = cli("convert", src, tmp_path / "out", f"--max-shard-size={text}", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC006"])


def test_metadata_that_the_format_cannot_hold_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "src.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1)}, path, {"format": "pt", "author": "me"})
    outcome = cli("convert", path, tmp_path / "a.pt", "--json")
    assert (outcome.code, outcome.codes) == (0, ["FC209"])
    assert "author" in outcome.document["findings"][0]["detail"]


def test_the_source_digest_is_of_the_content(tmp_path: Path) -> None:
    """The same tensors in another container have the same digest, one bit else another."""
    digests = []
    for dst in ("a.safetensors", "a.pt", "a.npz", "folder"):
        document = cli_ok("convert", FIXTURES / "arrays.npz", tmp_path / dst, "--json").document
        digests.append(document["source_digest"])
    assert len(set(digests)) == 1
    again = cli_ok("convert", tmp_path / "a.pt", tmp_path / "b.pt", "--json").document
    assert again["source_digest"] == digests[0]
    other = save(tmp_path, w=torch.ones(2))
    document = cli_ok("convert", other, tmp_path / "c.pt", "--json").document
    assert document["source_digest"] != digests[0]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    limit=st.integers(1, 900),
)
def test_shards_are_filled_in_order_up_to_the_limit(sizes: list[int], limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "src.pt"
        torch.save({f"w{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}, src)
        plan = make_plan(open_checkpoint(str(src)), PlanOptions())
    shards = split_shards(plan.steps, limit)
    assert [step for shard in shards for step in shard] == list(plan.steps)
    for shard in shards:
        assert shard
        assert len(shard) == 1 or sum(step.num_bytes for step in shard) <= limit


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], {"torch": False, "numpy": False, "rich": False}),
        (["inspect", "SRC"], {"torch": False, "numpy": False}),
        (["inspect", "ST", "--json"], {"torch": False, "numpy": False}),
        (["convert", "SRC", "DST"], {"torch": False, "numpy": False}),
        (["convert", "SRC", "DST", "--format", "torch"], {"torch": False, "numpy": False}),
        (["convert", "SRC", "DST", "--dtype", "bfloat16"], {"torch": False}),
        (["convert", "NPZ", "DST"], {"torch": False}),
        (["verify", "SRC", "OTHER"], {"torch": False}),
    ],
)
def test_heavy_imports(arguments: list[str], allowed: dict[str, bool], tmp_path: Path) -> None:
    """`import torch` takes longer than copying four gigabytes."""
    names = {
        "SRC": FIXTURES / "torch-wrapped.pt",
        "ST": FIXTURES / "tiny.safetensors",
        "NPZ": FIXTURES / "arrays.npz",
        "DST": tmp_path / "dst",
        "OTHER": tmp_path / "other.safetensors",
    }
    if "OTHER" in arguments:
        cli_ok("convert", names["SRC"], names["OTHER"])
    script = """
import contextlib, io, sys
from flamingo_ckpt.cli.main import run
with contextlib.redirect_stdout(io.StringIO()):
    code = run(sys.argv[1:])
heavy = {"torch", "numpy", "rich", "transformers", "open_clip", "safetensors", "huggingface_hub"}
print(code, *sorted(heavy & set(sys.modules)))
"""
    done = python(script, *(names.get(word, word) for word in arguments))
    code, *modules = done.stdout.split()
    assert (code, done.stderr) == ("0", "")
    assert not {"torch", "transformers", "open_clip", "huggingface_hub"} & set(modules)
    assert not [name for name in modules if allowed.get(name) is False]


def test_bfloat16_survives_a_detour_over_every_format(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 4).bfloat16(), "b": torch.randn(3)}
    src = save(tmp_path, **tensors)
    previous = src
    for number, suffix in enumerate((".safetensors", ".npz", ".pt", ".safetensors", ".pt")):
        target = tmp_path / f"{number}{suffix}"
        cli_ok("convert", previous, target, "--npy-bfloat16")
        previous = target
    assert torch_facts(load_torch(previous)) == torch_facts(tensors)


def write_release(folder: Path, *, tied: bool) -> Path:
    folder.mkdir()
    weight = torch.randn(3, 3)
    torch.save({"embed": weight, "head": weight}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return folder


def warnings_of(*arguments: object) -> list[str]:
    findings = cli_ok(*arguments, "--json").document["findings"]
    return [finding["code"] for finding in findings if finding["severity"] == "warning"]


def test_a_config_that_contradicts_the_sharing_is_said(tmp_path: Path) -> None:
    src = write_release(tmp_path / "src", tied=False)
    assert warnings_of("convert", src, tmp_path / "a") == ["FC210"]
    assert warnings_of("convert", src, tmp_path / "b", "--untie") == []
    assert warnings_of("convert", src, tmp_path / "c", "--format", "torch") == []
    tied = write_release(tmp_path / "tied", tied=True)
    assert warnings_of("convert", tied, tmp_path / "d") == []


def test_the_config_of_another_folder_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lone file has no config; the one in the working folder is not its own."""
    src = write_release(tmp_path / "src", tied=False)
    monkeypatch.chdir(src)
    assert warnings_of("convert", src / "pytorch_model.bin", tmp_path / "a.safetensors") == []
