"""Against the source, single files, and everything that can be given as SRC."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.release.faults import FAULTS, NOTES, put, told
from tests.release.releases import (
    INDEX,
    SHARDS,
    edit_json,
    edit_weights,
    read_weights,
    safetensors_bytes,
    write,
    write_sums,
)
from tests.support import cli

LOUD = "perceiver.layers.0.to_q.weight"


def test_a_faithful_release_passes_every_check(clean: Path, source: Path) -> None:
    outcome = cli("check", clean, "--source", source, "--json")
    assert (outcome.code, told(outcome)) == (0, NOTES)
    document = outcome.document
    assert document["summary"]["checks"]["bits"] == "pass"
    assert document["summary"]["checks"]["parity"] == "pass"
    assert document["bits"]["summary"]["bit_exact"] == len(document["tensors"])
    assert {one["gates"] for one in document["parity"]["summary"]["passes"]} == {"as-is", "forced"}
    assert document["source"] == str(source)
    assert len(document["inputs"]) == 2


def test_a_source_under_a_key_is_told_too(clean: Path, tmp_path: Path) -> None:
    """Opened without its key it is ambiguous, and was left out of the inputs in silence."""
    weights = {name: torch.from_numpy(one.copy()) for name, one in read_weights(clean)[0].items()}
    path = tmp_path / "two.pt"
    torch.save({"model": weights, "ema": weights}, path)
    policy = tmp_path / "policy.toml"
    policy.write_text('[policy]\nrequired = ["bits"]\n')
    options = ("--wrapper-key", "ema", "--policy", policy, "--json")
    document = cli("check", clean, "--source", path, *options).document
    assert document["summary"]["checks"]["bits"] == "pass"
    assert [one["uri"] for one in document["inputs"]][1:] == [str(path)]
    assert document["inputs"][1]["wrapper"] == "ema"


def test_one_bit_differs(release: Path, source: Path) -> None:
    edit_weights(release, lambda t: t[LOUD].view("u4").reshape(-1).__ixor__(1 << 30))
    write_sums(release)
    outcome = cli("check", release, "--source", source, "--json")
    assert outcome.code == 1
    found = [(one["code"], one["key"]) for one in outcome.document["findings"]]
    assert {("FC301", LOUD), ("FC480", None), ("FC483", LOUD)} <= {*found}
    checks = outcome.document["summary"]["checks"]
    assert (checks["bits"], checks["parity"], checks["values"]) == ("fail", "fail", "pass")


def test_equal_bits_that_compute_otherwise(release: Path, source: Path) -> None:
    """An activation in the config: nothing that reads the weights can see it."""
    edit_json(
        release / "config.json",
        lambda document: put(document, "vision_config.hidden_act", "gelu"),
    )
    write_sums(release)
    outcome = cli("check", release, "--source", source, "--json")
    checks = outcome.document["summary"]["checks"]
    assert (outcome.code, checks["bits"], checks["parity"]) == (1, "pass", "fail")
    assert "FC480" in outcome.codes


def test_what_the_source_lacks_is_not_proven(clean: Path, source: Path) -> None:
    """The source has no vision tower and none is given: neither its bits nor what it computes."""
    tensors, _ = read_weights(source)
    for name in (*SHARDS, INDEX):
        (source / name).unlink()
    kept = {name: one for name, one in tensors.items() if not name.startswith("vision_")}
    write(source / "model.safetensors", safetensors_bytes(kept))
    outcome = cli("check", clean, "--source", source, "--json")
    assert outcome.code in (1, 3)
    checks = outcome.document["summary"]["checks"]
    assert checks["bits"] in ("fail", "skip")
    assert checks["parity"] in ("fail", "skip")


@pytest.mark.parametrize(
    "spelling", ["{}", "{}/", "{}/../release", "{}/model.safetensors.index.json"]
)
def test_a_release_is_not_its_own_source(release: Path, spelling: str) -> None:
    outcome = cli("check", release, "--source", spelling.format(release), "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC006"])


def test_a_source_that_cannot_be_read_fails(clean: Path, tmp_path: Path) -> None:
    outcome = cli("check", clean, "--source", tmp_path / "gone.pt", "--json")
    assert outcome.code == 1
    assert outcome.document["summary"]["checks"]["bits"] == "fail"
    assert "FC002" in outcome.codes


@pytest.mark.parametrize("option", [["--vocab-rows", 9], ["--to", "hf-flamingo"], ["--from", "x"]])
def test_options_about_a_source_need_one(clean: Path, option: list[object]) -> None:
    outcome = cli("check", clean, *option, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC006"])


def test_an_index_stands_for_its_folder(release: Path) -> None:
    FAULTS["data that can be executed"].plant(release)
    wanted = told(cli("check", release, "--json"))
    assert told(cli("check", release / INDEX, "--json")) == wanted
    assert ("FC115", "warning", "tokenizer.json") in wanted


def test_a_single_file(clean: Path, tmp_path: Path) -> None:
    """Of a file less can be said; what was not looked at is told, and is incomplete."""
    tensors, _ = read_weights(clean)
    file = tmp_path / "model.safetensors"
    write(file, safetensors_bytes(tensors))
    outcome = cli("check", file, "--json")
    assert outcome.code == 3
    checks = outcome.document["summary"]["checks"]
    assert {name for name, status in checks.items() if status == "pass"} == {
        *("container", "values", "safety")
    }
    policy = tmp_path / "policy.toml"
    policy.write_text("[policy]\nrequired = ['container', 'keys', 'values', 'config']\n")
    named = cli("check", file, "--config", clean / "config.json", "--policy", policy, "--json")
    assert (named.code, named.codes) == (0, [])
    assert named.document["files"][0]["path"] == "model.safetensors"


def test_a_config_that_is_named_does_not_hide_the_release_own(release: Path) -> None:
    """Who downloads the release has its config and not the one that was named."""
    shutil.copy(release / "config.json", release.parent / "right.json")
    edit_json(release / "config.json", lambda d: put(d, "vision_config.image_size", 16))
    write_sums(release)
    outcome = cli("check", release, "--config", release.parent / "right.json", "--json")
    assert outcome.code == 1
    assert ("FC604", "error", "vision_config.image_size") in told(outcome)


@pytest.mark.parametrize("name", ["gone", "gone/x.safetensors"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    outcome = cli("check", tmp_path / name, "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC002"])


def test_a_report_within_the_release_is_no_part_of_it(release: Path) -> None:
    for _ in range(2):
        outcome = cli("check", release, "--output", release / "report.json", "--json")
        assert (outcome.code, told(outcome)) == (0, NOTES)
        assert "report.json" not in [one["path"] for one in outcome.document["files"]]


def test_what_the_check_saw_is_listed(clean: Path) -> None:
    import hashlib

    files = cli("check", clean, "--json").document["files"]
    assert [one["path"] for one in files] == sorted(one.name for one in clean.iterdir())
    for one in files:
        data = (clean / one["path"]).read_bytes()
        assert one["num_bytes"] == len(data)
        assert one["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_what_changes_meanwhile_was_not_checked(
    release: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same length is put in place after its check, and before it is listed."""
    from flamingo_ckpt.release import check as module

    real = module.check_card

    def exchange(*arguments: Any) -> Any:
        data = (release / name).read_bytes()
        write(release.parent / "other", data[:-1] + bytes([data[-1] ^ 1]))
        (release.parent / "other").replace(release / name)
        return real(*arguments)

    monkeypatch.setattr(module, "check_card", exchange)
    outcome = cli("check", release, "--json")
    assert (outcome.code, told(outcome)) == (1, NOTES | {("FC007", "error", name)})
    assert outcome.document["files"] == []


def test_a_selection_of_the_source_does_not_prove_the_rest(clean: Path, source: Path) -> None:
    outcome = cli("check", clean, "--source", source, "--include", "perceiver.*", "--json")
    assert outcome.code == 1
    assert outcome.document["summary"]["checks"]["bits"] == "fail"
