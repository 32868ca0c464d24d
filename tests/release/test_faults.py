"""Every fault that a release can have, alone and together: exactly its findings, and no other."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.release.faults import FAULTS, NOTES, Fault, told
from tests.release.releases import write_sums
from tests.support import cli


def planted(clean: Path, folder: Path, faults: Iterable[Fault]) -> Path:
    """A copy of the release with faults in it; the manifest is made of them too, where it can."""
    shutil.copytree(clean, folder, symlinks=True)
    faults = sorted(faults, key=lambda one: one.is_after_sums)
    for one in faults:
        if not one.is_after_sums:
            one.plant(folder)
    write_sums(folder)
    for one in faults:
        if one.is_after_sums:
            one.plant(folder)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_and_nothing_else(name: str, clean: Path, tmp_path: Path) -> None:
    fault = FAULTS[name]
    outcome = cli("check", planted(clean, tmp_path / "release", [fault]), "--json")
    assert told(outcome) == (NOTES - fault.instead) | fault.told
    assert outcome.code == fault.code


def test_a_folder_with_a_fault_of_each_kind_gets_exactly_those(clean: Path, tmp_path: Path) -> None:
    faults = [fault for fault in FAULTS.values() if fault.joins]
    assert len(faults) >= 40
    outcome = cli("check", planted(clean, tmp_path / "release", faults), "--json")
    instead = frozenset().union(*(fault.instead for fault in faults))
    assert told(outcome) == (NOTES - instead).union(*(fault.told for fault in faults))
    assert outcome.code == 1


def test_a_release_without_fault_passes(clean: Path) -> None:
    outcome = cli("check", clean, "--json")
    assert (outcome.code, told(outcome)) == (0, NOTES)
    checks = outcome.document["summary"]["checks"]
    skipped = {name for name, status in checks.items() if status == "skip"}
    assert skipped == {"bits", "parity", "signature"}
    assert {*checks.values()} == {"pass", "skip"}
