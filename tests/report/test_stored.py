"""Stored reports, rendered again: as the run itself would have, or not at all."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ckpt.errors import CkptError
from flamingo_ckpt.report.document import Report, from_document, to_document
from flamingo_ckpt.report.renderings import FORMATS, SUFFIXES, format_of, render_as
from flamingo_ckpt.report.schema import first_problem
from flamingo_ckpt.report.stored import parse_report
from tests.hub_server import serving
from tests.report import goldens
from tests.report.parity_support import HOSTILE, ended_early, hidden, hostile, odd_numbers
from tests.report.test_goldens import ODD, changed, places
from tests.support import FIXTURES, cli, cli_ok

STORED = goldens.stored()


def again(report: Report) -> Report:
    """Through a file and back."""
    return parse_report(json.dumps(to_document(report)).encode(), "report.json")


@pytest.mark.parametrize("name", goldens.CASES)
@pytest.mark.parametrize("options", [[], ["-v"]], ids=["short", "verbose"])
def test_text_is_what_the_run_itself_printed(
    name: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(goldens.ROOT)
    stored = tmp_path / "stored.json"
    with serving(monkeypatch) as hub:
        hub.push_folder(goldens.REPO, FIXTURES / "hf-bin")
        arguments = goldens.CASES[name](tmp_path)
        ran = cli(*arguments, *options, "--output", stored)
    if not stored.exists():  # what cannot be parsed writes no report
        assert ran.code == 2
        stored.write_text(cli(*arguments, "--json").out)
    shown = cli_ok("report", "render", stored, *options)
    assert shown.err == ""
    # an error is told on stderr by the run, and is the answer of the rendering
    assert shown.out == ran.out + ran.err
    assert json.loads(cli_ok("report", "render", stored, "--json").out) == json.loads(
        stored.read_text()
    )


@pytest.mark.parametrize("told", [hidden(), odd_numbers(), ended_early(), hostile()])
@pytest.mark.parametrize("verbose", [False, True])
def test_parity_too(told: Report, verbose: bool) -> None:
    shown, wanted = (render_as(one, "text", verbose=verbose) for one in (again(told), told))
    assert shown == wanted
    for format in FORMATS[2:]:
        assert render_as(again(told), format) == render_as(told, format), format


@pytest.mark.parametrize("document", STORED.values(), ids=list(STORED))
def test_every_format_of_every_verb(document: dict[str, Any]) -> None:
    report = from_document(document)
    for format in FORMATS:
        assert render_as(report, format).endswith("\n")
    assert json.loads(render_as(report, "json")) == document


def test_what_a_newer_tool_wrote_is_kept() -> None:
    document = {
        **STORED["verify-fail"],
        "schema_version": "1.7",
        "tool": {"name": "flamingo-ckpt", "version": "9.9.9", "python": "4"},
        "news": {"deep": [1, {"er": 2}]},
    }
    document["findings"] = [
        {**document["findings"][0], "code": "FC999", "title": "a new thing", "since": 9},
        {**document["findings"][1], "title": "an old name for it"},
    ]
    report = parse_report(json.dumps(document).encode(), "report.json")
    assert json.loads(render_as(report, "json")) == document
    unknown, known = report.findings
    assert (unknown.title, known.title) == ("a new thing", "bits differ")
    page = render_as(report, "html")
    assert "a new thing" in page
    assert "9.9.9" in page
    assert "FC999" in render_as(report, "sarif")


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is not JSON"),
    "text": (b"# A card", "it is not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "it is not JSON"),
    "a list": (b"[]", "the document is an array"),
    "another JSON": (b'{"weight_map": {}}', "`schema_version` is missing"),
    "NaN": (b'{"schema_version": NaN}', "NaN is no JSON"),
    "a field twice": (b'{"verdict": "fail", "verdict": "pass"}', "`verdict` is there twice"),
    "deep": (b'{"a":' * 40 + b"1" + b"}" * 40, "nested too deeply"),
    "very deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "it is not JSON"),
}


@pytest.mark.parametrize(("data", "told"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_report_is_refused(data: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(data)
    outcome = cli("report", "render", path, "--json")
    (finding,) = outcome.document["findings"]
    assert (outcome.code, outcome.err, finding["code"]) == (2, "", "FC011")
    assert outcome.document["command"]["name"] == "report"
    assert outcome.document["where"] == str(path)
    assert told in finding["detail"]
    plain = cli("report", "render", path, "--output", tmp_path / "x.html")
    assert (plain.code, plain.out) == (2, "")
    assert plain.err.startswith("error: this is not a report: ")
    assert not (tmp_path / "x.html").exists()


def test_a_report_of_another_major_version_is_refused() -> None:
    document = {**STORED["verify"], "schema_version": "2.0"}
    with pytest.raises(CkptError, match=r"schema version 2.0; this tool reads 1.x") as refused:
        parse_report(json.dumps(document).encode(), "x")
    assert refused.value.code == "FC011"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    outcome = cli("report", "render", tmp_path / "absent", "--json")
    assert (outcome.code, outcome.codes) == (2, ["FC002"])


def test_passes_that_are_not_as_many_as_their_cells() -> None:
    document = json.loads(json.dumps(STORED["parity"]))
    document["summary"]["layers"][2]["passes"] = []
    with pytest.raises(CkptError, match="layer 2 has 0 passes, and there are 1"):
        parse_report(json.dumps(document).encode(), "x")


@pytest.mark.parametrize(
    ("status", "required", "severity", "told"),
    [
        ("pass", True, "error", "it has errors"),
        ("fail", False, "info", "the check `keys` failed"),
        ("skip", True, "info", "the check `keys` is required and did not run"),
        ("skip", False, "warning", None),
    ],
)
def test_a_check_that_passed_has_found_nothing_against_it(
    status: str, required: bool, severity: str, told: str | None
) -> None:
    """A verdict that was edited is neither shown nor pushed by."""
    row = {"name": "keys", "status": status, "required": required, "sentence": "so", "seconds": 0}
    row |= {"num_errors": 0, "num_warnings": 0, "num_waived": 0}
    finding = {"code": "FC201", "title": "t", "severity": severity, "detail": "d"}
    finding |= {"key": None, "hint": None, "data": {}}
    document = STORED["check"] | {"verdict": "pass", "exit_code": 0}
    document |= {"checks": [row], "findings": [finding]}
    if told is None:
        assert parse_report(json.dumps(document).encode(), "report.json").verdict == "pass"
        return
    with pytest.raises(CkptError, match=f"its verdict is `pass`, and {told}") as caught:
        parse_report(json.dumps(document).encode(), "report.json")
    assert caught.value.code == "FC011"


@given(data=st.data(), name=st.sampled_from(sorted(STORED)))
def test_a_spoilt_report_is_refused_or_rendered(data: st.DataObject, name: str) -> None:
    """Whatever a stored report says, nothing but FC011 comes of it."""
    spoilt: Any = STORED[name]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(list(places(spoilt))))
        value = data.draw(st.sampled_from([*ODD, HOSTILE, 1 << 62]))
        spoilt = changed(spoilt, at, value, drops=data.draw(st.booleans()))
    spoilt_bytes = json.dumps(spoilt).encode()
    if first_problem(json.loads(spoilt_bytes)) is not None:
        with pytest.raises(CkptError, match=r"this is not a report|schema version"):
            parse_report(spoilt_bytes, "x")
        return
    try:
        report = parse_report(spoilt_bytes, "x")
    except CkptError:  # lists that are not of one length
        return
    for format in FORMATS:
        content = render_as(report, format)
        if format not in ("html", "junit"):
            assert all(line.isprintable() for line in content.split("\n")), format
    ET.fromstring(render_as(report, "junit"))


def hostile_document(name: str) -> dict[str, Any]:
    """A golden report in which every text that a file can choose is hostile."""
    fixed = {"schema_version", "name", "verdict", "code", "severity", "status", "level", "check"}
    fixed |= {"decides", "dtype", "only_in", "first_divergence", "stage", "gates"}

    def walk(value: Any, field: str) -> Any:
        if isinstance(value, dict):
            return {key: walk(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, field) for item in value]
        is_free = isinstance(value, str) and field not in fixed and value not in ("nan", "inf")
        return HOSTILE if is_free else value

    document: dict[str, Any] = walk(STORED[name], "")
    for part in ("tool", "summary"):
        document[part] = STORED[name][part]
    return document


@pytest.mark.parametrize("name", [name for name in STORED if name not in ("pull", "explain")])
def test_a_hostile_report_is_only_text(name: str) -> None:
    report = parse_report(json.dumps(hostile_document(name)).encode(), "x")
    for format in FORMATS:
        content = render_as(report, format)
        assert HOSTILE not in content
        assert "\x1b" not in content
        assert "\u202e" not in content
        if format in ("markdown", "step-summary"):
            assert "<script" not in content
        if format == "html":
            assert "<script>alert" not in content
            assert len(re.findall(r"<script", content)) == content.count("</script>") <= 2
    ET.fromstring(render_as(report, "junit"))
    for line in render_as(report, "github").splitlines():
        assert re.match(r"::(error|warning|notice) [^:]*::|and \d+ more|flamingo-ckpt ", line), line


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes_and_formats_are_one(suffix: str, tmp_path: Path) -> None:
    stored, path = tmp_path / "stored.json", tmp_path / f"again{suffix.upper()}"
    stored.write_text(json.dumps(STORED["verify-fail"]))
    printed = cli_ok("report", "render", stored, "--format", format_of(f"x{suffix}"))
    outcome = cli_ok("report", "render", stored, "-q", "--output", path)
    assert (outcome.out, outcome.err) == ("", "")
    assert path.read_text() == printed.out


def test_rendering_says_nothing_about_the_verdict_by_its_exit_code(tmp_path: Path) -> None:
    stored = tmp_path / "stored.json"
    for name in ("verify-fail", "inspect-error", "check"):
        stored.write_text(json.dumps(STORED[name]))
        for format in FORMATS:
            assert cli_ok("report", "render", stored, "--format", format).err == ""


def test_colours_are_asked_for(tmp_path: Path) -> None:
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(STORED["verify-fail"]))
    assert "\x1b[" in cli_ok("report", "render", stored, "--color", "always").out
    for format in FORMATS[1:]:
        shown = cli_ok("report", "render", stored, "--color", "always", "--format", format)
        assert "\x1b[" not in shown.out
