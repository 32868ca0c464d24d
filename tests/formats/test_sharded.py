"""Folders: shards and index, read and written as the Hugging Face libraries do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import load_torch_model

from tests.support import (
    FIXTURES,
    cli,
    cli_ok,
    facts_at,
    load_torch,
    names_in,
    random_tensor,
    torch_facts,
)


def tensors(count: int = 6) -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": random_tensor(torch.float32, (10, 10), i) for i in range(count)}


def read_index(folder: Path, name: str = "model.safetensors.index.json") -> dict:
    return json.loads((folder / name).read_text())


def test_the_fixture(tmp_path: Path) -> None:
    src = FIXTURES / "sharded"
    oracle = {}
    for shard in src.glob("*.safetensors"):
        oracle |= torch_facts(safetensors.torch.load_file(shard))
    assert facts_at(src) == oracle
    assert facts_at(src / "model.safetensors.index.json") == oracle
    cli_ok("convert", src, tmp_path / "one.safetensors")
    assert facts_at(tmp_path / "one.safetensors") == oracle
    cli_ok("convert", src, tmp_path / "bin", "--format", "torch")
    assert torch_facts(load_torch(tmp_path / "bin" / "pytorch_model.bin")) == oracle
    cli_ok("verify", src, tmp_path / "bin")


def test_written_shards_have_the_names_and_index_of_hf(tmp_path: Path) -> None:
    state = tensors()
    torch.save(state, tmp_path / "src.pt")
    document = cli_ok(
        "convert", tmp_path / "src.pt", tmp_path / "out", "--max-shard-size", 850, "--json"
    ).document
    names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert names_in(tmp_path / "out") == [*names, "model.safetensors.index.json"]
    index = read_index(tmp_path / "out")
    assert index["metadata"] == {"total_size": 6 * 400, "total_parameters": 600}
    held = {}
    for name in names:
        for key, value in safetensors.torch.load_file(tmp_path / "out" / name).items():
            assert index["weight_map"][key] == name
            held[key] = value
    assert torch_facts(held) == torch_facts(state)
    assert [one["path"] for one in document["summary"]["files"]] == names_in(tmp_path / "out")
    for one in document["summary"]["files"]:
        assert (tmp_path / "out" / one["path"]).stat().st_size == one["num_bytes"]
    cli_ok("verify", tmp_path / "src.pt", tmp_path / "out")


def test_the_hub_library_loads_our_shards(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(5)))
    torch.save(model.state_dict(), tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "out", "--max-shard-size", "400B")
    other = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(5)))
    load_torch_model(other, tmp_path / "out", strict=True)
    assert torch_facts(other.state_dict()) == torch_facts(model.state_dict())


def test_sharded_torch_files(tmp_path: Path) -> None:
    state = tensors()
    state["tied"] = state["layer.3.weight"]
    torch.save(state, tmp_path / "src.pt")
    cli_ok(
        *("convert", tmp_path / "src.pt", tmp_path / "out"),
        *("--format", "torch", "--max-shard-size", 850),
    )
    names = [f"pytorch_model-{n:05d}-of-00003.bin" for n in (1, 2, 3)]
    assert names_in(tmp_path / "out") == [*names, "pytorch_model.bin.index.json"]
    weight_map = read_index(tmp_path / "out", "pytorch_model.bin.index.json")["weight_map"]
    loaded = {}
    for name in names:
        part = load_torch(tmp_path / "out" / name)
        assert {key for key, shard in weight_map.items() if shard == name} == set(part)
        loaded |= part
    assert torch_facts(loaded) == torch_facts(state)
    assert loaded["tied"].data_ptr() == loaded["layer.3.weight"].data_ptr()
    cli_ok("convert", tmp_path / "out", tmp_path / "back.safetensors")
    assert facts_at(tmp_path / "back.safetensors") == torch_facts(state)


def test_a_tensor_above_the_limit_gets_its_own_shard(tmp_path: Path) -> None:
    state = {"a": torch.ones(5), "large": torch.randn(100), "b": torch.ones(5)}
    torch.save(state, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "out", "--max-shard-size", 100)
    shards = read_index(tmp_path / "out")["weight_map"]
    assert len(set(shards.values())) == 3
    assert facts_at(tmp_path / "out") == torch_facts(state)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    torch.save(tensors(1), tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "out", "--max-shard-size", "1GB")
    assert names_in(tmp_path / "out") == ["model.safetensors"]


def test_tied_names_across_shards_survive_both_ways(tmp_path: Path) -> None:
    state = tensors()
    state["head"] = state["layer.0.weight"]
    torch.save(state, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "out", "--max-shard-size", 850)
    assert "head" not in read_index(tmp_path / "out")["weight_map"]
    assert facts_at(tmp_path / "out") == torch_facts(state)
    cli_ok("convert", tmp_path / "out", tmp_path / "back.pt")
    back = load_torch(tmp_path / "back.pt")
    assert torch_facts(back) == torch_facts(state)
    assert back["head"].data_ptr() == back["layer.0.weight"].data_ptr()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_numbered_shards_without_an_index(suffix: str, tmp_path: Path) -> None:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (tmp_path / "src").mkdir()
    state = tensors(3)
    for number, (name, tensor) in enumerate(state.items(), 1):
        path = tmp_path / "src" / f"{stem}-{number:05d}-of-00003{suffix}"
        if suffix == ".bin":
            torch.save({name: tensor}, path)
        else:
            safetensors.torch.save_file({name: tensor}, path, {"format": "pt"})
    assert facts_at(tmp_path / "src") == torch_facts(state)
    path.unlink()
    outcome = cli("inspect", tmp_path / "src", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC107"])
    assert "3" in outcome.document["findings"][0]["detail"]


def write_sharded(folder: Path) -> Path:
    shutil.copytree(FIXTURES / "sharded", folder)
    return folder / "model.safetensors.index.json"


def edit(index: Path, key: str, shard: str | None) -> None:
    content = json.loads(index.read_text())
    if shard is None:
        del content["weight_map"][key]
    else:
        content["weight_map"][key] = shard
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "shard", "code"),
    [
        ("gate", None, "FC107"),
        ("absent", "model-00001-of-00003.safetensors", "FC107"),
        ("gate", "model-00001-of-00003.safetensors", "FC107"),
        ("gate", "model-00009-of-00003.safetensors", "FC107"),
        ("gate", "../tiny.safetensors", "FC503"),
        ("gate", "/etc/hostname", "FC503"),
        ("gate", "..", "FC503"),
    ],
)
def test_index_and_shards_are_checked_both_ways(
    key: str, shard: str | None, code: str, tmp_path: Path
) -> None:
    index = write_sharded(tmp_path / "src")
    edit(index, key, shard)
    outcome = cli("convert", tmp_path / "src", tmp_path / "out", "--json")
    assert (outcome.code, outcome.codes) == (2, [code])
    assert not (tmp_path / "out").exists()


def test_two_shards_with_one_key(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in (1, 2):
        path = tmp_path / "src" / f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({"w": torch.randn(3)}, path)
    outcome = cli("inspect", tmp_path / "src", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC202"])


def test_several_checkpoints_in_one_folder_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("epoch1.pt", "epoch2.pt"):
        torch.save({"w": torch.randn(3)}, tmp_path / "src" / name)
    outcome = cli("inspect", tmp_path / "src", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC207"])


def test_safetensors_are_preferred_to_the_bin_beside_them(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "src" / "model.safetensors")
    torch.save({"w": torch.zeros(3)}, tmp_path / "src" / "pytorch_model.bin")
    document = cli_ok("inspect", tmp_path / "src", "--json").document
    assert document["inputs"][0]["format"] == "safetensors"


def test_a_wrong_total_is_a_warning(tmp_path: Path) -> None:
    index = write_sharded(tmp_path / "src")
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 1
    index.write_text(json.dumps(content))
    outcome = cli("inspect", tmp_path / "src", "--json")
    assert (outcome.code, outcome.codes) == (0, ["FC107"])


def test_the_hub_cache_layout_of_links(tmp_path: Path) -> None:
    """A snapshot is a folder of links into the blob store beside it; other links are refused."""
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(FIXTURES / "tiny.safetensors", blobs / "digest")
    (snapshot / "model.safetensors").symlink_to("../../blobs/digest")
    assert facts_at(snapshot) == facts_at(FIXTURES / "tiny.safetensors")
    shutil.copy(FIXTURES / "tiny.safetensors", tmp_path / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    outcome = cli("inspect", snapshot, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC503"])


def test_tied_groups_in_several_shards_are_no_conflict(tmp_path: Path) -> None:
    first, second = torch.rand(100), torch.rand(100)
    torch.save({"a1": first, "a2": first, "b1": second, "b2": second}, tmp_path / "src.pt")
    dst = tmp_path / "dst"
    cli_ok("convert", tmp_path / "src.pt", dst, "--max-shard-size", 400)
    assert len([name for name in names_in(dst) if name.endswith(".safetensors")]) == 2
    assert cli_ok("inspect", dst, "--json").codes == []
    assert cli_ok("verify", tmp_path / "src.pt", dst, "--json").codes == []
    assert facts_at(dst) == facts_at(tmp_path / "src.pt")


def test_the_wrapper_of_every_shard_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"state_dict": {"b": torch.ones(2)}}, tmp_path / "pytorch_model-00002-of-00002.bin")
    (one,) = cli_ok("inspect", tmp_path, "--json").document["inputs"]
    assert one["wrapper"] == "model, state_dict"


def test_a_distributed_checkpoint_is_named_as_what_it_is(tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (tmp_path / name).write_bytes(b"\x80\x02}.")
    outcome = cli("inspect", tmp_path, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC112"])
    assert "dcp_to_torch" in outcome.document["findings"][0]["hint"]
