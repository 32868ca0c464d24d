"""What goes along with the weights of a release folder, and what stays behind."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import torch

from tests.support import FIXTURES, cli, cli_ok, names_in, tree

CARRIED = [
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def release(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    shutil.copytree(FIXTURES / "hf-bin", folder)
    torch.save({"step": 3}, folder / "training_args.bin")
    (folder / "sub").mkdir()
    (folder / "sub" / "preprocessor_config.json").write_text('{"size": 7}\n')
    (folder / "sub" / "spiece.model").write_bytes(b"\x00\x01tokens")
    (folder / "notes.log").write_text("loss 3.2\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "config.json").write_text("{}")
    (folder / "LICENSE").write_text("free\n")
    return folder


def test_configs_tokenizer_and_card_are_carried_byte_for_byte(tmp_path: Path) -> None:
    src = release(tmp_path)
    document = cli_ok("convert", src, tmp_path / "out", "--json").document
    have, there = tree(tmp_path / "out"), tree(src)
    weights = have.pop("model.safetensors")
    assert weights
    wanted = [*CARRIED, "LICENSE", "sub/preprocessor_config.json", "sub/spiece.model"]
    assert have == {name: there[name] for name in wanted}
    left = {f["key"]: f["detail"] for f in document["findings"] if f["code"] == "FC504"}
    assert set(left) == {"modeling_tiny.py", "training_args.bin", "notes.log"}
    assert "--copy-code" in left["modeling_tiny.py"]
    paths = {one["path"]: one["num_bytes"] for one in document["summary"]["files"]}
    assert paths == {name: len(data) for name, data in tree(tmp_path / "out").items()}


def test_code_and_pickles_only_on_request(tmp_path: Path) -> None:
    src = release(tmp_path)
    cli_ok("convert", src, tmp_path / "out", "--copy-code")
    have, there = tree(tmp_path / "out"), tree(src)
    for name in ("modeling_tiny.py", "training_args.bin"):
        assert have[name] == there[name]
    assert "notes.log" not in have
    assert "pytorch_model.bin" not in have


def test_a_pickle_by_another_name_counts_as_code(tmp_path: Path) -> None:
    src = release(tmp_path)
    (src / "vocab.txt").write_bytes(pickle.dumps({"a": 1}))
    cli_ok("convert", src, tmp_path / "out")
    assert "vocab.txt" not in tree(tmp_path / "out")


def test_a_single_file_carries_nothing(tmp_path: Path) -> None:
    cli_ok("convert", release(tmp_path), tmp_path / "one.safetensors")
    assert names_in(tmp_path) == ["one.safetensors", "src"]


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    src = release(tmp_path)
    (tmp_path / "private.json").write_text("secret")
    (src / "extra.json").symlink_to(tmp_path / "private.json")
    outcome = cli("convert", src, tmp_path / "out", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC503"])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_unknown_things(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "notes.txt").write_text("nothing here")
    outcome = cli("inspect", tmp_path / "src", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC001"])
    assert "notes.txt" in outcome.document["findings"][0]["detail"]


def test_index_and_shards_do_not_travel_with_a_conversion(tmp_path: Path) -> None:
    cli_ok("convert", FIXTURES / "sharded", tmp_path / "out")
    assert names_in(tmp_path / "out") == ["model.safetensors"]
