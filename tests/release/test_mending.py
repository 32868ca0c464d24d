"""`--fix` and `--record`: what is safe is mended, and nothing else is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.release.record import find_record, write_record
from tests.release.faults import FAULTS, NOTES, RECORD, put, told
from tests.release.releases import (
    INDEX,
    SHARDS,
    edit_json,
    edit_weights,
    write,
)
from tests.support import cli, tree

BEGIN, END = (RECORD.splitlines()[at] for at in (0, -1))


def modes(folder: Path) -> dict[str, int]:
    return {one.name: one.stat().st_mode & 0o777 for one in folder.iterdir()}


@pytest.fixture
def spoilt(release: Path) -> Path:
    """A release with every fault that can be mended, and two that cannot."""
    for name in ("nan", "index total wrong", "stated dtype", "unexpected tensor"):
        FAULTS[name].plant(release)
    edit_json(release / INDEX, lambda d: put(d, "metadata.total_size", 5))
    (release / SHARDS[0]).chmod(0o600)
    (release / "tokenizer.json").chmod(0o777)
    write(release / "run.sh", "#!/bin/sh\n")
    (release / "run.sh").chmod(0o755)
    return release


MENDABLE = {"FC115", "FC107", "FC613"}


def test_a_dry_run_tells_and_changes_nothing(spoilt: Path) -> None:
    before, mode = tree(spoilt), modes(spoilt)
    outcome = cli("check", spoilt, "--fix", "--json")
    assert outcome.code == 1
    assert {*outcome.codes} >= MENDABLE
    fixes = outcome.document["fixes"]
    assert [one["path"] for one in fixes] == [SHARDS[0], "tokenizer.json", INDEX, "config.json"]
    assert not any(one["applied"] for one in fixes)
    assert (tree(spoilt), modes(spoilt)) == (before, mode)
    assert "nothing was changed" in cli("check", spoilt, "--fix").out
    assert (tree(spoilt), modes(spoilt)) == (before, mode)


def test_what_is_safe_is_mended_and_nothing_else(spoilt: Path) -> None:
    before, mode = tree(spoilt), modes(spoilt)
    first = cli("check", spoilt, "--fix", "--yes", "--json")
    assert all(one["applied"] for one in first.document["fixes"])
    after = tree(spoilt)
    assert {name for name in before if after[name] != before[name]} == {INDEX, "config.json"}
    assert after.keys() == before.keys()
    assert modes(spoilt) == mode | {SHARDS[0]: 0o644, "tokenizer.json": 0o666}
    for name, field in ((INDEX, "metadata.total_size"), ("config.json", "torch_dtype")):
        old, new = json.loads(before[name]), json.loads(after[name])
        put(old, field, None)
        put(new, field, None)
        assert old == new
    assert json.loads(after["config.json"])["torch_dtype"] == "float32"
    again = cli("check", spoilt, "--fix", "--json")
    for outcome in (first, again):
        assert not MENDABLE & {*outcome.codes}
        assert {"FC352", "FC204", "FC508"} <= {*outcome.codes}
    assert again.document["fixes"] == []


def test_what_a_link_leads_to_is_not_mended(spoilt: Path, tmp_path: Path) -> None:
    for name in ("config.json", INDEX):
        shutil.move(spoilt / name, tmp_path / name)
        (tmp_path / name).chmod(0o600)
        (spoilt / name).symlink_to(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.json", INDEX)}
    outcome = cli("check", spoilt, "--fix", "--yes", "--json")
    assert "FC008" not in outcome.codes
    for name, data in before.items():
        assert (spoilt / name).is_symlink()
        assert (tmp_path / name).read_bytes() == data
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_yes_without_fix(clean: Path) -> None:
    outcome = cli("check", clean, "--yes", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC006"])


def record(release: Path, source: Path, *options: object) -> str:
    """Check with --record; what the card is then."""
    outcome = cli("check", release, "--source", source, "--record", "--json", *options)
    assert (outcome.code, told(outcome) - NOTES) == (0, {("FC612", "info", "SHA256SUMS")})
    return (release / "README.md").read_bytes().decode()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_record_is_put_behind_the_card_and_rewritten_in_place(
    release: Path, source: Path, end: str
) -> None:
    card = release / "README.md"
    before = card.read_text().replace("\n", end)
    card.write_bytes(before.encode())
    card.chmod(0o664)

    def written(content: str) -> str:
        write_record(str(card), {"content": content, "source": {"name": "x\x1b: [y"}})
        assert card.stat().st_mode & 0o777 == 0o664
        text = card.read_bytes().decode()
        found = find_record(text)
        assert found is not None
        assert found["content"] == content
        assert text.count("\n") == text.count(end)
        return text

    first = written("a")
    assert first.startswith(before + end + BEGIN)
    assert first.endswith(END + end)
    assert written("a") == first
    # the author writes on, above and below
    above, below = f"{before}One.{end}", f"{first[len(before) :]}Two.{end}"
    card.write_bytes((above + below).encode())
    assert written("a") == above + below
    assert written("b") == above + below.replace("content: a", "content: b")


def test_a_record_says_what_was_proven_of_which_weights(release: Path, source: Path) -> None:
    (release / "SHA256SUMS").unlink()
    before = (release / "README.md").read_text()
    outcome = cli("check", release, "--source", source, "--record", "--json")
    wanted = NOTES - {("FC611", "info", "record")} | {("FC612", "info", "SHA256SUMS")}
    assert (outcome.code, told(outcome)) == (0, wanted)
    text = (release / "README.md").read_text()
    record = find_record(text)
    assert record is not None
    assert record["content"] == outcome.document["content"]
    assert record["verify"]["verdict"] == record["parity"]["verdict"] == "pass"
    assert record["parity"]["gates"] == ["as-is", "forced"]
    assert {*record["source"]["sha256"]} >= {*SHARDS}
    assert str(source.parent) not in text
    assert text.startswith(before)
    edit_weights(release, lambda tensors: tensors["perceiver.latents"].__imul__(2))
    stale = cli("check", release, "--json")
    assert (stale.code, told(stale)) == (1, wanted | {("FC611", "error", "record")})


def test_a_record_makes_the_card_that_is_not_there(release: Path, source: Path) -> None:
    (release / "README.md").unlink()
    outcome = cli("check", release, "--source", source, "--record", "--json")
    assert "FC602" not in outcome.codes
    assert {"FC601", "FC603"} <= {*outcome.codes}
    text = (release / "README.md").read_text()
    assert text.startswith(BEGIN)
    assert "verdict: pass" in text


def test_no_record_is_written_of_what_was_found_wrong(release: Path, source: Path) -> None:
    FAULTS["nan"].plant(release)
    before = (release / "README.md").read_bytes()
    outcome = cli("check", release, "--source", source, "--record", "--json")
    assert outcome.code == 1
    assert (release / "README.md").read_bytes() == before


def test_a_record_needs_a_source_and_all_bytes(clean: Path, source: Path) -> None:
    for options in (["--record"], ["--record", "--source", source, "--level", "headers"]):
        outcome = cli("check", clean, *options, "--json")
        assert (outcome.code, outcome.codes) == (2, ["FC006"])


def test_a_record_is_not_written_through_a_link(release: Path) -> None:
    outside = release.parent / "outside.md"
    shutil.move(release / "README.md", outside)
    (release / "README.md").symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(CkptError) as caught:
        write_record(str(release / "README.md"), {"content": "a"})
    assert caught.value.code == "FC503"
    assert outside.read_bytes() == before
    assert (release / "README.md").is_symlink()
