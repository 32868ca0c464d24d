"""Every file of `fixtures/broken`: refused with the code that its table names, nothing written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures import make_broken
from fixtures.make_broken import CASES, HERE, Case
from flamingo_ckpt.errors import CODES
from tests.attacks_support import error_code, finding_codes, inspected, refused, run_json

NAMES = [one.name for one in CASES]
# A bomb that goes off must not hold up the run.
pytestmark = pytest.mark.timeout(30)


@pytest.fixture(params=CASES, ids=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def here(case: Case, tmp_path: Path) -> Path:
    """A copy of the case, so that what is written beside it is seen."""
    source, copy = HERE / case.name, tmp_path / case.name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    return copy


def test_convert_refuses_and_writes_nothing(case: Case, here: Path) -> None:
    before = sorted(here.parent.rglob("*"))
    refused(here, case.convert, inspect=False)
    assert sorted(here.parent.rglob("*")) == before


def test_inspect(case: Case, here: Path) -> None:
    if case.inspect is None:
        document = inspected(here)
        assert document["summary"]["num_tensors"] >= 1
        return
    exit_code, document = run_json("inspect", here)
    assert exit_code == 2
    assert error_code(document) == case.inspect


def test_verify_never_calls_it_faithful(case: Case, here: Path) -> None:
    good = HERE.parent / "tiny.safetensors"
    for sides in ((here, good), (good, here)):
        exit_code, document = run_json("verify", *sides)
        # A file that can be listed is compared with another one: it differs.
        assert exit_code in (1, 2)
        assert "FC008" not in finding_codes(document)


@pytest.mark.parametrize(
    "name", ["pickle-reduce-system.pt", "st-hole.safetensors", "index-parent", "npy-object.npy"]
)
def test_the_installed_command_refuses(name: str, tmp_path: Path) -> None:
    code = next(one.convert for one in CASES if one.name == name)
    out = tmp_path / "out"
    for argv in (["inspect", HERE / name], ["convert", HERE / name, out]):
        done = subprocess.run(
            [sys.executable, "-m", "flamingo_ckpt", *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, code
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert str(HERE / name) in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_what_the_script_writes() -> None:
    on_disk = {
        str(path.relative_to(HERE)): path.read_bytes() for path in HERE.rglob("*") if path.is_file()
    }
    assert on_disk == make_broken.files()


def test_the_script_writes_the_same_bytes_in_a_process_of_its_own(tmp_path: Path) -> None:
    script = Path(make_broken.__file__)
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True, timeout=60)
    written = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert written == make_broken.files()


def test_the_table_is_sound() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {one.convert for one in CASES} <= CODES.keys()
    assert {one.inspect for one in CASES} - {None} <= CODES.keys()
    assert "FC008" not in {code for one in CASES for code in (one.convert, one.inspect)}
    assert sum(map(len, make_broken.files().values())) < 300_000
