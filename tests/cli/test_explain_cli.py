"""explain CODE: the page of a finding, and the list of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from flamingo_ckpt.codes import TABLE, THEMES
from flamingo_ckpt.codes.page import row
from tests.support import cli, cli_ok, python


@pytest.mark.parametrize("name", ["FC203", "fc203", "203", " Fc203 "])
def test_a_code_may_be_written_in_several_ways(name: str) -> None:
    document = cli_ok("explain", name, "--json").document
    assert document["command"]["name"] == "explain"
    assert (document["verdict"], document["exit_code"]) == ("pass", 0)
    code = TABLE["FC203"]
    assert document["summary"] == {
        "code": "FC203",
        "severity": code.severity,
        "title": code.title,
    }
    assert document["codes"] == [row(code)]
    assert document["codes"][0]["theme"] == "Names, shapes and dtypes"


def test_leading_zeros_may_be_left_out() -> None:
    assert cli_ok("explain", "7", "--json").document["summary"]["code"] == "FC007"


def test_as_markdown(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    cli_ok("explain", "FC203", "-q", "--output", page)
    assert "\n## FC203: missing tensor\n\nA tensor that should be there is not:" in page.read_text()
    assert "\nWhat to do: Look for the tensor" in page.read_text()


def test_the_list_for_people() -> None:
    lines = cli_ok("explain").out.splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings[:-1] == [theme.title for theme in THEMES if theme.codes]
    assert headings[-1].startswith(f"{len(TABLE)} codes")
    for code in TABLE.values():
        (line,) = [one for one in lines if one.startswith(f"  {code.code} ")]
        assert line.endswith(f" {code.title}")


def test_the_list_for_machines() -> None:
    document = cli_ok("explain", "--json").document
    assert document["summary"] == {"num_codes": len(TABLE)}
    assert sorted(one["code"] for one in document["codes"]) == list(TABLE)
    assert {one["severity"] for one in document["codes"]} == {"error", "warning", "info"}


def test_all_pages_at_once() -> None:
    told = " ".join(cli_ok("explain", "-v").out.split())
    for code in TABLE.values():
        assert f"hint: {code.hint}" in told


def test_lines_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    widest = max(map(len, cli_ok("explain", "FC203").out.splitlines()))
    assert 90 < widest <= 100
    monkeypatch.setenv("COLUMNS", "60")
    narrow = cli_ok("explain", "FC203").out
    prose = narrow.partition("To waive")[0].splitlines()
    assert 50 < max(map(len, prose)) <= 60
    monkeypatch.setenv("COLUMNS", "5")
    assert "hint:" in cli_ok("explain", "FC203").out


def test_what_can_be_waived_says_how() -> None:
    page = cli_ok("explain", "FC203").out
    assert '  [[policy.waiver]]\n  code = "FC203"\n' in page
    for field in ("key", "reason", "owner", "until"):
        assert f"\n  {field} = " in page


@pytest.mark.parametrize("code", ["FC501", "FC502", "FC503"])
def test_what_could_run_code_cannot_be_waived(code: str) -> None:
    page = cli_ok("explain", code).out
    assert "No policy can waive it." in page
    assert "policy.waiver" not in page


def test_what_no_check_finds_says_nothing_of_policies() -> None:
    assert "polic" not in cli_ok("explain", "FC003").out


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("FC230", "did you mean FC203 (missing tensor)"),
        ("FC2O3", "FC203 (missing tensor)"),
        ("closed gates", "FC402 (hidden behind closed gates)"),
        ("quite another thing", "`flamingo-ckpt explain` lists them"),
        ("\u0662\u0660\u0663", "`flamingo-ckpt explain` lists them"),
        ("", "`flamingo-ckpt explain` lists them"),
    ],
)
def test_an_unknown_code_is_answered_with_the_nearest(name: str, hint: str) -> None:
    outcome = cli("explain", name)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: there is no code `")
    assert hint in outcome.err
    document = cli("explain", name, "--json").document
    assert document["findings"][0]["code"] == "FC006"


def test_a_hostile_code_is_escaped() -> None:
    outcome = cli("explain", "\x1b[2Jx" + "y" * 500)
    assert outcome.code == 2
    assert "\x1b" not in outcome.err
    assert len(outcome.err) < 300


def test_the_answer_needs_no_other_library() -> None:
    heavy = ("torch", "transformers", "numpy", "huggingface_hub", "safetensors")
    code = (
        "import sys; from flamingo_ckpt.cli.main import run; code = run(['explain', 'FC203']); "
        f"sys.exit(code or sorted(set({heavy}) & sys.modules.keys()) or 0)"
    )
    assert python(code).returncode == 0


def test_the_table_writes_its_document() -> None:
    done = python("import runpy; runpy.run_module('flamingo_ckpt.codes', run_name='__main__')")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# Findings\n")
    assert all(f"{code}: {row.title}" in done.stdout for code, row in TABLE.items())
