"""What is decided before anything is written: the destination's place, metadata, omissions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from flamingo_ckpt import __version__
from flamingo_ckpt.formats import staging
from flamingo_ckpt.write_plan import DIGEST_KEY, DIGEST_PLACEHOLDER, VERSION_KEY
from tests.support import cli, cli_ok, facts_at, names_in, torch_facts, tree


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def src(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    torch.save(weights, tmp_path / "src.pt")
    return tmp_path / "src.pt"


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


# -- where the destination lies


@pytest.mark.parametrize("options", [[], ["--dtype", "float16"]])
def test_a_source_that_leads_into_the_destination_is_kept(
    options: list[str], tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    safetensors.torch.save_file(weights, out / "model.safetensors", {"format": "pt"})
    (tmp_path / "s.safetensors").symlink_to(out / "model.safetensors")
    before = tree(tmp_path)
    outcome = cli("convert", tmp_path / "s.safetensors", out, "--overwrite", "--json", *options)
    assert (outcome.code, outcome.codes) == (2, ["FC005"])
    assert tree(tmp_path) == before
    assert facts_at(out) == torch_facts(weights)


def test_a_link_in_the_destination_is_kept_too(tmp_path: Path, src: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "pytorch_model.bin").symlink_to(src)
    outcome = cli("convert", out / "pytorch_model.bin", out, "--overwrite", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC005"])
    assert names_in(out) == ["pytorch_model.bin"]


def test_the_empty_folder_that_one_stands_in(
    tmp_path: Path,
    src: Path,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cli_ok("convert", "../src.pt", ".")
    assert facts_at(tmp_path / "here") == torch_facts(weights)
    assert names_in(tmp_path) == ["here", "src.pt"]


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--format", "safetensors"]])
def test_a_destination_without_a_name(
    options: list[str], tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = cli("convert", src, "", "--json", *options)
    assert (outcome.code, outcome.codes) == (2, ["FC004"])
    assert names_in(tmp_path / "here") == []


def test_a_mount_point_is_not_exchanged(
    tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(
        os.path, "ismount", lambda path: os.path.abspath(path) == str(tmp_path / "disk")
    )
    outcome = cli("convert", src, tmp_path / "disk", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC004"])
    assert "mount point" in outcome.document["findings"][0]["detail"]
    cli_ok("convert", src, tmp_path / "disk" / "model")


def test_what_a_killed_run_left_makes_room(
    tmp_path: Path,
    src: Path,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = tmp_path / ".dst.safetensors.flamingo-staging-aaaaaaaaaaaa"
    left.write_bytes(bytes(1000))

    class Space:
        f_frsize = 1

        @property
        def f_bavail(self) -> int:
            return 0 if left.exists() else 1 << 30

    monkeypatch.setattr(staging.os, "statvfs", lambda path: Space())
    cli_ok("convert", src, tmp_path / "dst.safetensors")
    assert not left.exists()
    assert facts_at(tmp_path / "dst.safetensors") == torch_facts(weights)


def test_a_replaced_folder_that_cannot_be_removed(
    tmp_path: Path,
    src: Path,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "model.safetensors").write_bytes(b"old")

    def stuck(path: str, ignore_errors: bool = False, **options: object) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stuck)
        cli_ok("convert", src, dst, "--overwrite")
    assert facts_at(dst) == torch_facts(weights)
    cli_ok("convert", src, dst, "--overwrite")
    assert names_in(tmp_path) == ["dst", "src.pt"]


# -- metadata


def test_a_recorded_digest_is_not_carried_to_other_content(tmp_path: Path, src: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    cli_ok("convert", src, first, "--record-source")
    assert metadata_of(first)[VERSION_KEY] == __version__
    assert metadata_of(first)[DIGEST_KEY] != DIGEST_PLACEHOLDER
    cli_ok("convert", first, second, "--dtype", "float16")
    assert metadata_of(second) == {"format": "pt"}
    cli_ok("convert", second, tmp_path / "c.safetensors", "--record-source")
    assert metadata_of(tmp_path / "c.safetensors")[DIGEST_KEY] != metadata_of(first)[DIGEST_KEY]


@pytest.mark.parametrize("key", ["aaa", "zzz", f"x{DIGEST_KEY}"])
def test_a_value_like_the_placeholder_stays(
    key: str, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    plain, odd = tmp_path / "plain.safetensors", tmp_path / "odd.safetensors"
    fields = {"format": "pt", key: DIGEST_PLACEHOLDER, "quoted": f'"{DIGEST_KEY}":"'}
    fields["all"] = f'"{DIGEST_KEY}":"{DIGEST_PLACEHOLDER}'
    safetensors.torch.save_file(weights, plain, {"format": "pt"})
    safetensors.torch.save_file(weights, odd, fields)
    for path in (plain, odd):
        cli_ok("convert", path, tmp_path / f"out-{path.name}", "--record-source")
    wanted = metadata_of(tmp_path / "out-plain.safetensors")
    assert wanted[DIGEST_KEY].startswith("xxh3-128:")
    assert wanted[DIGEST_KEY] != DIGEST_PLACEHOLDER
    assert metadata_of(tmp_path / "out-odd.safetensors") == {**wanted, **fields}


# -- what is said of tied names


def test_only_formats_that_share_say_so(tmp_path: Path) -> None:
    weight = torch.rand(5)
    torch.save({"a": weight, "b": weight}, tmp_path / "src.pt")
    for name, codes in (("a.npz", []), ("a.pt", ["FC210"]), ("a.safetensors", ["FC210"])):
        outcome = cli_ok("convert", tmp_path / "src.pt", tmp_path / name, "--json")
        assert [code for code in outcome.codes if code == "FC210"] == codes, name


def test_tied_empty_tensors_under_a_prefix_and_not(tmp_path: Path) -> None:
    empty = torch.zeros(0)
    torch.save({"module.w": empty, "w": empty, "x": torch.ones(2)}, tmp_path / "src.pt")
    cli_ok("convert", tmp_path / "src.pt", tmp_path / "a.safetensors")
    assert facts_at(tmp_path / "a.safetensors") == torch_facts({"w": empty, "x": torch.ones(2)})
